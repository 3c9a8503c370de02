"""Mixture of experts: which experts a token goes to, and what they make of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deepseek.config import MoEConfig
from deepseek.float8 import Float8

TILES_AT_ONCE = 32  # copies of experts' weights that are made beside the model's


def matrix(rngs: nnx.Rngs, dtype: DTypeLike, *shape: int) -> nnx.Param:
    """A projection's weights, or a stack of them: [..., inputs, outputs].

    Its value is an array, or `Float8` where a checkpoint stores that.
    """
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * shape[-2] ** -0.5)


def swiglu(x: jax.Array, *weights: jax.Array | Float8) -> jax.Array:
    """down(silu(gate(x)) * up(x)): x [..., hidden], weights of gate, up and down."""
    gate, up, down = (w.astype(x.dtype) for w in weights)
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


class MLP(nnx.Module):
    """An ordinary MLP. x [..., hidden]."""

    def __init__(self, hidden: int, width: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.gate_proj = matrix(rngs, dtype, hidden, width)
        self.up_proj = matrix(rngs, dtype, hidden, width)
        self.down_proj = matrix(rngs, dtype, width, hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        projections = self.gate_proj, self.up_proj, self.down_proj
        return swiglu(x, *(p.get_value() for p in projections))


class MoE(nnx.Module):
    """Routed experts, and shared ones that every token goes to. x [tokens, hidden]."""

    def __init__(self, config: MoEConfig, hidden: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.gate = Router(config, hidden, rngs)
        self.experts = Experts(config, hidden, dtype, rngs)
        self.shared_experts = (
            MLP(hidden, config.shared_size, dtype, rngs) if config.shared_size else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.experts(x, *self.gate(x))
        return y if self.shared_experts is None else y + self.shared_experts(x)


class Router(nnx.Module):
    """Chooses each token's experts, in float32."""

    def __init__(self, config: MoEConfig, hidden: int, rngs: nnx.Rngs) -> None:
        self.config = config
        normal = jax.random.normal(rngs.params(), (config.num_experts, hidden), jnp.float32)
        self.weight = nnx.Param(normal * hidden**-0.5)
        if config.scoring == "sigmoid":
            self.e_score_correction_bias = nnx.Param(jnp.zeros(config.num_experts, jnp.float32))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights float32 and ids int32 of each token's experts, [tokens, experts_per_token]."""
        # GPUs would multiply float32 in fewer bits otherwise, and choose other experts.
        logits = jnp.matmul(x.astype(jnp.float32), self.weight[...].T, precision="highest")
        bias = (
            self.e_score_correction_bias[...][None, :] if self.config.scoring == "sigmoid" else None
        )
        return route(self.config, logits, bias)


def route(
    config: MoEConfig, logits: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """See `Router`: logits float32 [tokens, experts], bias [1, experts] where scores are sigmoids.

    DeepSeek-V2 (arXiv:2405.04434, section 2.2) and V3 (arXiv:2412.19437, section 2.1.2).
    """
    if bias is None:
        scores = choice = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits)
        choice = scores + bias
    if config.num_groups > 1:
        grouped = choice.reshape(len(choice), config.num_groups, -1)
        best = 1 if bias is None else 2  # experts that speak for their group
        group_scores = jax.lax.top_k(grouped, best)[0].sum(axis=-1)
        chosen = jax.lax.top_k(group_scores, config.groups_per_token)[1]
        allowed = jax.nn.one_hot(chosen, config.num_groups, dtype=jnp.bool).any(axis=1)
        choice = jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
    ids = jax.lax.top_k(choice, config.experts_per_token)[1]
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if config.normalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return weights * config.scale, ids


class Experts(nnx.Module):
    """The routed experts' MLPs, their weights stacked."""

    def __init__(self, config: MoEConfig, hidden: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        experts, width = config.num_experts, config.intermediate_size
        self.gate_proj = matrix(rngs, dtype, experts, hidden, width)
        self.up_proj = matrix(rngs, dtype, experts, hidden, width)
        self.down_proj = matrix(rngs, dtype, experts, width, hidden)

    def __call__(self, x: jax.Array, weights: jax.Array, ids: jax.Array) -> jax.Array:
        """Each token's weighted sum over its experts: x [tokens, hidden], the rest as `Router`."""
        tokens, per_token = ids.shape
        place, expert_of_tile, height = tile(ids.reshape(-1), self.gate_proj.shape[0])
        count = len(expert_of_tile)
        # Places that stay free compute the first token, for nobody.
        token = (
            jnp.zeros(count * height, jnp.int32).at[place].set(jnp.arange(ids.size) // per_token)
        )
        projections = [p.get_value() for p in (self.gate_proj, self.up_proj, self.down_proj)]

        def of_tile(expert: jax.Array, token: jax.Array) -> jax.Array:
            return swiglu(x[token], *(w[expert] for w in projections))

        out = jax.lax.map(
            lambda tile: of_tile(*tile),
            (expert_of_tile, token.reshape(count, height)),
            batch_size=TILES_AT_ONCE,
        )
        out = out.reshape(count * height, -1)[place].reshape(tokens, per_token, -1)
        return (out.astype(jnp.float32) * weights[:, :, None]).sum(axis=1).astype(x.dtype)


def tile(expert: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, int]:
    """Sorts rows into tiles, each of them of rows for one expert.

    Args:
        expert: int32 [rows], each row's.
        experts: how many there are.

    Returns:
        place: int32 [rows], where each row is among the places of all tiles.
        expert_of_tile: int32 [tiles].
        height: places of a tile.
    """
    rows = len(expert)
    height = max(8, rows // experts)
    count = min(rows, rows // height + experts)  # each expert may have a tile that is not full
    if count > TILES_AT_ONCE:
        count += -count % TILES_AT_ONCE
    counted = jnp.cumsum(jax.nn.one_hot(expert, experts, dtype=jnp.int32), axis=0)
    rank = jnp.take_along_axis(counted, expert[:, None], axis=1)[:, 0] - 1  # among its expert's
    tiles = -(-counted[-1] // height)  # of each expert
    ends = jnp.cumsum(tiles)
    expert_of_tile = (ends[None, :] <= jnp.arange(count)[:, None]).sum(axis=1)
    place = (ends - tiles)[expert] * height + rank
    return place, jnp.minimum(expert_of_tile, experts - 1), height
