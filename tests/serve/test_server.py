"""The server on one tiny attention layer: its tokens are those of each request generated alone."""

from __future__ import annotations

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla.serve.draft
from jax_flashmla import PagedCache
from jax_flashmla.layers import MLAConfig, MLAParams, RopeConfig, decode
from jax_flashmla.layers import prefill as prefill_layer
from jax_flashmla.serve import Model, NGramDraft, Sampling, Server, sample

pytestmark = pytest.mark.usefixtures("on_cpu")

CONFIG = MLAConfig(
    hidden_size=16,
    num_heads=2,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    rope=RopeConfig(layout="half"),
)
FORMAT = CONFIG.cache_format(jnp.float32, 8)
VOCAB = 32
PROMPTS = [[1, 2, 3], [4] * 9 + [5] * 9, [7], [4] * 9 + [5] * 8 + [6, 7, 1]]


def step(weights, tokens, cache: PagedCache, slots, *, prefill: bool, prefix: bool):
    x = weights["embed"][tokens]
    if prefill:
        cache, y = prefill_layer(CONFIG, weights["attention"], x, cache, slots=slots, prefix=prefix)
    else:
        cache, y = decode(CONFIG, weights["attention"], x, cache, slots=slots)
    return cache, x + y


def logits(weights, states):
    return states @ weights["head"]


@pytest.fixture(scope="module")
def model() -> Model:
    embed = jax.random.normal(jax.random.key(1), (VOCAB, 16), jnp.float32)
    head = jax.random.normal(jax.random.key(2), (16, VOCAB), jnp.float32)
    attention = MLAParams.init(CONFIG, jax.random.key(0))
    return Model({"embed": embed, "head": head, "attention": attention}, step, logits)


def make_server(model: Model, **options: object) -> Server:
    options = {"batch": 2, "max_tokens": 48, **options}
    return Server(model, FORMAT, layers=1, **options)


def answers(server: Server) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for token in server.stream():
        found.setdefault(token.request, []).append(token.id)
    return found


@pytest.fixture(scope="module")
def expected(model: Model) -> list[list[int]]:
    """Greedily, by full attention of the whole text for each token."""
    with jax.default_device(jax.devices("cpu")[0]):
        server = make_server(model, batch=1, prefix_caching=False)
        found = []
        for prompt in PROMPTS:
            text = list(prompt)
            for _ in range(12):
                server.add(text, 1)
                text += answers(server).popitem()[1]
            found.append(text[len(prompt) :])
        return found


@pytest.mark.parametrize("options", [{}, {"draft": NGramDraft(1, 3)}, {"num_blocks": 5}], ids=str)
def test_tokens_depend_on_the_request_alone(model: Model, expected, options) -> None:
    server = make_server(model, **options)
    for prompt in PROMPTS:
        server.add(prompt, 12)
    assert answers(server) == dict(enumerate(expected))
    stats = server.stats
    assert (stats.finished, stats.cancelled, server.active, server.waiting) == (4, 0, 0, 0)
    assert server.scheduler.num_free == server.scheduler.allocator.num_blocks
    assert stats.cached_tokens == 16  # the fourth prompt begins as the second does
    if "draft" in options:
        assert 0 < stats.accepted_tokens <= stats.drafted_tokens


def test_cache_is_where_the_weights_are(model: Model, expected) -> None:
    device = jax.devices("cpu")[1]
    moved = dataclasses.replace(model, weights=jax.device_put(model.weights, device))
    server = make_server(moved, device=device)
    server.add(PROMPTS[0], 12)
    for _ in range(2):  # its prefill, and a step
        server.step()
        assert {leaf.device for leaf in jax.tree.leaves(server.cache)} == {device}
    assert [token.id for token in server.stream()] == expected[0][2:]


def test_a_second_round_reads_the_cache(model: Model, expected) -> None:
    server = make_server(model)
    for _ in range(2):
        number = server.add(PROMPTS[3], 12, sampling=Sampling())
        assert answers(server) == {number: expected[3]}
    assert server.stats.cached_tokens == 16


def test_what_ends_a_request(model: Model, expected) -> None:
    text = expected[0]
    server = make_server(model, detokenize=lambda tokens: "".join(chr(97 + t) for t in tokens))
    first = text.index(text[4])
    server.add(PROMPTS[0], 12, stop_tokens=[text[4]])
    server.add(PROMPTS[0], 12, stop_strings=["~", "".join(chr(97 + t) for t in text[:6])])
    server.add(PROMPTS[0], 3)
    tokens = list(server.stream())
    by = [[t for t in tokens if t.request == i] for i in range(3)]
    assert [t.id for t in by[0]] == text[: first + 1]
    assert [t.id for t in by[1]] == text[:6]
    assert [t.id for t in by[2]] == text[:3]
    assert [each[-1].reason for each in by] == ["stop", "stop", "length"]
    assert all(t.reason is None for each in by for t in each[:-1])


def test_requests_can_be_cancelled_and_added_meanwhile(model: Model, expected) -> None:
    server = make_server(model, batch=1)
    first, second = server.add(PROMPTS[0], 12), server.add(PROMPTS[1], 12)
    stream = server.stream()
    assert next(stream).request == first
    assert server.cancel(first)
    assert not server.cancel(first)
    third = server.add(PROMPTS[2], 12)
    assert server.cancel(second)
    assert [(t.request, t.id) for t in stream] == [(third, t) for t in expected[2]]
    assert (server.stats.cancelled, server.stats.finished) == (2, 1)
    assert server.scheduler.num_free == server.scheduler.allocator.num_blocks


def test_each_request_has_its_own_sampling(model: Model, expected) -> None:
    def run(*requests: Sampling, **options: object) -> list[list[int]]:
        server = make_server(model, **options)
        for sampling in requests:
            server.add(PROMPTS[0], 12, sampling=sampling)
        return [tokens for _, tokens in sorted(answers(server).items())]

    warm = Sampling(temperature=1.5, seed=3)
    (alone,) = run(warm)
    assert run(Sampling(), warm, Sampling(temperature=1.5, top_k=1)) == [
        expected[0], alone, expected[0]
    ]  # fmt: skip
    assert run(Sampling(temperature=1.5, seed=4)) != [alone]
    assert run(warm, draft=NGramDraft(1, 3)) == [alone]


def draws(logits: np.ndarray, n: int, sampling: Sampling) -> np.ndarray:
    """How often each token is drawn, of n times."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits)))
    chosen = jax.jit(sample)(
        rows,
        jnp.arange(n, dtype=jnp.int32),
        jnp.full(n, sampling.temperature, jnp.float32),
        jnp.full(n, sampling.top_k, jnp.int32),
        jnp.full(n, sampling.top_p, jnp.float32),
        jnp.full(n, sampling.seed, jnp.uint32),
    )
    return np.bincount(chosen, minlength=len(logits)) / n


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.05, 0.5, 0.15, 0.3]),
        (Sampling(temperature=1.0, top_k=3), [0, 0.526, 0.158, 0.316]),
        (Sampling(temperature=1.0, top_p=0.75), [0, 0.625, 0, 0.375]),
        (Sampling(temperature=1.0, top_p=0.1), [0, 1, 0, 0]),
        (Sampling(), [0, 1, 0, 0]),
    ],
)
def test_sampling_follows_the_probabilities(sampling: Sampling, expected: list[float]) -> None:
    got = draws(np.log([0.05, 0.5, 0.15, 0.3]), 20000, sampling)
    np.testing.assert_allclose(got, expected, atol=0.015)  # 4 standard deviations


def test_wrong_calls_are_named(model: Model) -> None:
    server = make_server(model, num_blocks=2)
    for call, message in (
        (lambda: make_server(model, batch=0), "batch must be at least 1, got 0"),
        (lambda: make_server(model, max_tokens=1), "max_tokens must be at least 2, got 1"),
        (lambda: server.add([], 1), "prompt must have at least one token, got none"),
        (lambda: server.add([1], 0), "max_new_tokens must be at least 1, got 0"),
        (lambda: server.add([1], 48), "1 tokens and max_new_tokens = 48 are 49, more than"),
        (lambda: server.add([1], 16), "needs a cache of 17 tokens, the whole cache has 16"),
        (lambda: server.add([1], 1, stop_strings=["a"]), "need a server with detokenize"),
        (lambda: Sampling(temperature=-1), "temperature must be at least 0, got -1"),
        (lambda: Sampling(top_k=-1), "top_k must be at least 0"),
        (lambda: Sampling(top_p=0), "top_p must be more than 0 and at most 1, got 0"),
        (lambda: NGramDraft(n=0), "n must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert (server.waiting, server.step()) == (0, [])


def test_docstring() -> None:
    result = doctest.testmod(jax_flashmla.serve.draft)
    assert result.attempted > 0
    assert result.failed == 0
