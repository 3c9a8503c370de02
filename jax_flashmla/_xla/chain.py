"""Makes several operations of a function one custom call.

`chain(function, ...)` traces a function, and makes one call (`chain_call.py`) of those of its
operations between which arrays are at most reshaped. What does not depend on their results is
computed before, what does after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import (
    ClosedJaxpr,
    DebugInfo,
    DropVar,
    Jaxpr,
    JaxprEqn,
    Literal,
    jaxpr_as_fun,
)

from jax_flashmla._xla.chain_call import Call, Operand, chain_p, run_calls
from jax_flashmla._xla.operation import Operation, operation_of

JITS = ("jit", "pjit")
RESHAPES = ("reshape", "squeeze", "expand_dims")


def chain(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), of pytrees. What the caller knows of them, the function does too."""
    leaves, tree = jax.tree.flatten(args)
    traced = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.core.Tracer)}

    def of_traced(*values: jax.Array) -> Any:
        given = dict(zip(traced, values, strict=True))
        return function(*jax.tree.unflatten(tree, [given.get(i, x) for i, x in enumerate(leaves)]))

    closed, shapes = jax.make_jaxpr(of_traced, return_shape=True)(*traced.values())
    division = _Division()
    out = division.divide(closed.jaxpr, closed.consts, list(traced.values()))
    bind = chain_p.bind if len(division.calls) > 1 else run_calls
    kept = division.kept(out)
    results = bind(*division.operands, calls=tuple(division.calls), kept=kept)
    known = dict(zip(kept, results, strict=True))
    return jax.tree.unflatten(jax.tree.structure(shapes), division.finish(out, known))


@dataclasses.dataclass
class _Later:
    """What is computed after the chain."""

    value: Any = None


class _Division:
    """The chain's calls and operands, and what is left to compute.

    A value is an array, where it is known before the chain; an Operand that is a result; or _Later.
    """

    def __init__(self) -> None:
        self.operands: list[Any] = []
        self.calls: list[Call] = []
        self._numbers: dict[int, int] = {}  # of operands, by id
        self._counts: list[int] = []  # of each call's results
        self._later: list[tuple[JaxprEqn, list[Any], list[_Later]]] = []

    def divide(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Goes through equations; their results' values."""
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            values = [read(atom) for atom in eqn.invars]
            env |= zip(eqn.outvars, self._values(eqn, values), strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _values(self, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
        operation = operation_of(eqn.primitive)
        if eqn.primitive.name in JITS and _has_chained(eqn.params["jaxpr"].jaxpr):
            inner = eqn.params["jaxpr"]
            return self.divide(inner.jaxpr, inner.consts, values)
        late = any(isinstance(value, _Later) for value in values)
        if operation is not None and operation.chained and not late:
            return self._add(eqn, operation, values)
        if not late and not any(isinstance(value, Operand) for value in values):
            return _evaluate(eqn, values)
        if not late and eqn.primitive.name in RESHAPES:
            return [dataclasses.replace(values[0], shape=_shape(eqn.outvars[0]))]
        made = [_Later() for _ in eqn.outvars]
        self._later.append((eqn, values, made))
        return made

    def _add(self, eqn: JaxprEqn, operation: Operation, values: list[Any]) -> list[Operand]:
        operands = []
        for atom, value in zip(eqn.invars, values, strict=True):
            if isinstance(value, Operand):
                operands.append(value)
                continue
            if id(value) not in self._numbers:
                self._numbers[id(value)] = len(self.operands)
                self.operands.append(value)
            operands.append(Operand(False, self._numbers[id(value)], _shape(atom)))
        params = tuple(sorted(eqn.params.items()))
        self.calls.append(Call(operation, tuple(operands), params))
        first = sum(self._counts)
        self._counts.append(len(eqn.outvars))
        return [Operand(True, first + i, _shape(var)) for i, var in enumerate(eqn.outvars)]

    def kept(self, out: Sequence[Any]) -> tuple[int, ...]:
        """Which of the calls' results are the chain's: what others need or own."""
        values = [*out, *(value for _, values, _ in self._later for value in values)]
        kept = {value.index for value in values if isinstance(value, Operand)}
        first = 0
        for call, count in zip(self.calls, self._counts, strict=True):
            kept |= {first + result for result in call.operation.aliases.values()}
            first += count
        return tuple(sorted(kept))

    def finish(self, out: Sequence[Any], results: Mapping[int, Any]) -> list[Any]:
        """The values of `out`, which are all known with the chain's results."""

        def known(value: Any) -> Any:
            if isinstance(value, Operand):
                return value.take(self.operands, results)
            return value.value if isinstance(value, _Later) else value

        for eqn, values, made in self._later:
            for later, value in zip(made, _evaluate(eqn, list(map(known, values))), strict=True):
                later.value = value
        return list(map(known, out))


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _has_chained(jaxpr: Jaxpr) -> bool:
    for eqn in jaxpr.eqns:
        operation = operation_of(eqn.primitive)
        if operation is not None and operation.chained:
            return True
        if eqn.primitive.name in JITS and _has_chained(eqn.params["jaxpr"].jaxpr):
            return True
    return False


def _evaluate(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    read = {
        atom: value
        for atom, value in zip(eqn.invars, values, strict=True)
        if not isinstance(atom, Literal)
    }
    made = [var for var in eqn.outvars if not isinstance(var, DropVar)]
    about = DebugInfo("chain", "chain", None, None)
    jaxpr = ClosedJaxpr(Jaxpr((), list(read), made, [eqn], debug_info=about), ())
    results = iter(jaxpr_as_fun(jaxpr)(*read.values()))
    return [None if isinstance(var, DropVar) else next(results) for var in eqn.outvars]
