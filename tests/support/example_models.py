"""The language model of examples/: loaded, and called step by step without a server."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek.config import ModelConfig
from deepseek.model import DeepSeek
from deepseek.weights import load_model
from jax_flashmla import BlockTable, PagedCache


def load(directory: pathlib.Path, dtype: str = "float32") -> tuple[ModelConfig, DeepSeek]:
    config = ModelConfig.from_directory(directory)
    return config, load_model(directory, config, dtype=jnp.dtype(dtype))


def logits_of(
    config: ModelConfig,
    model: DeepSeek,
    tokens: np.ndarray,
    prefilled: int,
    *,
    dtype: str = "float32",
    block_size: int = 16,
) -> np.ndarray:
    """float32 logits after each token from prefilled - 1 on: a prefill, then steps."""
    table = BlockTable.create(np.arange(8, dtype=np.int32)[None], block_size=block_size)
    cache = PagedCache.create(
        config.attention.cache_format(dtype, block_size),
        table,
        num_blocks=8,
        layers=config.num_layers,
        index_format=config.attention.index_format(dtype),
        index_layers=config.index_layers,
    )
    graph, state = nnx.split(model)

    @jax.jit
    def step(
        state: nnx.State, cache: PagedCache, tokens: jax.Array
    ) -> tuple[PagedCache, jax.Array]:
        model = nnx.merge(graph, state)
        cache, slots = cache.advance(tokens.shape[1])
        cache, states = model(tokens, cache, slots, prefill=tokens.shape[1] > 1)
        return cache, model.logits(states[:, -1])

    cache, first = step(state, cache, tokens[None, :prefilled])
    logits = [first]
    for token in tokens[prefilled:]:
        cache, following = step(state, cache, token[None, None])
        logits.append(following)
    return np.concatenate(logits)
