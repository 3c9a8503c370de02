"""Attention over the rows of a paged cache that indices name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla._num_parts import sparse_num_parts
from jax_flashmla._sparse_source import as_source
from jax_flashmla._xla import vmap
from jax_flashmla._xla.operation import Operation
from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.ops.make_schedule import (
    SplitSchedule,
    check_schedule,
    make_schedule,
    uncut,
)
from jax_flashmla.reference.sparse import Source
from jax_flashmla.reference.sparse import sparse_decode as reference

if TYPE_CHECKING:
    from jax.typing import ArrayLike, DTypeLike


def sparse_decode(
    q: jax.Array,
    blocks: jax.Array,
    indices: jax.Array,
    *,
    format: CacheFormat | None = None,
    d_v: int = 512,
    sm_scale: float | None = None,
    topk_length: jax.Array | None = None,
    attn_sink: jax.Array | None = None,
    first_block: ArrayLike = 0,
    layer_blocks: int | None = None,
    extra_blocks: jax.Array | None = None,
    extra_indices: jax.Array | None = None,
    extra_format: CacheFormat | None = None,
    extra_topk_length: jax.Array | None = None,
    extra_first_block: ArrayLike = 0,
    extra_layer_blocks: int | None = None,
    kv_scale: ArrayLike | None = None,
    schedule: SplitSchedule | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of each query token to the rows of a paged cache that its indices name.

    `out = softmax(sm_scale * q . keys) . values` with float32 accumulation, over the rows of one
    cache, or of a main and an extra one together. A cache row is a key, and its first d_v columns
    are the value; all heads read the same rows. A row named twice counts twice. The same inputs
    give the same bits on the same device.

    Args:
        q: [b, s_q, h_q, d_qk] bfloat16, float16 or float32; b * s_q * h_q below 2^31.
        blocks: [num_blocks, block_size, 1, d_qk] in q's dtype. With a format
            [num_blocks, *format.block_shape] in its storage_dtype.
        indices: [b, s_q, topk] int32 slots `block * block_size + offset`, counted from the layer's
            first block. One outside the layer is not attended and never read.
        format: how blocks are stored: any format but "v41_fp4" and "fp8_index"; by default dense,
            as the array is.
        d_v: columns of a value, at most d_qk.
        sm_scale: scale of the scores, finite and positive; by default d_qk ** -0.5.
        topk_length: [b] or [b, s_q] int32, how many of a query token's leftmost indices count,
            clamped to [0, topk]; what follows may be anything. By default all.
        attn_sink: [h_q] float32, natural log: out is multiplied by
            `exp(lse) / (exp(lse) + exp(attn_sink))`, lse is not. -inf is no sink, which is the
            default; inf makes out 0.
        first_block: the layer's first block in the array, where several layers share it; a Python
            int, or a traced integer, which is clamped to the array.
        layer_blocks: blocks of the layer, by default all of the array. layer_blocks * block_size
            is at most 2^31 - 1.
        extra_blocks, extra_indices, extra_format, extra_topk_length, extra_first_block,
            extra_layer_blocks: the same of the extra cache, which has the main one's d_qk.
            Formats go together as dense + dense, v4 + v4, v41 + v41 and v41 + v41_fp4.
        kv_scale: [] float32, what the codes of an "fp8_row" cache are multiplied with; by default
            1.
        schedule: from `make_schedule` for b * s_q sequences, one for each query token, of 64 *
            (ceil(topk_length / 64) + ceil(extra_topk_length / 64)) tokens; made here by default.
            Above 16384 query tokens the one made here cuts none of them.
        implementation: None for the platform's best, "kernel" to insist on the handler, "xla" for
            pure JAX, which can be differentiated. The Hopper kernel takes 16-bit queries
            and d_v = 512.

    Returns:
        out: [b, s_q, h_q, d_v] in q's dtype, 0 in a row with nothing to attend.
        lse: [b, s_q, h_q] float32, natural log; -inf in a row with nothing to attend.

    Raises:
        TypeError, ValueError: an argument is not as described.
        NotImplementedError: implementation is "kernel" and there is none for this platform, device
            or these formats; or the kernel is differentiated.
    """
    b, s_q, h_q, d_qk = _checks.check_query(q)
    d_v = _checks.check_int("d_v", d_v, 1, _limits.INT32_MAX)
    if d_v > d_qk:
        raise ValueError(
            f"d_v must be at most d_qk = {d_qk} (a value is a row's first d_v columns), got {d_v}"
        )
    main = as_source("", q, blocks, indices, topk_length, first_block, format, layer_blocks)
    if main.format.name not in MAIN_FORMATS:
        raise ValueError(
            f"format must be {_checks.one_of(MAIN_FORMATS)} for sparse_decode, got "
            f"{main.format.name}"
        )
    extra = None
    if extra_blocks is None:
        _refuse_extra(
            extra_indices=extra_indices,
            extra_format=extra_format,
            extra_topk_length=extra_topk_length,
            extra_layer_blocks=extra_layer_blocks,
        )
        if not isinstance(extra_first_block, int | np.integer) or extra_first_block != 0:
            raise ValueError(
                "extra_first_block must be 0 without extra_blocks, got "
                f"{_checks.short(extra_first_block)}"
            )
    else:
        extra = as_source(
            "extra_",
            q,
            extra_blocks,
            extra_indices,
            extra_topk_length,
            extra_first_block,
            extra_format,
            extra_layer_blocks,
        )
        if (main.format.name, extra.format.name) not in PAIRS:
            pairs = _checks.one_of(f"{x} + {y}" for x, y in PAIRS)
            raise ValueError(
                f"format and extra_format must be {pairs}, got {main.format.name} + "
                f"{extra.format.name}"
            )
    if sm_scale is not None:
        _checks.check_number("sm_scale", sm_scale)
    kv_scale = _checks.as_kv_scale(kv_scale, main.format.name)
    _checks.check_implementation(implementation)
    if schedule is None:
        sources = (main,) if extra is None else (main, extra)
        cuts = _make_cuts(
            [source.topk_length for source in sources],
            [source.indices.shape[-1] for source in sources],
            h_q,
            is_narrow(q.dtype, main.format, None if extra is None else extra.format),
            implementation,
        )
    else:
        tokens = f"q's b * s_q = {b * s_q} query tokens"
        cuts = check_schedule(schedule, b * s_q, made_for=tokens).cuts
    out, lse = sparse_op(
        q,
        *main[:4],
        *(main if extra is None else extra)[:4],
        _checks.as_sink(attn_sink, h_q),
        kv_scale,
        cuts,
        format=main.format,
        layer_blocks=main.layer_blocks,
        extra_format=None if extra is None else extra.format,
        extra_layer_blocks=0 if extra is None else extra.layer_blocks,
        d_v=d_v,
        sm_scale=float(d_qk**-0.5 if sm_scale is None else sm_scale),
        implementation=implementation,
    )
    return out, lse


MAIN_FORMATS = ("dense", "v32", "v32_nope", "v4", "v41", "fp8_row")
PAIRS = (("dense", "dense"), ("v4", "v4"), ("v41", "v41"), ("v41", "v41_fp4"))


def sm90_refusal(
    dtype: DTypeLike, format: CacheFormat, extra_format: CacheFormat | None, d_v: int
) -> str | None:
    """Why the Hopper kernel does not take a call; None where it does."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the sm90 kernels of sparse_decode take bfloat16 and float16, got {dtype}"
    for cache in (format, extra_format):
        stride = None if cache is None or cache.name != "dense" else cache.row_stride
        if stride is not None and stride % 8 != 0:
            return (
                "the sm90 kernels of sparse_decode take rows a multiple of 8 columns wide, got "
                f"{stride}"
            )
    if format.d_qk not in (512, 576) or d_v != 512:
        return (
            "the sm90 kernels of sparse_decode take d_qk = 512 or 576 and d_v = 512, got "
            f"d_qk = {format.d_qk} and d_v = {d_v}"
        )
    return None


def is_narrow(dtype: DTypeLike, format: CacheFormat, extra_format: CacheFormat | None) -> bool:
    """Whether the Hopper kernels have tiles of 16 and 32 heads too.

    These are the narrow kernel's, as `is_narrow` in csrc/sm90/sparse_decode/launch.cu says.
    """
    return (format.name, extra_format) == ("v32", None) and dtype == jnp.bfloat16


def _refuse_extra(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None without extra_blocks, got a {type(value).__name__}"
            )


def _make_cuts(
    topk_lengths: list[jax.Array],
    topks: list[int],
    h_q: int,
    small_tiles: bool,
    implementation: str | None,
) -> jax.Array:
    """[num_parts + 1, 2] for topk_lengths [b, s_q] of each cache."""
    n, tile = topk_lengths[0].size, _limits.SPLIT_TILE
    most_tiles = sum(-(-topk // tile) for topk in topks)  # of a query token
    num_parts = sparse_num_parts(tiles=n * most_tiles, h_q=h_q, small_tiles=small_tiles)
    if n > _limits.MAX_BATCH:  # as many whole query tokens to each part
        return uncut(n, num_parts)
    tiles = sum(
        -(-jnp.clip(length, 0, topk) // tile)
        for length, topk in zip(topk_lengths, topks, strict=True)
    )
    tokens = jnp.minimum(tiles, _limits.INT32_MAX // tile).reshape(n) * tile
    schedule = make_schedule(tokens, h_q=h_q, num_parts=num_parts, implementation=implementation)
    return schedule.cuts


def _refusal(q: Any, *_: Any, format: Any, extra_format: Any, d_v: int, **__: Any) -> str | None:
    return sm90_refusal(q.dtype, format, extra_format, d_v)


def _results(q: Any, *operands: Any, d_v: int, **_: Any) -> list[tuple[tuple[int, ...], Any]]:
    rows, h_q = q.shape[:-1], q.shape[2]
    slots = 2 * (operands[-1].shape[0] - 1)
    return [
        ((*rows, d_v), q.dtype),
        (rows, jnp.float32),
        ((slots, h_q, d_v), jnp.float32),  # workspace
        ((slots, h_q), jnp.float32),  # workspace
    ]


def _reference(
    *operands: jax.Array,
    format: CacheFormat,
    layer_blocks: int,
    extra_format: CacheFormat | None,
    extra_layer_blocks: int,
    **params: Any,
) -> tuple[jax.Array, jax.Array]:
    q, blocks, indices, lengths, first, *extra, attn_sink, kv_scale, cuts = operands
    del cuts  # how work is divided changes nothing
    sources = [Source(blocks, indices, lengths, first, format, layer_blocks)]
    if extra_format is not None:
        blocks, indices, lengths, first = extra
        sources.append(Source(blocks, indices, lengths, first, extra_format, extra_layer_blocks))
    return reference(q, sources, attn_sink, kv_scale, **params)


def _batch(
    operands: tuple[jax.Array, ...],
    dims: vmap.Dims,
    *,
    format: CacheFormat,
    layer_blocks: int,
    extra_format: CacheFormat | None,
    extra_layer_blocks: int,
    implementation: str | None,
    **params: Any,
) -> tuple[list[jax.Array], list[int | None]]:
    n = vmap.mapped_size(operands, dims)
    params = {
        "format": format,
        "extra_format": extra_format,
        "implementation": implementation,
        **params,
    }
    layers = {"layer_blocks": layer_blocks, "extra_layer_blocks": extra_layer_blocks}
    q, cuts = operands[0], operands[-1]
    if all(d is None for d in dims[:-1]):  # no schedule changes what is computed
        assert dims[-1] is not None
        cuts = jax.lax.index_in_dim(cuts, 0, dims[-1], keepdims=False)
        return sparse_op.bind(*operands[:-1], cuts, **params, **layers), [None] * 4
    sources = [(operands[1:5], dims[1:5], format.block_size, layer_blocks)]
    if extra_format is not None:
        extra_block_size = extra_format.block_size
        sources.append((operands[5:9], dims[5:9], extra_block_size, extra_layer_blocks))
    if dims[9:11] != (None, None) or not all(vmap.slots_fit(n, *source) for source in sources):
        return _loop(operands, dims, {**params, **layers})
    q = vmap.fold(q, dims[0], n)
    rows = q.size // q.shape[-1]
    if rows > _limits.INT32_MAX:
        raise ValueError(
            "sparse_decode under vmap must have less than 2^31 query rows over the mapped axis (it "
            f"is folded into b), got {n} times {rows // n}"
        )
    folded = [vmap.fold_slots(n, *source) for source in sources]
    (main, layers["layer_blocks"]), (extra, extra_layer) = folded[0], folded[-1]
    if extra_format is not None:
        layers["extra_layer_blocks"] = extra_layer
    cuts = _make_cuts(
        [x[2] for x, _ in folded],
        [x[1].shape[-1] for x, _ in folded],
        q.shape[2],
        is_narrow(q.dtype, format, extra_format),
        implementation,
    )
    out, lse, *workspace = sparse_op.bind(
        q, *main, *extra, *operands[9:11], cuts, **params, **layers
    )
    return [vmap.unfold(out, n), vmap.unfold(lse, n), *workspace], [0, 0, None, None]


def _loop(
    operands: tuple[jax.Array, ...], dims: vmap.Dims, params: dict[str, Any]
) -> tuple[list[jax.Array], list[int | None]]:
    """One call after the other: where sinks or scales are mapped, or slots exceed int32."""
    out, lse = vmap.call_each(lambda *x: sparse_op.bind(*x, **params)[:2], operands, dims)
    workspace = [jnp.zeros((2, *out.shape[-2:]), jnp.float32), jnp.zeros((2, out.shape[-2]))]
    return [out, lse, *workspace], [0, 0, None, None]


def _attributes(
    *,
    format: CacheFormat,
    layer_blocks: int,
    extra_format: CacheFormat | None,
    extra_layer_blocks: int,
    sm_scale: float,
    **_: Any,
) -> dict[str, Any]:
    extra = format if extra_format is None else extra_format
    return {
        "sm_scale": np.float32(sm_scale),
        "format": np.int32(_limits.FORMATS[format.name]),
        "block_size": np.int32(format.block_size),
        "layer_blocks": np.int32(layer_blocks),
        "has_extra": extra_format is not None,
        "extra_format": np.int32(_limits.FORMATS[extra.name]),
        "extra_block_size": np.int32(extra.block_size),
        "extra_layer_blocks": np.int32(extra_layer_blocks),
    }


sparse_op = Operation(
    "sparse_decode",
    static=(
        "format",
        "layer_blocks",
        "extra_format",
        "extra_layer_blocks",
        "d_v",
        "sm_scale",
    ),
    results=_results,
    num_results=2,
    reference=_reference,
    batch=_batch,
    attributes=_attributes,
    refusal=_refusal,
    chained=True,
)
