"""Attention of MaxText and of jax-llm-examples in their own layouts, and random weights in them.

Written after those projects' sources, in float64: keys and values of every head, MaxText's scaled
queries, jax-llm-examples' left padding and int8 weights.
"""

from __future__ import annotations

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np

import cases

MAXTEXT = {
    "base_emb_dim": 24,
    "base_num_query_heads": 4,
    "normalization_layer_epsilon": 0.1,  # so that it matters
    "q_lora_rank": 10,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "mscale": 0.707,
    "rope_max_timescale": 10_000,
    "max_position_embeddings": 163_840,
    "original_max_position_embeddings": 16,
    "rope_factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "rope_interleave": True,
}


QUANT = dataclasses.make_dataclass("QuantArray", ["quant", "scale"])


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def yarn_frequencies(dim: int, theta: float, factor: float, original: int) -> np.ndarray:
    """Of rotations between 32 and 1 within the original context, a ramp."""
    low, high = (
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (32, 1)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    base = theta ** (-np.arange(0, dim, 2) / dim)
    return base / factor * ramp + base * (1 - ramp)


def turn(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray, pairs: str) -> np.ndarray:
    """x [tokens, ..., rope]: pairs turned, real parts stored before imaginary ones."""
    half = x.shape[-1] // 2
    z = (
        x[..., ::2] + 1j * x[..., 1::2]
        if pairs == "neighbours"
        else x[..., :half] + 1j * x[..., half:]
    )
    angles = positions[:, None] * frequencies
    z = z * np.exp(1j * angles.reshape(len(x), *[1] * (x.ndim - 2), half))
    return np.concatenate([z.real, z.imag], axis=-1)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def maxtext_attention(model: dict, weights: dict, x: np.ndarray, topk: int = 0) -> np.ndarray:
    """x [tokens, emb] -> [tokens, emb]; with an indexer, to the topk best of each token."""
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), weights)
    eps, nope = model["normalization_layer_epsilon"], model["qk_nope_head_dim"]
    rank, rope = model["kv_lora_rank"], model["qk_rope_head_dim"]
    frequencies = yarn_frequencies(
        rope, model["rope_max_timescale"], model["rope_factor"],
        model["original_max_position_embeddings"],
    )  # fmt: skip
    at = np.arange(len(x))
    low_rank_q = None
    if model["q_lora_rank"]:
        low_rank_q = rms_norm(x @ w["wq_a"]["kernel"], w["q_norm"]["scale"], eps)
        q = np.tensordot(low_rank_q, w["wq_b"]["kernel"], 1)
    else:
        q = np.tensordot(x, w["query"]["kernel"], 1)
    low_rank = x @ w["wkv_a"]["kernel"]
    kv = np.tensordot(
        rms_norm(low_rank[:, :rank], w["kv_norm"]["scale"], eps), w["wkv_b"]["kernel"], 1
    )
    pairs = "neighbours" if model["rope_interleave"] else "halves"
    key_rope = turn(low_rank[:, rank:], at, frequencies, pairs)
    key_rope = np.broadcast_to(key_rope[:, None], (*kv.shape[:2], rope))
    key = np.concatenate([kv[..., :nope], key_rope], axis=-1)
    scale = (0.1 * model["mscale"] * math.log(model["rope_factor"]) + 1) ** 2
    query = np.concatenate([q[..., :nope], turn(q[..., nope:], at, frequencies, pairs)], axis=-1)
    query = query * scale * (nope + rope) ** -0.5

    mask = np.where(at[None, :] <= at[:, None], 0.0, -np.inf)
    if topk:
        index = w["indexer"]

        def split(a: np.ndarray) -> np.ndarray:
            turned = turn(a[..., :rope], at, frequencies, "halves")
            return np.concatenate([turned, a[..., rope:]], axis=-1)

        k = x @ index["wk"]["kernel"]
        k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
        k = split(k * index["k_norm"]["scale"] + index["k_norm"]["bias"])
        logits = np.einsum(
            "thd,sd->tsh", split(np.tensordot(low_rank_q, index["wq_b"]["kernel"], 1)), k
        )
        score = np.einsum("tsh,th->ts", np.maximum(logits, 0), x @ index["weights_proj"]["kernel"])
        score = score + mask
        cutoff = np.sort(score, axis=-1)[:, -topk][:, None]
        mask = np.where(score >= cutoff, mask, -np.inf)
    weights_ = softmax(np.einsum("thd,shd->hts", query, key) + mask)
    return np.einsum("hts,shv,hvd->td", weights_, kv[..., nope:], w["out"]["kernel"])


def random_tree(shapes: dict) -> dict:
    rng = np.random.default_rng(cases.SEED)
    norm = lambda shape: 1 + 0.5 * rng.standard_normal(shape)  # noqa: E731
    draw = lambda shape: (  # noqa: E731
        norm(shape) if len(shape) == 1 else rng.standard_normal(shape) * shape[0] ** -0.5
    )
    return {
        module: {name: jnp.asarray(draw(shape), jnp.float32) for name, shape in arrays.items()}
        for module, arrays in shapes.items()
    }


def maxtext_weights(model: dict) -> dict:
    """Random, in the shapes that MaxText's modules make."""
    emb, heads, rank = model["base_emb_dim"], model["base_num_query_heads"], model["q_lora_rank"]
    c, rope = model["kv_lora_rank"], model["qk_rope_head_dim"]
    nope, v = model["qk_nope_head_dim"], model["v_head_dim"]
    shapes: dict = {"query": {"kernel": (emb, heads, nope + rope)}}
    if rank:
        shapes = {
            "wq_a": {"kernel": (emb, rank)},
            "q_norm": {"scale": (rank,)},
            "wq_b": {"kernel": (rank, heads, nope + rope)},
        }
    return random_tree(
        shapes
        | {
            "wkv_a": {"kernel": (emb, c + rope)},
            "kv_norm": {"scale": (c,)},
            "wkv_b": {"kernel": (c, heads, nope + v)},
            "out": {"kernel": (heads, v, emb)},
        }
    )


QUANTISED_OVER = {
    "q_a": 1, "q_b": (1, 2), "kv_a": 1, "k_pe": 1, "k_b": (1, 2), "v_b": (1, 2), "o": (0, 1)
}  # fmt: skip


def llm_layer(*, quantised: bool) -> types.SimpleNamespace:
    """Random, as an AttentionLayer has them: bfloat16, or int8 with float16 scales."""
    shapes = {
        "q_a": (24, 10), "q_gamma": (10,), "q_b": (10, 4, 14), "kv_a": (24, 16), "k_pe": (24, 8),
        "kv_gamma": (16,), "k_b": (16, 4, 6), "v_b": (16, 4, 5), "o": (4, 5, 24),
    }  # fmt: skip
    layer = random_tree({"layer": shapes})["layer"]
    for name, axes in QUANTISED_OVER.items() if quantised else ():
        x = np.asarray(layer[name])
        scale = (np.abs(x).max(axis=axes, keepdims=True) / 127).astype(np.float16)
        quant = np.round(x / scale.astype(np.float32)).astype(np.int8)
        layer[name] = QUANT(jnp.asarray(quant), jnp.asarray(scale.squeeze()))
    return types.SimpleNamespace(**layer)


def llm_einsum(subscripts: str, x: np.ndarray, weight: object, *, out_scaling=False) -> np.ndarray:
    if not isinstance(weight, QUANT):
        return np.einsum(subscripts, x, np.asarray(weight, np.float64))
    quant, scale = (np.asarray(a, np.float64) for a in (weight.quant, weight.scale))
    if out_scaling:
        return np.einsum(subscripts, x, quant) * scale
    return np.einsum(subscripts, x * scale, quant)


def llm_attention(layer: types.SimpleNamespace, x: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """x [b, t, embed], padded on the left -> [b, t, embed]."""
    b, t, _ = x.shape
    frequencies = yarn_frequencies(8, 10000.0, 40.0, 16)
    place = np.arange(t)[None, :] - padding[:, None]  # negative: padding
    rotate = lambda a: np.stack(  # noqa: E731
        [turn(a[i], place[i], frequencies, "neighbours") for i in range(b)]
    )
    gamma = lambda a: np.asarray(a, np.float64)  # noqa: E731
    q_lora = rms_norm(llm_einsum("btd,dr->btr", x, layer.q_a), gamma(layer.q_gamma), 1e-6)
    q = llm_einsum("btr,rhq->bthq", q_lora, layer.q_b)
    latent = rms_norm(llm_einsum("btd,dr->btr", x, layer.kv_a), gamma(layer.kv_gamma), 1e-6)
    k_pe = rotate(llm_einsum("btd,dq->btq", x, layer.k_pe))
    k_nope = llm_einsum("btr,rhq->bthq", latent, layer.k_b)
    v = llm_einsum("btr,rhv->bthv", latent, layer.v_b)
    qk = np.einsum("bthd,bThd->bhtT", q[..., :6], k_nope)
    qk += np.einsum("bthd,bTd->bhtT", rotate(q[..., 6:]), k_pe)
    qk *= 14**-0.5 * (0.1 * math.log(40.0) + 1) ** 2
    seen = (place[:, None, :] <= place[:, :, None]) & (place[:, None, :] >= 0)
    weights = softmax(np.where(seen[:, None], qk, -1e30))
    attended = np.einsum("bhtT,bThv->bthv", weights, v)
    return llm_einsum("bthv,hvd->btd", attended, layer.o, out_scaling=True)
