"""The demo's second opinion: attention over plain arrays in float32, without pages or kernels."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# An output may differ by this many units in the last place of its row's largest value: one for
# rounding out, one for the rounding of the weights before P.V on tensor cores.
OUT_TOLERANCE_ULPS = 2.0
LSE_TOLERANCE = 2e-4  # of 1 + |lse|: both sides sum in float32, in different orders


class Errors(NamedTuple):
    """The worst disagreement of one step; NaN anywhere makes it NaN."""

    out_absolute: jax.Array  # f32
    out_relative: jax.Array  # f32, of the largest value in the same row of out
    lse: jax.Array  # f32, of 1 + |lse|

    def acceptable(self, dtype: DTypeLike) -> bool:
        """Whether rounding explains them."""
        out_tolerance = OUT_TOLERANCE_ULPS * float(jnp.finfo(dtype).eps)
        return float(self.out_relative) <= out_tolerance and float(self.lse) <= LSE_TOLERANCE


@partial(jax.jit, donate_argnames="history")
def add_rows(
    history: jax.Array, rows: jax.Array, positions: jax.Array, num_new: jax.Array
) -> jax.Array:
    """Adds cache rows to a plain array of all rows so far.

    Args:
        history: [layers, b, max_tokens, d_qk].
        rows: [layers, b, s_new, d_qk].
        positions: [b] int32, token position of each sequence's first new row.
        num_new: [b] int32, how many of the s_new rows to add.
    """
    b, s_new = rows.shape[1:3]
    step = jnp.arange(s_new)[None]
    token = jnp.where(step < num_new[:, None], positions[:, None] + step, history.shape[2])
    return history.at[:, jnp.arange(b)[:, None], token].set(rows, mode="drop")


@partial(jax.jit, static_argnames=("d_v", "sm_scale"))
def step_errors(
    history: jax.Array,
    lengths: jax.Array,
    q: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    *,
    d_v: int,
    sm_scale: float,
) -> Errors:
    """Attends naively and compares.

    Args:
        history: [layers, b, max_tokens, d_qk], the rows of this step included.
        lengths: [b] int32, tokens to attend to.
        q: [layers, b, h_q, d_qk].
        out: [layers, b, h_q, d_v], to be judged.
        lse: [layers, b, h_q] f32, to be judged.
    """

    def layer_errors(layer: tuple[jax.Array, ...]) -> Errors:
        rows, q, out, lse = (x.astype(jnp.float32) for x in layer)
        with jax.default_matmul_precision("highest"):
            scores = jnp.einsum("bhd,btd->bht", q, rows) * sm_scale
            attended = jnp.arange(rows.shape[1])[None, None] < lengths[:, None, None]
            scores = jnp.where(attended, scores, -jnp.inf)
            expected_lse = jax.nn.logsumexp(scores, axis=-1)
            weights = jnp.exp(scores - expected_lse[..., None])
            expected = jnp.einsum("bht,btd->bhd", weights, rows[..., :d_v])
        difference = jnp.abs(out - expected).max(axis=-1)
        largest = jnp.abs(expected).max(axis=-1)
        lse_difference = jnp.abs(lse - expected_lse) / (1 + jnp.abs(expected_lse))
        return Errors(difference.max(), (difference / largest).max(), lse_difference.max())

    worst = jax.lax.map(layer_errors, (history, q, out, lse))
    return jax.tree.map(jnp.max, worst)
