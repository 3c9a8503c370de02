"""A second opinion: attention over plain arrays in float32, without pages or kernels."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# An output may differ by this many units in the last place of its row's largest value: one for
# rounding out, one for the rounding of the weights before P.V on tensor cores.
OUT_TOLERANCE_ULPS = 2.0
# Of float32 outputs: the weights' relative error is the absolute one of scores, which are sums of
# hundreds of rounded products and some tens large.
FLOAT32_OUT_TOLERANCE = 1e-4
LSE_TOLERANCE = 2e-4  # of 1 + |lse|: both sides sum in float32, in different orders


def attend(
    q: jax.Array, rows: jax.Array, lengths: jax.Array, *, d_v: int, sm_scale: float
) -> tuple[jax.Array, jax.Array]:
    """Attends to the first lengths[i] rows of each sequence.

    Args:
        q: [b, h_q, d_qk].
        rows: [b, tokens, d_qk], keys; their first d_v columns are the values.
        lengths: [b] int32, at least 1.

    Returns:
        out [b, h_q, d_v] f32, lse [b, h_q] f32 (natural log).
    """
    q, rows = q.astype(jnp.float32), rows.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("bhd,btd->bht", q, rows) * sm_scale
        attended = jnp.arange(rows.shape[1])[None, None] < lengths[:, None, None]
        scores = jnp.where(attended, scores, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.exp(scores - lse[..., None])
        return jnp.einsum("bht,btd->bhd", weights, rows[..., :d_v]), lse


class Errors(NamedTuple):
    """The worst disagreement of one step; NaN anywhere makes it NaN."""

    out_absolute: jax.Array  # f32
    out_relative: jax.Array  # f32, of the largest value in the same row of out
    lse: jax.Array  # f32, of 1 + |lse|

    def acceptable(self, dtype: DTypeLike) -> bool:
        """Whether rounding explains them."""
        out_tolerance = (
            FLOAT32_OUT_TOLERANCE
            if jnp.dtype(dtype) == jnp.float32
            else OUT_TOLERANCE_ULPS * float(jnp.finfo(dtype).eps)
        )
        return float(self.out_relative) <= out_tolerance and float(self.lse) <= LSE_TOLERANCE


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
    """Attends naively in every layer and compares.

    Args:
        history: [layers, b, max_tokens, d_qk], the rows of this step included.
        lengths: [b] int32, tokens to attend to.
        q: [layers, b, h_q, d_qk].
        out: [layers, b, h_q, d_v], to be judged.
        lse: [layers, b, h_q] f32, to be judged.
    """

    def layer_errors(layer: tuple[jax.Array, ...]) -> Errors:
        rows, q, out, lse = layer
        expected, expected_lse = attend(q, rows, lengths, d_v=d_v, sm_scale=sm_scale)
        difference = jnp.abs(out.astype(jnp.float32) - expected).max(axis=-1)
        largest = jnp.abs(expected).max(axis=-1)
        lse_difference = jnp.abs(lse - expected_lse) / (1 + jnp.abs(expected_lse))
        return Errors(difference.max(), (difference / largest).max(), lse_difference.max())

    worst = jax.lax.map(layer_errors, (history, q, out, lse))
    return jax.tree.map(jnp.max, worst)
