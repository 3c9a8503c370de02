"""The operations as JAX primitives, and the handlers that run them.

One primitive per operation: its result types, its vmap and AD rules, and a lowering per platform
(cpu and cuda to an XLA FFI handler, anything else to the pure-JAX reference).
"""

from __future__ import annotations

import functools
import importlib
import pathlib
import re
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import NamedSharding, PartitionSpec

from jax_flashmla import _checks, _limits, reference
from jax_flashmla._num_parts import default_num_parts

TARGETS = {
    "make_schedule": "flashmla_make_schedule_v1",
    "dense_decode": "flashmla_dense_decode_v1",
    "cache_append": "flashmla_cache_append_v1",
}

make_schedule_p = Primitive("flashmla_make_schedule")
dense_decode_p = Primitive("flashmla_dense_decode")
cache_append_p = Primitive("flashmla_cache_append")
for _primitive in (make_schedule_p, dense_decode_p, cache_append_p):
    _primitive.multiple_results = True
    _primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))


# The operations, past all checks. Called eagerly they are compiled as a whole, so that dropped
# workspace is never returned; under a trace they are inlined.


@functools.partial(
    jax.jit, inline=True, static_argnames=("num_parts", "batch_invariant", "implementation")
)
def make_schedule(
    cache_seqlens: jax.Array, *, num_parts: int, batch_invariant: bool, implementation: str | None
) -> jax.Array:
    if batch_invariant or implementation == "xla":
        return reference.make_schedule(cache_seqlens, num_parts, whole=batch_invariant)
    return make_schedule_p.bind(cache_seqlens, num_parts=num_parts, implementation=implementation)[
        0
    ]


@functools.partial(
    jax.jit, inline=True, static_argnames=("d_v", "sm_scale", "causal", "implementation")
)
def dense_decode(
    q: jax.Array,
    blocks: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    cuts: jax.Array,
    *,
    d_v: int,
    sm_scale: float,
    causal: bool,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array]:
    if implementation == "xla":
        return reference.dense_decode(
            q, blocks, block_table, cache_seqlens, d_v=d_v, sm_scale=sm_scale, causal=causal
        )
    out, lse, _, _ = dense_decode_p.bind(
        q,
        blocks,
        block_table,
        cache_seqlens,
        cuts,
        d_v=d_v,
        sm_scale=sm_scale,
        causal=causal,
        implementation=implementation,
    )
    return out, lse


@functools.partial(jax.jit, inline=True, static_argnames=("implementation",))
def cache_append(
    blocks: jax.Array,
    rows: jax.Array,
    block_table: jax.Array,
    positions: jax.Array,
    num_new: jax.Array,
    *,
    implementation: str | None,
) -> jax.Array:
    if implementation == "xla":
        return reference.cache_append(blocks, rows, block_table, positions, num_new)
    return cache_append_p.bind(
        blocks, rows, block_table, positions, num_new, implementation=implementation
    )[0]


# Result types.


def _result_type(operands: tuple[Any, ...], shape: tuple[int, ...], dtype: Any) -> Any:
    """A result varies over every manual mesh axis (shard_map) that any operand varies over."""
    axes = operands[0].manual_axis_type
    return operands[0].update(
        shape=shape,
        dtype=jnp.dtype(dtype),
        weak_type=False,
        sharding=NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec()),
        manual_axis_type=type(axes)(
            varying=frozenset().union(*(x.manual_axis_type.varying for x in operands))
        ),
    )


def _make_schedule_types(*operands: Any, num_parts: int, **_: Any) -> list[Any]:
    return [_result_type(operands, (num_parts + 1, 2), jnp.int32)]


def _dense_decode_types(*operands: Any, d_v: int, **_: Any) -> list[Any]:
    q, _, _, _, cuts = operands
    rows = q.shape[:-1]
    pieces = (2 * (cuts.shape[0] - 1), *rows[1:])
    return [
        _result_type(operands, (*rows, d_v), q.dtype),
        _result_type(operands, rows, jnp.float32),
        _result_type(operands, (*pieces, d_v), jnp.float32),  # workspace
        _result_type(operands, pieces, jnp.float32),  # workspace
    ]


def _cache_append_types(*operands: Any, **_: Any) -> list[Any]:
    return [_result_type(operands, operands[0].shape, operands[0].dtype)]


make_schedule_p.def_abstract_eval(_make_schedule_types)
dense_decode_p.def_abstract_eval(_dense_decode_types)
cache_append_p.def_abstract_eval(_cache_append_types)


# vmap: the mapped axis, of size n, is folded into b.


def _mapped_size(operands: tuple[jax.Array, ...], dims: tuple[int | None, ...]) -> int:
    return next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)


def _fold(x: jax.Array, dim: int | None, n: int) -> jax.Array:
    """[b, ...] per mapped index as [n * b, ...]."""
    x = jnp.broadcast_to(x, (n, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
    return x.reshape(n * x.shape[1], *x.shape[2:])


def _unfold(x: jax.Array, n: int) -> jax.Array:
    return x.reshape(n, x.shape[0] // n, *x.shape[1:])


def _fold_blocks(
    blocks: jax.Array, dim: int | None, block_table: jax.Array, n: int
) -> tuple[jax.Array, jax.Array]:
    """n caches as one, and the table [n * b, max_blocks] with ids into it.

    An id that was out of range stays so: it must not reach into another cache.
    """
    num_blocks = blocks.shape[0 if dim != 0 else 1]
    if n * num_blocks > _limits.INT32_MAX:
        raise ValueError(
            "blocks under vmap must hold at most 2^31 - 1 blocks over the mapped axis, got "
            f"{n} times {num_blocks}"
        )
    first = jnp.arange(n, dtype=jnp.int32) * num_blocks
    in_range = (block_table >= 0) & (block_table < num_blocks)
    ids = block_table + jnp.repeat(first, block_table.shape[0] // n)[:, None]
    return _fold(blocks, dim, n), jnp.where(in_range, ids, -1)


def _check_folded(operation: str, n: int, b: int) -> None:
    if n * b > _limits.MAX_BATCH:
        raise ValueError(
            f"{operation} under vmap must have at most {_limits.MAX_BATCH} sequences over the "
            f"mapped axis (it is folded into b), got {n} times b = {b}"
        )


def _make_schedule_batch(
    operands: tuple[jax.Array], dims: tuple[int], *, num_parts: int, implementation: str | None
) -> tuple[list[jax.Array], list[int | None]]:
    # The schedules of n batches are not one schedule of a longer batch. dense_decode's rule below
    # makes the one that it needs, so these are seldom used: the reference, which gives the same
    # cuts, will do.
    del implementation
    one = functools.partial(reference.make_schedule, num_parts=num_parts)
    return [jax.vmap(one, in_axes=dims[0])(operands[0])], [0]


def _dense_decode_batch(
    operands: tuple[jax.Array, ...],
    dims: tuple[int | None, ...],
    *,
    implementation: str | None,
    **params: Any,
) -> tuple[list[jax.Array], list[int | None]]:
    q, blocks, block_table, cache_seqlens, cuts = operands
    q_dim, blocks_dim, table_dim, seqlens_dim, cuts_dim = dims
    bind = functools.partial(dense_decode_p.bind, implementation=implementation, **params)
    n = _mapped_size(operands, dims)
    if cuts_dim is not None:
        cuts = jax.lax.index_in_dim(cuts, 0, cuts_dim, keepdims=False)
        if all(d is None for d in dims[:4]):  # no schedule changes what is computed
            return bind(q, blocks, block_table, cache_seqlens, cuts), [None] * 4
    q, block_table, cache_seqlens = (
        _fold(q, q_dim, n),
        _fold(block_table, table_dim, n),
        _fold(cache_seqlens, seqlens_dim, n),
    )
    b = q.shape[0] // n
    _check_folded("dense_decode", n, b)
    if blocks_dim is not None:
        blocks, block_table = _fold_blocks(blocks, blocks_dim, block_table, n)
    # n small problems may be a large one, and want as many parts as it.
    default = functools.partial(
        default_num_parts,
        s_q=q.shape[1],
        h_q=q.shape[2],
        h_kv=blocks.shape[2],
        max_seqlen=block_table.shape[1] * blocks.shape[1],
    )
    num_parts = cuts.shape[0] - 1
    if num_parts == default(b=b):
        num_parts = default(b=n * b)
    (cuts,) = make_schedule_p.bind(
        cache_seqlens, num_parts=num_parts, implementation=implementation
    )
    out, lse, *workspace = bind(q, blocks, block_table, cache_seqlens, cuts)
    return [_unfold(out, n), _unfold(lse, n), *workspace], [0, 0, None, None]


def _cache_append_batch(
    operands: tuple[jax.Array, ...], dims: tuple[int | None, ...], *, implementation: str | None
) -> tuple[list[jax.Array], list[int | None]]:
    blocks, rows, block_table, positions, num_new = operands
    n = _mapped_size(operands, dims)
    rows, block_table, positions, num_new = (
        _fold(x, d, n)
        for x, d in zip((rows, block_table, positions, num_new), dims[1:], strict=True)
    )
    _check_folded("cache_append", n, rows.shape[0] // n)
    blocks, block_table = _fold_blocks(blocks, dims[0], block_table, n)
    (blocks,) = cache_append_p.bind(
        blocks, rows, block_table, positions, num_new, implementation=implementation
    )
    return [_unfold(blocks, n)], [0]


batching.primitive_batchers[make_schedule_p] = _make_schedule_batch
batching.primitive_batchers[dense_decode_p] = _dense_decode_batch
batching.primitive_batchers[cache_append_p] = _cache_append_batch


# Differentiation.


def _no_derivative(operation: str, *_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        f"{operation} cannot be differentiated: its kernels are for inference. To differentiate, "
        f'call {operation}(..., implementation="xla"), which is pure JAX.'
    )


ad.primitive_jvps[dense_decode_p] = functools.partial(_no_derivative, "dense_decode")
ad.primitive_jvps[cache_append_p] = functools.partial(_no_derivative, "cache_append")


# The modules with the handlers. A CPU-only build has no _cuda.


def _installed_ffi_version() -> tuple[int, int] | None:
    """The version of XLA's FFI in the installed jaxlib, read off the header that it ships."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    if not header.is_file():
        return None
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header.read_text()))
    return int(found["MAJOR"]), int(found["MINOR"])


def _load(name: str, platform: str) -> tuple[ModuleType | None, str]:
    """A module with its handlers registered, or None and the reason."""
    try:
        module = importlib.import_module(f"jax_flashmla.{name}")
    except ImportError as error:
        return None, str(error)
    built, installed = module.ffi_api_version(), _installed_ffi_version()
    if installed is not None and (built[0] != installed[0] or built[1] > installed[1]):
        raise ImportError(
            f"jax_flashmla.{name} was built for XLA FFI {built[0]}.{built[1]}, but jaxlib "
            f"{jax.lib.__version__} has {installed[0]}.{installed[1]}: install a newer jaxlib, or "
            "reinstall jax_flashmla from source next to this one"
        )
    for target, handler in module.registrations().items():
        jax.ffi.register_ffi_target(target, handler, platform=platform)
    return module, ""


_cpu, _cpu_missing = _load("_cpu", "cpu")
_cuda, _cuda_missing = _load("_cuda", "CUDA")


def kernel_refusal(
    platform: str,
    *,
    d_qk: int = 576,
    d_v: int = 512,
    block_size: int = 64,
    dtype: Any = jnp.bfloat16,
) -> str | None:
    """Why this installation does not run the kernels on this platform; None where it does.

    Where there is no CUDA device, "cuda" is answered for a machine that has the right one: code is
    lowered here to run there.
    """
    if platform == "cpu":
        return None if _cpu else f"the CPU module cannot be imported ({_cpu_missing})"
    if platform != "cuda":
        return f"there are kernels for cpu and cuda, not for {platform}"
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        device = None
    if device is not None:
        if not _cuda:
            return f"the CUDA module cannot be imported ({_cuda_missing})"
        if device.compute_capability != "9.0":
            return (
                "the CUDA kernels need compute capability 9.0 (Hopper), got "
                f"{device.compute_capability} ({device.device_kind})"
            )
    return _checks.sm90_refusal(d_qk, d_v, block_size, dtype)


# Lowering.


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _no_attributes(**_: Any) -> dict[str, Any]:
    return {}


def _dense_decode_attributes(*, sm_scale: float, causal: bool, **_: Any) -> dict[str, Any]:
    return {"sm_scale": np.float32(sm_scale), "causal": bool(causal)}


def _dense_decode_dimensions(q: Any, blocks: Any, *_: Any, d_v: int, **__: Any) -> dict[str, Any]:
    return {
        "d_qk": q.shape[-1],
        "d_v": d_v,
        "block_size": blocks.shape[1],
        "dtype": q.dtype,
    }


def _no_dimensions(*_: Any, **__: Any) -> dict[str, Any]:
    return {}


def _register(
    operation: str,
    primitive: Primitive,
    reference_rule: Callable[..., Any],
    *,
    attributes: Callable[..., dict[str, Any]] = _no_attributes,
    dimensions: Callable[..., dict[str, Any]] = _no_dimensions,
    aliases: dict[int, int] | None = None,
) -> None:
    """Lowers a primitive to its handler where there is one that takes it, else to the reference."""
    target = TARGETS[operation]

    def lower(
        platform: str, ctx: Any, *args: Any, implementation: str | None, **params: Any
    ) -> Any:
        refusal = kernel_refusal(platform, **dimensions(*ctx.avals_in, **params))
        if refusal is None:
            call = jax.ffi.ffi_lowering(target, operand_output_aliases=aliases)
            return call(ctx, *args, **attributes(**params))
        if platform == "cpu":
            raise ImportError(f"{operation} cannot run: {refusal}; reinstall jax_flashmla")
        if implementation == "kernel":
            raise NotImplementedError(f'{operation} with implementation="kernel": {refusal}')
        if platform == "cuda":
            _warn_once(f"jax_flashmla runs its pure-JAX reference: {refusal}")
        return reference_rule(ctx, *args, **params)

    for platform in ("cpu", "cuda"):
        mlir.register_lowering(primitive, functools.partial(lower, platform), platform=platform)
    mlir.register_lowering(primitive, functools.partial(lower, "this platform"))


def _reference_make_schedule(cache_seqlens: jax.Array, *, num_parts: int) -> list[jax.Array]:
    return [reference.make_schedule(cache_seqlens, num_parts)]


def _reference_dense_decode(*operands: jax.Array, **params: Any) -> list[jax.Array]:
    *inputs, cuts = operands
    out, lse = reference.dense_decode(*inputs, **params)
    pieces = (2 * (cuts.shape[0] - 1), *out.shape[1:])  # workspace, unused
    return [out, lse, jnp.zeros(pieces, jnp.float32), jnp.zeros(pieces[:-1], jnp.float32)]


def _reference_cache_append(*operands: jax.Array) -> list[jax.Array]:
    return [reference.cache_append(*operands)]


_register(
    "make_schedule",
    make_schedule_p,
    mlir.lower_fun(_reference_make_schedule, multiple_results=True),
)
_register(
    "dense_decode",
    dense_decode_p,
    mlir.lower_fun(_reference_dense_decode, multiple_results=True),
    attributes=_dense_decode_attributes,
    dimensions=_dense_decode_dimensions,
)
_register(
    "cache_append",
    cache_append_p,
    mlir.lower_fun(_reference_cache_append, multiple_results=True),
    aliases={0: 0},
)
