"""The custom call of a chain: several operations, whose handlers it calls one after the other.

Each kernel may start while the one before it ends; between two custom calls XLA lets none.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_flashmla._xla.dispatch import PLATFORMS
from jax_flashmla._xla.operation import Operation

TARGET = "flashmla_chain_v1"
ALIGNMENT = 256  # bytes, of a result in the workspace, as of XLA's buffers
# XLA's numbers of types (XLA_FFI_DataType).
DTYPES = {
    "int32": 4,
    "uint8": 6,
    "float16": 10,
    "float32": 11,
    "bfloat16": 16,
    "float8_e4m3fn": 20,
}


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand of the chain or a result of its calls, in the shape of a call's operand."""

    is_result: bool
    index: int
    shape: tuple[int, ...]

    def take(self, operands: Sequence[Any], results: Sequence[Any] | Mapping[int, Any]) -> Any:
        """The array."""
        array = (results if self.is_result else operands)[self.index]
        return array if array.shape == self.shape else array.reshape(self.shape)

    def take_type(self, operands: Sequence[Any], results: Sequence[Any]) -> Any:
        """Its type, of types."""
        return (results if self.is_result else operands)[self.index].update(shape=self.shape)


@dataclasses.dataclass(frozen=True)
class Call:
    """An operation, what it is called on, and its parameters."""

    operation: Operation
    operands: tuple[Operand, ...]
    params: tuple[tuple[str, Any], ...]

    def run(self, operands: Sequence[Any], results: Sequence[Any]) -> list[Any]:
        taken = (operand.take(operands, results) for operand in self.operands)
        return self.operation.bind(*taken, **dict(self.params))

    def operand_types(self, operands: Sequence[Any], results: Sequence[Any]) -> list[Any]:
        return [operand.take_type(operands, results) for operand in self.operands]

    def types(self, operands: Sequence[Any], results: Sequence[Any]) -> list[Any]:
        return self.operation.types(*self.operand_types(operands, results), **dict(self.params))


def run_calls(*operands: Any, calls: tuple[Call, ...], kept: tuple[int, ...]) -> list[Any]:
    """The calls of a chain one by one."""
    results: list[Any] = []
    for call in calls:
        results += call.run(operands, results)
    return [results[i] for i in kept]


def _types(*operands: Any, calls: tuple[Call, ...], kept: tuple[int, ...]) -> list[Any]:
    types = [x for each in types_of_results(operands, calls) for x in each]
    return [types[i] for i in kept]


def types_of_results(operands: Sequence[Any], calls: Sequence[Call]) -> list[list[Any]]:
    """Of each call's results."""
    types: list[list[Any]] = []
    for call in calls:
        types.append(call.types(operands, [x for each in types for x in each]))
    return types


def _batch(
    operands: Sequence[Any], dims: Sequence[Any], **params: Any
) -> tuple[list[Any], list[int]]:
    """The calls one by one, each by its own rule."""
    results = jax.vmap(partial(run_calls, **params), in_axes=tuple(dims))(*operands)
    return results, [0] * len(results)


def _no_derivative(*_: Any, calls: tuple[Call, ...], **__: Any) -> Any:
    return calls[0].operation.no_derivative()


def _lower(
    platform: str, ctx: Any, *args: Any, calls: tuple[Call, ...], kept: tuple[int, ...]
) -> Any:
    types = types_of_results(ctx.avals_in, calls)
    if not _are_handled(platform, calls, ctx.avals_in, [x for each in types for x in each]):
        run = mlir.lower_fun(run_calls, multiple_results=True)
        return run(ctx, *args, calls=calls, kept=kept)
    plan = make_plan(calls, types, kept)
    aliases, words, attributes = {}, [], {}
    for i, (call, made, places) in enumerate(zip(calls, types, plan.places, strict=True)):
        words.append(len(call.operands))
        for operand in call.operands:
            index = operand.index + (len(args) if operand.is_result else 0)
            words += [index, len(operand.shape), *operand.shape]
        words.append(len(made))
        for place, aval in zip(places, made, strict=True):
            words += [place, DTYPES[aval.dtype.name], aval.ndim, *aval.shape]
        for operand_index, result in call.operation.aliases.items():
            aliases[call.operands[operand_index].index] = places[result]
        for name, value in call.operation.attributes(**dict(call.params)).items():
            attributes[f"{i}.{name}"] = value
    workspace = ctx.avals_in[0].update(
        shape=(plan.workspace_bytes,), dtype=np.dtype(np.uint8), weak_type=False
    )
    results = jax.ffi.ffi_lowering(TARGET, operand_output_aliases=aliases)(
        ctx.replace(avals_out=[*ctx.avals_out, workspace]),
        *args,
        targets="".join(f"{call.operation.target} " for call in calls),
        words=np.array(words, np.int64),
        **attributes,
    )
    return results[:-1]


def _are_handled(
    platform: str, calls: Sequence[Call], operands: Sequence[Any], results: Sequence[Any]
) -> bool:
    """Whether each call is one of its handler, and none is given what another one overwrites."""
    used = [(operand.is_result, operand.index) for call in calls for operand in call.operands]
    for call in calls:
        types = call.operand_types(operands, results)
        if not call.operation.is_handled(platform, *types, **dict(call.params)):
            return False
        for index in call.operation.aliases:
            operand = call.operands[index]
            if operand.is_result or used.count((False, operand.index)) > 1:
                return False
    return all(aval.dtype.name in DTYPES for aval in results)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each call's results are: i, the chain's result i; -1 - offset, in its workspace."""

    places: list[list[int]]
    workspace_bytes: int


def make_plan(calls: Sequence[Call], types: Sequence[Sequence[Any]], kept: Sequence[int]) -> Plan:
    """Has results that are needed within the chain alone take turns in its workspace.

    Memory that is written again and again is likelier to be in L2. A kernel writes when all before
    it have ended, so that a result may lie where one was that the call before was the last to read.
    """
    last: dict[int, int] = {}  # the last call that has a result as its operand
    for i, call in enumerate(calls):
        last |= {operand.index: i for operand in call.operands if operand.is_result}
    places: list[list[int]] = []
    live: list[tuple[int, int, int]] = []  # begin, end, last call
    size, numbers = 0, itertools.count()
    for i, made in enumerate(types):
        live = [taken for taken in live if taken[2] >= i]
        places.append([])
        for aval in made:
            number = next(numbers)
            if number in kept:
                places[i].append(kept.index(number))
                continue
            bytes = -(-aval.size * aval.dtype.itemsize // ALIGNMENT) * ALIGNMENT
            begin = 0
            for other, end, _ in sorted(live):
                if begin + bytes <= other:
                    break
                begin = max(begin, end)
            live.append((begin, begin + bytes, last.get(number, i)))
            size = max(size, begin + bytes)
            places[i].append(-1 - begin)
    return Plan(places, size)


chain_p = Primitive("flashmla_chain")
chain_p.multiple_results = True
chain_p.def_impl(partial(xla.apply_primitive, chain_p))
chain_p.def_abstract_eval(_types)
batching.primitive_batchers[chain_p] = _batch
ad.primitive_jvps[chain_p] = _no_derivative
for _platform in PLATFORMS:
    mlir.register_lowering(chain_p, partial(_lower, _platform), platform=_platform)
mlir.register_lowering(chain_p, partial(_lower, "this platform"))
