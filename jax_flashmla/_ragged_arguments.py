"""Rules on what the engines' call passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jax_flashmla import _checks

if TYPE_CHECKING:
    from jax.typing import ArrayLike

_LANES = 128  # columns that the engines pad latent and rope to multiples of
_TUNING = (
    "mask_value",
    "chunk_prefill_size",
    "num_kv_pages_per_block",
    "num_queries_per_block",
    "decode_batch_size",
    "vmem_limit_bytes",
    "debug_mode",
)


def check_options(tuning: dict[str, Any], **refused: Any) -> None:
    for name, value in refused.items():
        if value is not None:
            raise NotImplementedError(
                f"{name} must be None: there is no kernel for it, got {value!r}"
            )
    for name in tuning:
        if name not in _TUNING:
            raise TypeError(f"mla_ragged_paged_attention() has no argument {name!r}")


def check_rows(
    ql_nope: Any, q_pe: Any, new_kv_c: Any, new_k_pe: Any, cache_kv: Any
) -> tuple[int, int]:
    """Columns of latent and rope."""
    _checks.refuse_foreign("cache_kv", cache_kv, "[pages, page_size / pack, pack, columns]")
    dtypes = _checks.CACHE_DTYPES
    shapes = {
        "ql_nope": _checks.check_array("ql_nope", ql_nope, "[T, n, 512]", dtypes),
        "q_pe": _checks.check_array("q_pe", q_pe, "[T, n, 64]", dtypes),
        "new_kv_c": _checks.check_array("new_kv_c", new_kv_c, "[T, 512]", dtypes),
        "new_k_pe": _checks.check_array("new_k_pe", new_k_pe, "[T, 64]", dtypes),
    }
    num_tokens, n, latent = shapes["ql_nope"]
    rope = shapes["q_pe"][-1]
    expected = {
        "q_pe": (num_tokens, n, rope),
        "new_kv_c": (num_tokens, latent),
        "new_k_pe": (num_tokens, rope),
    }
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(
                f"{name} must have shape {shape}, as ql_nope of {shapes['ql_nope']} and q_pe of "
                f"{shapes['q_pe']} have it, got {shapes[name]}"
            )
    if latent % _LANES:
        raise ValueError(
            f"ql_nope must have a multiple of {_LANES} columns, behind which the engines store the "
            f"rotary key, got {latent}"
        )
    arrays = {"ql_nope": ql_nope, "q_pe": q_pe, "new_kv_c": new_kv_c, "new_k_pe": new_k_pe}
    for name, x in arrays.items():
        if x.dtype != cache_kv.dtype and not _is_float8(cache_kv):
            raise TypeError(f"{name} must have cache_kv's dtype {cache_kv.dtype}, got {x.dtype}")
    return latent, rope


def _is_float8(cache_kv: Any) -> bool:
    return "float8" in jnp.dtype(cache_kv.dtype).name


def check_cache(cache_kv: Any, latent: int, rope: int, k_scale: Any) -> int:
    """Tokens of a page."""
    if _is_float8(cache_kv):
        if k_scale is None:
            raise ValueError(f"k_scale must be given for a cache_kv of {cache_kv.dtype}, got None")
        raise NotImplementedError(
            f"cache_kv must have dtype {_checks.dtype_names(_checks.CACHE_DTYPES)}, got "
            f'{cache_kv.dtype}: no kernel reads padded rows of 8 bits; CacheFormat(name="fp8_row") '
            "and dense_decode have them without padding"
        )
    shape = _checks.check_array(
        "cache_kv", cache_kv, "[pages, page_size / pack, pack, columns]", _checks.CACHE_DTYPES
    )
    columns = latent + -(-rope // _LANES) * _LANES
    if shape[3] == columns:
        return shape[1] * shape[2]
    if shape[1] * shape[2] == columns:
        raise ValueError(
            f"cache_kv must be [pages, page_size / pack, pack, {columns}], got {shape}: the "
            "transposed cache of tokamax's v3 kernels, in which a token's row is not contiguous"
        )
    raise ValueError(
        f"cache_kv must be [pages, page_size / pack, pack, {columns}] for {latent} latent and "
        f"{rope} rotary columns, each padded to a multiple of {_LANES}, got {shape}"
    )


def as_bounds(name: str, x: ArrayLike, max_seqs: int) -> jax.Array:
    bounds = _checks.as_int32(name, x, "[max_seqs + 1]")
    if bounds.shape != (max_seqs + 1,):
        raise ValueError(
            f"{name} must have kv_lens' max_seqs + 1 = {max_seqs + 1} entries, got shape "
            f"{bounds.shape}"
        )
    return bounds


def as_scale(name: str, value: Any) -> float:
    return 1.0 if value is None else _checks.check_number(name, value)
