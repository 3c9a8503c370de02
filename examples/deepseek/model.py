"""The model: embedding, layers of latent attention and MLP, head. Modules are named as in a
checkpoint."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deepseek.config import ModelConfig
from deepseek.moe import MLP, MoE
from jax_flashmla import PagedCache, Peers, Slots, SplitSchedule, all_reduce_sum
from jax_flashmla.layers import Selection
from jax_flashmla.layers.nnx import MLAttention


class RMSNorm(nnx.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis of x [b, s, size]."""

    def __init__(self, size: int, eps: float, dtype: DTypeLike) -> None:
        self.weight, self.eps = nnx.Param(jnp.ones(size, dtype)), eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return self.weight[...][None, None, :] * normed.astype(x.dtype)


class Layer(nnx.Module):
    def __init__(
        self,
        config: ModelConfig,
        index: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        peers: Peers | None,
    ) -> None:
        hidden = config.attention.hidden_size
        self.index, self.peers = index, peers
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps, dtype)
        attention = config.attention.for_layer(index)
        heads_axis = None if peers is None else peers.axis
        self.self_attn = MLAttention(
            attention, param_dtype=dtype, heads_axis=heads_axis, peers=peers, rngs=rngs
        )
        indexer = attention.indexer
        self.index_layer = None if indexer is None else indexer.index_layer(index)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps, dtype)
        moe = config.moe[index]
        self.mlp = (
            MLP(hidden, config.intermediate_size, dtype, rngs)
            if moe is None
            else MoE(moe, hidden, dtype, rngs)
        )

    def __call__(
        self,
        x: jax.Array,
        cache: PagedCache,
        slots: Slots,
        schedule: SplitSchedule | None,
        prefix: bool,
        selection: Selection | None,
    ) -> tuple[PagedCache, jax.Array, Selection | None]:
        normed, attention = self.input_layernorm(x), self.self_attn
        # Without an indexer of its own, it attends to what an earlier layer has selected, if any.
        if self.index_layer is not None:
            cache, selection = attention.select(
                normed, cache, slots=slots, layer=self.index_layer, prefix=prefix
            )
        step = {"slots": slots, "layer": self.index, "selection": selection}
        if schedule is None:
            cache, y = attention.prefill(normed, cache, prefix=prefix, **step)
        else:
            cache, y = attention.decode(normed, cache, schedule=schedule, **step)
        x = x + y
        tokens = self.post_attention_layernorm(x).reshape(-1, x.shape[-1])
        y = self.mlp(tokens)
        if self.peers is not None:  # it was of the device's share of columns
            y = all_reduce_sum(y, self.peers.axis, peers=self.peers)
        return cache, x + y.reshape(x.shape), selection


class DeepSeek(nnx.Module):
    """The whole model, or what a device has of it.

    Args:
        config: the model's.
        dtype: of the parameters and the computation.
        rngs: to draw parameters from.
        peers: the devices that share it, see `deepseek.devices`; it is then called inside of
            `jax.shard_map`. None for one device.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, peers: Peers | None = None
    ) -> None:
        hidden, self.peers = config.attention.hidden_size, peers
        self.heads = config.attention.num_heads // (1 if peers is None else peers.size)
        self.embed_tokens = nnx.Embed(
            config.vocab_size, hidden, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List(
            [Layer(config, i, dtype, rngs, peers) for i in range(config.num_layers)]
        )
        self.norm = RMSNorm(hidden, config.rms_norm_eps, dtype)
        self.lm_head = (
            None
            if config.tied_embeddings
            else nnx.Linear(
                hidden,
                config.vocab_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=dtype,
                rngs=rngs,
            )
        )

    def __call__(
        self,
        tokens: jax.Array,
        cache: PagedCache,
        slots: Slots,
        *,
        prefill: bool,
        prefix: bool = False,
    ) -> tuple[PagedCache, jax.Array]:
        """One step: tokens [b, s] int32 -> the cache with their rows, and states [b, s, hidden].

        Args:
            tokens: each sequence's next tokens.
            cache: of all layers, after the step's `advance`, which gave `slots`.
            prefill: whether these are prompts.
            prefix: whether the cache may hold tokens of a prompt before these.
        """
        schedule = None
        if not prefill:  # once for all layers
            schedule = cache.table.schedule(h_q=self.heads, format=cache.format)
        x, selection, prefix = self.embed_tokens(tokens), None, prefix or not prefill
        for layer in self.layers:
            cache, x, selection = layer(x, cache, slots, schedule, prefix, selection)
        return cache, self.norm(x)

    def logits(self, states: jax.Array) -> jax.Array:
        """states [..., hidden] -> float32 [..., vocab]."""
        head = self.embed_tokens.attend if self.lm_head is None else self.lm_head
        return head(states).astype(jnp.float32)
