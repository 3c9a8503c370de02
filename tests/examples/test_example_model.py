"""The example's language model against transformers, and its parts against naive ones."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import golden_models
import tolerances
from checkpoints import write_checkpoint
from deepseek import moe
from deepseek.config import MoEConfig
from deepseek.serve import Server
from example_models import load, logits_of
from jax_flashmla.serve import Sampling, Stats


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("source", golden_models.SOURCES)
@pytest.mark.parametrize("name", golden_models.LANGUAGE_MODELS)
def test_logits_and_greedy_tokens_equal_transformers(name, source, scratch):
    directory = golden_models.find(name, source, scratch)
    golden = golden_models.load(directory)
    config, model = load(directory)
    expected = golden["logits"]
    block_size = 16 if config.attention.indexer is None else 64
    prefilled = len(golden["tokens"]) - len(expected) + 1
    got = logits_of(config, model, golden["tokens"], prefilled, block_size=block_size)
    tolerances.assert_close("logits", got, expected, tolerances.F32_LOGITS)

    # Two places for five prompts, and a cache in which not all of them would have room.
    server = Server(
        config,
        model,
        batch=2,
        max_tokens=80,
        num_blocks=7 if block_size == 16 else 3,
        block_size=block_size,
        dtype=jnp.float32,
        stop_tokens=config.stop_tokens,
    )
    prompts = [golden[f"prompt.{i}"].tolist() for i in range(5)]
    answers: list[list[int]] = [[] for _ in prompts]
    ended = []
    for token in server.generate(prompts, golden_models.maker().MAX_NEW_TOKENS):
        assert token.prompt not in ended
        answers[token.prompt].append(token.id)
        if token.last:
            ended.append(token.prompt)
    assert answers == [golden[f"greedy.{i}"].tolist() for i in range(5)]
    assert len(answers[0]) < golden_models.maker().MAX_NEW_TOKENS  # it met the end token
    assert ended[0] == 0
    assert server.scheduler.num_free == (7 if block_size == 16 else 3)
    assert server.stats.most_active == 2
    assert server.stats.compile_seconds > 0


def test_bfloat16_model_is_near_transformers(kernel):
    """On a GPU through the Hopper kernels, which take this model's widths."""
    directory = golden_models.GOLDEN / "deepseek_v3_wide"
    golden = golden_models.load(directory)
    loaded = load(directory, "bfloat16")
    prefilled = len(golden["tokens"]) - len(golden["logits"]) + 1
    options = {"dtype": "bfloat16", "block_size": 64}
    got = logits_of(*loaded, golden["tokens"], prefilled, **options)
    tolerances.assert_close("logits", got, golden["logits"], tolerances.BF16_LOGITS)


def naive_route(
    config: MoEConfig, logits: np.ndarray, bias: np.ndarray | None
) -> dict[tuple[int, int], float]:
    """(token, expert): weight."""
    weights = {}
    group = np.arange(config.num_experts) * config.num_groups // config.num_experts
    for token, row in enumerate(logits.astype(np.float64)):
        if bias is None:
            scores = choice = np.exp(row) / np.exp(row).sum()
        else:
            scores = 1 / (1 + np.exp(-row))
            choice = scores + bias
        members = [np.sort(choice[group == g])[::-1] for g in range(config.num_groups)]
        strength = [m[0] if bias is None else m[:2].sum() for m in members]
        allowed = np.isin(group, np.argsort(strength)[::-1][: config.groups_per_token])
        ids = sorted(np.flatnonzero(allowed), key=lambda e: -choice[e])[: config.experts_per_token]
        total = sum(scores[e] for e in ids) if config.normalise else 1
        weights |= {(token, int(e)): scores[e] / total * config.scale for e in ids}
    return weights


V3_MOE = MoEConfig(
    num_experts=12,
    experts_per_token=4,
    intermediate_size=6,
    shared_size=6,
    scoring="sigmoid",
    num_groups=4,
    groups_per_token=2,
    normalise=True,
    scale=2.5,
)
V2_OPTIONS = {"scoring": "softmax", "normalise": False, "scale": 16.0}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "options",
    [{}, {"num_groups": 1, "groups_per_token": 1, "normalise": False}, V2_OPTIONS],
    ids=["v3", "one group", "v2"],
)
def test_routing_equals_a_naive_one(options):
    config = dataclasses.replace(V3_MOE, **options)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((50, 12), np.float32)
    bias = rng.standard_normal(12, np.float32) if config.scoring == "sigmoid" else None
    weights, ids = moe.route(config, jnp.asarray(logits), None if bias is None else bias[None])
    expected = naive_route(config, logits, bias)
    got = {
        (token, int(e)): float(w)
        for token in range(50)
        for e, w in zip(ids[token], weights[token], strict=True)
    }
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("tokens", "used", "at_once"), [(9, 11, 32), (40, 5, 4)], ids=["few", "many at uneven experts"]
)
def test_experts_equal_a_naive_loop(monkeypatch, tokens, used, at_once):
    monkeypatch.setattr(moe, "TILES_AT_ONCE", at_once)
    experts = moe.Experts(8, 6, jnp.float32, nnx.Rngs(0), 12)
    for weights in (experts.gate_proj, experts.up_proj, experts.down_proj):
        weights.set_value(weights[...].at[used:].set(jnp.nan))
    gate, up, down = (np.asarray(w, np.float64) for w in experts.values())
    rng = np.random.default_rng(1)
    x = rng.standard_normal((tokens, 8), np.float32)
    weights = rng.random((tokens, 4), np.float32)
    ids = np.stack([rng.permutation(used)[:4] for _ in range(tokens)]).astype(np.int32)
    expected = np.zeros((tokens, 8))
    for token, k in np.ndindex(ids.shape):
        e = ids[token, k]
        g = x[token] @ gate[e]
        expected[token] += weights[token, k] * (
            (g / (1 + np.exp(-g)) * (x[token] @ up[e])) @ down[e]
        )
    got = experts(*map(jnp.asarray, (x, weights, ids)))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def copy(tmp_path):
    """A copy of the golden V3 model: its folder and its tensors."""
    directory = tmp_path / "model"
    shutil.copytree(golden_models.GOLDEN / "deepseek_v3", directory)
    return directory, safetensors.numpy.load_file(directory / "model.safetensors")


@pytest.mark.usefixtures("on_cpu")
def test_one_error_names_every_tensor_of_the_model(copy):
    directory, tensors = copy
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    del tensors["model.layers.0.self_attn.o_proj.weight"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5]
    tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = np.ones((2, 2), np.float32)
    tensors["model.layers.2.self_attn.o_proj.weight"] = np.ones((2, 2), np.float32)  # V3 has one
    write_checkpoint(directory, tensors)
    with pytest.raises(ValueError, match="4 tensors") as error:
        load(directory)
    assert str(error.value).splitlines()[1:] == [
        "  extra model.layers.1.mlp.experts.8.up_proj.weight",
        "  missing model.layers.0.self_attn.o_proj.weight [32, 48]",
        "  missing model.layers.1.mlp.experts.5.up_proj.weight [16, 32]",
        "  model.norm.weight must have shape [32], got [5]",
    ]


@pytest.mark.usefixtures("on_cpu")
def test_random_choices_depend_on_seed_and_prompt_alone():
    config, model = load(golden_models.GOLDEN / "deepseek_v3")

    def texts(server: Server, *prompts: list[int]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        for token in server.generate(prompts, 12):
            answers[token.prompt].append(token.id)
        return answers

    options = {"batch": 2, "max_tokens": 16, "block_size": 16, "dtype": jnp.float32}
    sampling = Sampling(temperature=0.9, top_p=0.95)
    server = Server(config, model, sampling=sampling, **options)
    (alone,) = texts(server, [1, 2, 3])
    assert texts(server, [1, 2, 3], [9, 9], [8])[0] == alone  # and the cache may be used
    other = Server(config, model, sampling=dataclasses.replace(sampling, seed=1), **options)
    assert texts(other, [1, 2, 3]) != [alone]


@pytest.mark.usefixtures("on_cpu")
def test_server_refuses_what_it_cannot_serve():
    config, model = load(golden_models.GOLDEN / "deepseek_v3")
    options = {"batch": 1, "block_size": 16, "dtype": jnp.float32}
    with pytest.raises(ValueError, match=r"max_tokens must be between 2 and .* 128 .*, got 129"):
        Server(config, model, max_tokens=129, **options)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        Server(config, model, max_tokens=8, **{**options, "batch": 0})
    server = Server(config, model, max_tokens=40, num_blocks=2, **options)
    for prompts, new, message in (
        ([[1], []], 4, "prompt 1 must have at least one token"),
        ([[1]], 0, "max_new_tokens must be at least 1"),
        (
            [[1], [2] * 37],
            4,
            "prompt 1 is too long: 37 tokens and .* 41, more than max_tokens = 40",
        ),
        ([[2] * 30], 4, "prompt 0 needs a cache of 34 tokens, the whole cache has 32"),
    ):
        with pytest.raises(ValueError, match=message):
            next(server.generate(prompts, new))
    assert server.stats == Stats()


@pytest.mark.usefixtures("on_cpu")
def test_reader_may_stop_early():
    config, model = load(golden_models.GOLDEN / "deepseek_v3")
    server = Server(config, model, batch=2, max_tokens=12, block_size=16, dtype=jnp.float32)
    tokens = server.generate([[1], [2, 3], [4]], 4)
    first = [next(tokens), next(tokens)]
    tokens.close()
    assert server.scheduler.num_free == server.scheduler.allocator.num_blocks
    again = list(server.generate([[1], [2, 3], [4]], 4))
    assert again[:2] == first
    assert len(again) == 12
    assert [token.prompt for token in again if token.last] == [0, 1, 2]


@pytest.mark.usefixtures("on_cpu")
def test_model_within_another_is_found_by_its_prefix(tmp_path):
    directory = golden_models.GOLDEN / "deepseek_v3"
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    inner = {f"language_model.{name}": x for name, x in tensors.items()}
    hf = json.loads((directory / "config.json").read_text())
    wrapped = write_checkpoint(
        tmp_path / "wrapped",
        {**inner, "vision_tower.layers.0.weight": np.ones(3, np.float32)},
        config={"model_type": "images_too", "text_config": hf},
    )
    (_, got), (_, expected) = load(wrapped), load(directory)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(got), nnx.state(expected))
    inner["language_model.model.surprise"] = np.ones(3, np.float32)
    write_checkpoint(wrapped, inner)
    with pytest.raises(ValueError, match=r"extra language_model\.model\.surprise"):
        load(wrapped)
