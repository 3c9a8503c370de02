"""An operation as a JAX primitive: one mechanism for all of them, which knows none by name.

An operation's file in `ops/` describes it and so registers it: `Operation(...)`. What follows from
that is here: the primitive, result types under shard_map, the vmap rule, the error under
differentiation, and a lowering per platform (cpu and cuda to an XLA FFI handler, anything else to
the reference).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import NamedSharding, PartitionSpec

from jax_flashmla._xla.dispatch import PLATFORMS, platform_refusal, warn_once

_operations: dict[str, Operation] = {}


def operation_of(primitive: Primitive) -> Operation | None:
    """The operation whose primitive it is."""
    operation = _operations.get(primitive.name.removeprefix("flashmla_"))
    return operation if operation is not None and operation.primitive is primitive else None


def targets() -> list[str]:
    """The custom-call targets of all operations."""
    return [operation.target for operation in _operations.values()]


class Operation:
    """An operation past all checks. Called eagerly it is compiled as a whole, so that its workspace
    is never returned; under a trace it is inlined.

    Args:
        name: its stem; the custom call is `flashmla_<name>_v1`.
        static: names of its static parameters.
        results: shapes and dtypes of results, then of workspace, from operands' types and the
            parameters: `results(*operands, **params) -> [(shape, dtype), ...]`.
        num_results: how many of them are results.
        reference: the pure-JAX twin, `reference(*operands, **params)`, a sequence of the results.
        batch: the vmap rule, `batch(operands, dims, implementation=, **params)`.
        attributes: the handler's attributes from the parameters.
        refusal: why the Hopper kernels do not take a call, or None:
            `refusal(*operands, **params)`.
        aliases: results that take over an operand's buffer, by operand.
        left_to_xla: platforms on which the reference is faster than the handler, which then has to
            be asked for.
        invariant: the mesh axis over whose devices results are the same, from the parameters.
        made_of: the operands that a result depends on, by result, where it is not all of them.
        chained: whether a chain (chain_call.py) may have it.
    """

    def __init__(
        self,
        name: str,
        *,
        static: Sequence[str],
        results: Callable[..., list[tuple[tuple[int, ...], Any]]],
        num_results: int,
        reference: Callable[..., Sequence[jax.Array]],
        batch: Callable[..., Any],
        attributes: Callable[..., dict[str, Any]] = lambda **_: {},
        refusal: Callable[..., str | None] = lambda *_, **__: None,
        aliases: dict[int, int] | None = None,
        left_to_xla: Sequence[str] = (),
        invariant: Callable[..., str | None] = lambda **_: None,
        made_of: dict[int, Sequence[int]] | None = None,
        chained: bool = False,
    ):
        self.name, self.target = name, f"flashmla_{name}_v1"
        self.primitive = Primitive(f"flashmla_{name}")
        self._results, self._num_results = results, num_results
        self._reference, self._attributes = reference, attributes
        self._refusal, self.aliases = refusal, aliases or {}
        self._made_of = made_of or {}
        self.chained = chained
        self._left_to_xla = tuple(left_to_xla)
        self._invariant = invariant
        self._call = jax.jit(self._run, inline=True, static_argnames=(*static, "implementation"))
        self._register(batch)
        _operations[name] = self

    def __call__(
        self, *operands: jax.Array, implementation: str | None, **params: Any
    ) -> Sequence[jax.Array]:
        return self._call(*operands, implementation=implementation, **params)

    def bind(self, *operands: jax.Array, **params: Any) -> list[jax.Array]:
        """Results and workspace, for vmap rules."""
        return self.primitive.bind(*operands, **params)

    def _run(
        self, *operands: jax.Array, implementation: str | None, **params: Any
    ) -> Sequence[jax.Array]:
        if implementation == "xla":
            return self._reference(*operands, **params)
        results = self.bind(*operands, implementation=implementation, **params)
        return results[: self._num_results]

    def _register(self, batch: Callable[..., Any]) -> None:
        primitive = self.primitive
        primitive.multiple_results = True
        primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
        primitive.def_abstract_eval(self.types)
        batching.primitive_batchers[primitive] = batch
        ad.primitive_jvps[primitive] = self.no_derivative
        for platform in PLATFORMS:
            lower = functools.partial(self._lower, platform)
            mlir.register_lowering(primitive, lower, platform=platform)
        mlir.register_lowering(primitive, functools.partial(self._lower, "this platform"))

    def types(self, *operands: Any, implementation: str | None, **params: Any) -> list[Any]:
        """Of results and workspace."""
        check_unsharded(self.name, operands)
        types = self._results(*operands, **params)
        invariant = self._invariant(**params)
        return [
            result_type(
                [operands[j] for j in self._made_of.get(i, range(len(operands)))],
                shape,
                dtype,
                invariant,
            )
            for i, (shape, dtype) in enumerate(types)
        ]

    def no_derivative(self, *_: Any, **__: Any) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            f"{self.name} cannot be differentiated: its kernels are for inference. To "
            f'differentiate, call {self.name}(..., implementation="xla"), which is pure JAX.'
        )

    def attributes(self, *, implementation: str | None, **params: Any) -> dict[str, Any]:
        """The handler's."""
        del implementation
        return self._attributes(**params)

    def refusal(
        self, platform: str, *operands: Any, implementation: str | None, **params: Any
    ) -> str | None:
        """Why the handler does not take a call on a platform; None where it does."""
        refusal = platform_refusal(platform)
        if refusal is None and platform == "cuda":
            refusal = self._refusal(*operands, **params)
        return refusal

    def is_handled(self, platform: str, *operands: Any, **params: Any) -> bool:
        """Whether a call becomes one of the handler."""
        left = platform in self._left_to_xla and params["implementation"] is None
        return not left and self.refusal(platform, *operands, **params) is None

    def _lower(self, platform: str, ctx: Any, *args: Any, **params: Any) -> Any:
        implementation = params["implementation"]
        if self.is_handled(platform, *ctx.avals_in, **params):
            call = jax.ffi.ffi_lowering(self.target, operand_output_aliases=self.aliases or None)
            return call(ctx, *args, **self.attributes(**params))
        refusal = self.refusal(platform, *ctx.avals_in, **params)
        del params["implementation"]
        if platform == "cpu" and refusal is not None:
            raise ImportError(f"{self.name} cannot run: {refusal}; reinstall jax_flashmla")
        if implementation == "kernel":
            raise NotImplementedError(f'{self.name} with implementation="kernel": {refusal}')
        if platform == "cuda":
            warn_once(f"jax_flashmla runs its pure-JAX reference: {refusal}")
        workspace = ctx.avals_out[self._num_results :]

        def reference(*operands: jax.Array, **params: Any) -> list[jax.Array]:
            unused = [jnp.zeros(aval.shape, aval.dtype) for aval in workspace]
            return [*self._reference(*operands, **params), *unused]

        return mlir.lower_fun(reference, multiple_results=True)(ctx, *args, **params)


def check_unsharded(operation: str, operands: Sequence[Any]) -> None:
    """Refuses operands sharded over explicit mesh axes: XLA cannot partition a custom call."""
    for operand in operands:
        if any(axis is not None for axis in operand.sharding.spec):
            raise ValueError(
                f"{operation} must be called inside jax.shard_map where its operands are sharded "
                f"over an explicit mesh, got an operand {operand}: jax_flashmla.decode_specs gives "
                "the specs"
            )


def result_type(
    operands: Sequence[Any], shape: tuple[int, ...], dtype: Any, invariant: str | None
) -> Any:
    """A result varies over every manual mesh axis (shard_map) that any operand varies over, but
    for the invariant one."""
    axes = operands[0].manual_axis_type
    varying = frozenset().union(*(x.manual_axis_type.varying for x in operands))
    return operands[0].update(
        shape=shape,
        dtype=jnp.dtype(dtype),
        weak_type=False,
        sharding=NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec()),
        manual_axis_type=type(axes)(varying=varying - {invariant}),
    )
