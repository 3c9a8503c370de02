"""What ends a request: a stop token, a stop string, or its length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax_flashmla.serve.request import Request

Detokenize = Callable[[list[int]], str]
CUT_OFF = 4  # characters that may be others where a text is cut off before them


def reason_to_end(
    request: Request, new: Sequence[int], detokenize: Detokenize | None
) -> str | None:
    """Why a request ends with the last of its new tokens, if it does: "stop" or "length"."""
    if new[-1] in request.stop_tokens:
        return "stop"
    if request.stop_strings and detokenize is not None:
        longest = max(map(len, request.stop_strings))
        text = _last_text(request, new, longest, detokenize)
        if any(string in text for string in request.stop_strings):
            return "stop"
    return "length" if request.left == len(new) else None


def _last_text(request: Request, new: Sequence[int], size: int, detokenize: Detokenize) -> str:
    """The end of the generated text: the last token's, and `size` characters before it at least.

    What came before has been looked at with the tokens before, and would take longer with every
    token. A token is a quarter of a character or more, unless it is left out of the text.
    """
    size += CUT_OFF
    count = 4 * size + 1
    while True:
        known = max(request.prompt_length, len(request.tokens) + len(new) - count)
        tail = [*request.tokens[known:], *new][-count:]
        text = detokenize(tail)
        if len(tail) < count:  # the whole
            return text
        if len(text) >= size + len(detokenize(tail[-1:])):
            return text[CUT_OFF:]
        count *= 2
