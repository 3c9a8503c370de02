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


@pytest.mark.parametrize(
    "options", [{}, {"draft": NGramDraft(1, 3)}, {"num_blocks": 5}, {"batch": 3}], ids=str
)
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
        (lambda: Sampling(temperature=-1), "temperature must be at least 0 .*, got -1"),
        (lambda: Sampling(top_k=-1), "top_k must be at least 0"),
        (lambda: Sampling(top_p=0), "top_p must be more than 0 and at most 1, got 0"),
        (lambda: NGramDraft(n=0), "n must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert (server.waiting, server.step()) == (0, [])


def test_what_a_step_could_not_take_is_refused_before(model: Model, expected) -> None:
    """Else one request would stop the server for all."""
    server = make_server(model, detokenize=str)
    server.add(PROMPTS[0], 12)
    for call, message in (
        (lambda: server.add([1], 2.5), "max_new_tokens must be an integer, got 2.5"),
        (lambda: server.add([1], True), "max_new_tokens must be an integer, got True"),
        (lambda: server.add("12", 1), "prompt must be token ids, .* got '12'"),
        (lambda: server.add([1, 1.5], 1), "each of prompt must be an integer, got 1.5"),
        (lambda: server.add(np.ones(2), 1), r"prompt must be integers \[n\], got float64"),
        (lambda: server.add(np.ones((1, 2), int), 1), r"prompt must be integers \[n\]"),
        (lambda: server.add([1], 1, stop_tokens="5"), "stop_tokens must be token ids"),
        (lambda: server.add([1], 1, sampling={}), "sampling must be a Sampling or None, got {}"),
        (lambda: Sampling(seed="1"), "seed must be an integer, got '1'"),
        (lambda: Sampling(top_k=1.5), "top_k must be an integer, got 1.5"),
        (lambda: Sampling(temperature="1"), "temperature must be a number, got '1'"),
        (lambda: NGramDraft(length=1.5), "length must be an integer, got 1.5"),
        (lambda: make_server(model, batch=1.5), "batch must be an integer, got 1.5"),
        (lambda: make_server(model, draft=3), "draft must be a function or None, got 3"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    for call, message in (
        (lambda: server.add([1, -1], 1), "each of prompt must be at least 0, got -1"),
        (lambda: server.add([2**40], 1), "prompt must be between 0 and 2147483647, got 1099511"),
        (lambda: server.add([2**80], 1), "prompt must be between 0 and 2147483647"),
        (lambda: server.add(np.array([-3]), 1), "prompt must be between 0 and .*, got -3"),
        (lambda: server.add([1], 1, stop_strings=[5]), "must be non-empty strings, got .5,."),
        (lambda: server.add([1], 1, stop_strings=["a", ""]), "must be non-empty strings"),
        (lambda: Sampling(temperature=1e39), "temperature must be .* finite in float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    arrays = server.add(jnp.array(PROMPTS[2]), np.int64(12), stop_tokens=np.array([98, 99]))
    assert answers(server) == {0: expected[0], arrays: expected[2]}


@pytest.mark.parametrize("draft", [None, NGramDraft(1, 3), lambda tokens: tokens[:1]])
def test_a_table_is_made_where_the_batch_changes_alone(model: Model, expected, draft) -> None:
    if draft is not None and not isinstance(draft, NGramDraft):
        draft.length = 1
    server = make_server(model, draft=draft)
    made, block_table = [], server.scheduler.block_table
    server.scheduler.block_table = lambda *a: made.append(1) or block_table(*a)
    server.add(PROMPTS[0], 12)
    assert answers(server) == {0: expected[0]}
    assert len(made) == 2  # a prefill has a batch of its own


def failing_once(function, at: int):
    """A function whose call number `at` raises."""
    calls = iter(range(10**9))

    def call(*arguments, **options):
        if next(calls) == at:
            raise MemoryError("once")
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize(
    ("where", "at"), [("_step", 0), ("_step", 3), ("_detokenize", 1), ("_detokenize", 4)]
)
def test_a_step_that_raises_can_be_repeated(model: Model, expected, where: str, at: int) -> None:
    server = make_server(model, detokenize=str, draft=NGramDraft(1, 3))
    setattr(server, where, failing_once(getattr(server, where), at))
    for prompt in PROMPTS:
        server.add(prompt, 12, stop_strings=["none"])
    found: dict[int, list[int]] = {}
    failed = 0
    while server.active or server.waiting:
        try:
            for token in server.step():
                found.setdefault(token.request, []).append(token.id)
        except MemoryError:
            failed += 1
    assert (failed, found) == (1, dict(enumerate(expected)))
    assert (server.stats.finished, server.stats.cached_tokens) == (4, 16)
    assert server.scheduler.num_free == server.scheduler.allocator.num_blocks


class Knowing:
    """A draft that is always right."""

    length = 3

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts

    def __call__(self, tokens: list[int]) -> list[int]:
        text = next(text for text in self.texts if text[: len(tokens)] == tokens)
        return text[len(tokens) :]


@pytest.mark.parametrize("cancelled", [0, 1])
def test_a_stream_yields_nothing_of_a_cancelled_request(model, expected, cancelled: int) -> None:
    texts = [prompt + new for prompt, new in zip(PROMPTS, expected, strict=True)]
    server = make_server(model, draft=Knowing(texts))
    for prompt in PROMPTS[:2]:
        server.add(prompt, 12)
    stream = server.stream()
    before = [next(stream) for _ in range(3)]  # of both prefills, and the first of a step
    assert [token.request for token in before] == [0, 1, 0]
    assert server.cancel(cancelled)
    after = [(token.request, token.id) for token in stream]
    other = 1 - cancelled
    assert after == [(other, token) for token in expected[other][2 if other == 0 else 1 :]]


def test_docstring() -> None:
    result = doctest.testmod(jax_flashmla.serve.draft)
    assert result.attempted > 0
    assert result.failed == 0
