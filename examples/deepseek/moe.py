"""Mixture of experts: which experts a token goes to, and what they make of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deepseek.config import MoEConfig
from deepseek.float8 import Float8

TILES_AT_ONCE = 32  # copies of experts' weights that are made beside the model's


class Projections(nnx.Module):
    """The weights of an MLP, or those of several, stacked: [*stack, inputs, outputs].

    Each is an array, or `Float8` where a checkpoint has that.
    """

    def __init__(
        self, hidden: int, width: int, dtype: DTypeLike, rngs: nnx.Rngs, *stack: int
    ) -> None:
        def weights(inputs: int, outputs: int) -> nnx.Param:
            shape = (*stack, inputs, outputs)
            return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * inputs**-0.5)

        self.gate_proj, self.up_proj = weights(hidden, width), weights(hidden, width)
        self.down_proj = weights(width, hidden)

    def values(self) -> list[jax.Array | Float8]:
        """Those of gate, up and down."""
        return [p.get_value() for p in (self.gate_proj, self.up_proj, self.down_proj)]


def swiglu(x: jax.Array, *weights: jax.Array | Float8) -> jax.Array:
    """down(silu(gate(x)) * up(x)): x [..., hidden], weights of gate, up and down."""
    gate, up, down = (w.astype(x.dtype) for w in weights)
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


class MLP(Projections):
    """An ordinary MLP."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., hidden]."""
        return swiglu(x, *self.values())


class MoE(nnx.Module):
    """Routed experts, and shared ones that every token goes to. x [tokens, hidden]."""

    def __init__(self, config: MoEConfig, hidden: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.gate = Router(config, hidden, rngs)
        self.experts = Experts(hidden, config.intermediate_size, dtype, rngs, config.num_experts)
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


class Experts(Projections):
    """The routed experts' MLPs, stacked."""

    def __call__(self, x: jax.Array, weights: jax.Array, ids: jax.Array) -> jax.Array:
        """Each token's weighted sum over its experts: x [tokens, hidden], the rest as `Router`."""
        tokens, per_token = ids.shape
        projections = self.values()
        place, expert_of_tile, height = tile(ids.reshape(-1), projections[0].shape[0])
        # Places that stay free compute the first token, for nobody.
        free = jnp.zeros(len(expert_of_tile) * height, jnp.int32)
        token_of_place = free.at[place].set(jnp.arange(ids.size) // per_token)

        def of_tile(tile: tuple[jax.Array, jax.Array]) -> jax.Array:
            expert, tokens = tile
            return swiglu(x[tokens], *(w[expert] for w in projections))

        tiles = expert_of_tile, token_of_place.reshape(-1, height)
        out = jax.lax.map(of_tile, tiles, batch_size=TILES_AT_ONCE)
        out = out.reshape(-1, x.shape[-1])[place].reshape(tokens, per_token, -1)
        return (out.astype(jnp.float32) * weights[:, :, None]).sum(axis=1).astype(x.dtype)


def tile(expert: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, int]:
    """Sorts rows into tiles, so that all rows of a tile are for one expert.

    Args:
        expert: int32 [rows], the one that each row is for.
        experts: how many there are.

    Returns:
        place: int32 [rows], where each row goes, counted over the places of all tiles.
        expert_of_tile: int32 [tiles].
        height: places of a tile.
    """
    rows = len(expert)
    height = max(8, rows // experts)
    count = min(rows, rows // height + experts)  # each expert may have a tile that is not full
    if count > TILES_AT_ONCE:
        count += -count % TILES_AT_ONCE
    counted = jnp.cumsum(jax.nn.one_hot(expert, experts, dtype=jnp.int32), axis=0)
    rank = jnp.take_along_axis(counted, expert[:, None], axis=1)[:, 0] - 1  # within its expert
    tiles = -(-counted[-1] // height)  # of each expert
    ends = jnp.cumsum(tiles)
    place = (ends - tiles)[expert] * height + rank
    expert_of_tile = (ends[None, :] <= jnp.arange(count)[:, None]).sum(axis=1)
    return place, jnp.minimum(expert_of_tile, experts - 1), height
