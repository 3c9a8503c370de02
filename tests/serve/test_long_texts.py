"""A step costs the host no more with longer texts: what is looked at, and that it suffices."""

from __future__ import annotations

import numpy as np
import pytest

from jax_flashmla.serve import NGramDraft, Sampling
from jax_flashmla.serve.ends import reason_to_end
from jax_flashmla.serve.request import Request

SPECIAL = 256  # and all past it: tokens without text


def detokenize(tokens: list[int]) -> str:
    """Of bytes; as some tokenizers do, without the text's first space."""
    return bytes(t for t in tokens if t < SPECIAL).decode(errors="replace").removeprefix(" ")


def request_of(stop_strings: tuple[str, ...], prompt: list[int], count: int) -> Request:
    return Request(
        0, list(prompt), len(prompt), count, Sampling(), frozenset([300]), stop_strings, list
    )


def end_of(request: Request, chosen: list[list[int]], detokenize) -> tuple[int, str | None]:
    """After how many tokens a request ends that gets these in each of its steps, and why."""
    for new in chosen:
        for i in range(len(new)):
            reason = reason_to_end(request, new[: i + 1], detokenize)
            if reason is not None:
                return len(request.tokens) + i + 1 - request.prompt_length, reason
        request.tokens += new
    return -1, None


@pytest.mark.parametrize("seed", range(40))
def test_a_stop_string_ends_a_request_where_it_does_in_the_whole_text(seed: int) -> None:
    rng = np.random.default_rng(seed)
    alphabet = [*"aé€😀 ".encode(), 97, 97, SPECIAL, SPECIAL + 1]
    text = rng.choice(alphabet, 300, p=rng.dirichlet([0.5] * len(alphabet))).tolist()
    whole = [detokenize(text[: i + 1]) for i in range(len(text))]
    at = int(rng.integers(1, 300))
    strings = (whole[-1][-int(rng.integers(1, 12)) :], whole[at][-int(rng.integers(1, 40)) :], "é€")
    strings = tuple(string for string in strings if string)
    cuts = np.sort(rng.choice(np.arange(1, 300), 60, replace=False))
    steps = [part.tolist() for part in np.split(np.array(text), cuts)]
    expected = next((i + 1 for i, t in enumerate(whole) if any(s in t for s in strings)), 300)
    reason = "stop" if any(s in whole[expected - 1] for s in strings) else "length"
    prompt = list("é€😀 a".encode())  # whose text does not count
    request = request_of(strings, prompt, 300)
    assert end_of(request, steps, detokenize) == (expected, reason)


@pytest.mark.parametrize("stop", ["stop!", "\ud800"])
def test_any_string_may_end_a_request(stop: str) -> None:
    request = request_of((stop,), [1], 50)
    pieces = {97: "a", 98: stop}
    steps = [[97]] * 40 + [[98]]
    assert end_of(request, steps, lambda tokens: "".join(map(pieces.get, tokens))) == (41, "stop")


def test_stop_strings_are_sought_in_the_last_tokens_alone() -> None:
    seen = []

    def counting(tokens: list[int]) -> str:
        seen.append(len(tokens))
        return detokenize(tokens)

    request = request_of(("stop!",), [1] * 5000, 3000)
    steps = [[97]] * 2000 + [[b] for b in b"stop!"]
    assert end_of(request, steps, counting) == (2005, "stop")
    assert max(seen) < 40


class Counting(list):
    """Tokens, and how many of them were read."""

    read = 0

    def __getitem__(self, i):
        found = super().__getitem__(i)
        self.read += len(found) if isinstance(i, slice) else 1
        return found


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_draft_that_follows_proposes_what_one_of_the_whole_text_does(n: int) -> None:
    rng = np.random.default_rng(n)
    draft, tokens = NGramDraft(n=n, length=4), Counting()
    propose = draft.follow(tokens)
    for _ in range(200):
        text = list(tokens)
        starts = [i for i in range(len(text) - n) if text[i : i + n] == text[-n:]]
        expected = text[starts[-1] + n :][:4] if starts else []
        assert propose() == draft(text) == expected
        tokens += rng.integers(0, 4, int(rng.integers(0, 4))).tolist()
    tokens += range(5000)
    propose()
    tokens.read = 0
    for token in range(100):
        tokens.append(token)
        propose()
    assert tokens.read < 100 * (2 * n + draft.length + 1)
