"""Mixture of experts: which experts a token goes to, and what they make of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deepseek.config import MoEConfig


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). x [..., hidden]."""

    def __init__(self, hidden: int, width: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs, outputs, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs
            )

        self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.down_proj = linear(width, hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


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
        def stacked(inputs: int, outputs: int) -> nnx.Param:
            shape = (config.num_experts, inputs, outputs)
            return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * inputs**-0.5)

        width = config.intermediate_size
        self.gate_proj, self.up_proj = stacked(hidden, width), stacked(hidden, width)
        self.down_proj = stacked(width, hidden)

    def __call__(self, x: jax.Array, weights: jax.Array, ids: jax.Array) -> jax.Array:
        """Each token's weighted sum over its experts: x [tokens, hidden], the rest as `Router`."""
        tokens, per_token = ids.shape
        order = jnp.argsort(ids.reshape(-1))  # rows of one expert beside each other
        rows = x[order // per_token]
        sizes = jnp.bincount(ids.reshape(-1), length=self.gate_proj.shape[0]).astype(jnp.int32)
        gate = jax.lax.ragged_dot(rows, self.gate_proj[...], sizes)
        up = jax.lax.ragged_dot(rows, self.up_proj[...], sizes)
        out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, self.down_proj[...], sizes)
        out = out[jnp.argsort(order)].reshape(tokens, per_token, -1).astype(jnp.float32)
        return (out * weights[:, :, None]).sum(axis=1).astype(x.dtype)
