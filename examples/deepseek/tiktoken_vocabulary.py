"""Kimi K2's tokenizer: byte pairs by rank in tiktoken.model, special tokens in a config beside it.

As its checkpoint's tokenization_kimi.py has it; needs the package tiktoken.
"""

from __future__ import annotations

import base64
import itertools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

# How text is cut into words before their bytes are merged. Han characters are words of their own;
# other words are letters of one script, perhaps with one other character before them.
_NOT_HAN = r"&&[^\p{Han}]"
_UPPER, _LOWER = (
    rf"[{case}\p{{Lm}}\p{{Lo}}\p{{M}}{_NOT_HAN}]" for case in (r"\p{Lu}\p{Lt}", r"\p{Ll}")
)
_BEFORE, _CONTRACTION = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
WORDS = "|".join(
    (
        r"[\p{Han}]+",
        _BEFORE + _UPPER + "*" + _LOWER + "+" + _CONTRACTION,
        _BEFORE + _UPPER + "+" + _LOWER + "*" + _CONTRACTION,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# tiktoken fails on very long texts, and on long runs with or without white space.
MAX_CHARACTERS, MAX_RUN = 400_000, 25_000


class TiktokenTokenizer:
    """tiktoken.model and, for the special tokens' names, tokenizer_config.json beside it.

    Args:
        path: of tiktoken.model.
        vocab_size: of the model; ids past the file's are special tokens.

    Raises:
        ImportError: the package tiktoken is missing.
        ValueError: a file is not what it should be, or has more tokens than the model.
    """

    def __init__(self, path: pathlib.Path, vocab_size: int) -> None:
        try:
            import tiktoken
        except ImportError:
            raise ImportError(f"{path} needs the package tiktoken: pip install tiktoken") from None
        ranks = _read_ranks(path)
        self._first_special = len(ranks)
        if len(ranks) > vocab_size:
            raise ValueError(f"{path} has {len(ranks)} tokens, the model only {vocab_size}")
        names = _read_special(path.with_name("tokenizer_config.json"))
        special = {
            names.get(i, f"<|reserved_token_{i}|>"): i for i in range(len(ranks), vocab_size)
        }
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special
        )

    def encode(self, text: str) -> list[int]:
        """Special tokens in the text become their ids."""
        return [
            token
            for part in _parts(text)
            for token in self._encoding.encode(part, allowed_special="all")
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens are left out."""
        return self._encoding.decode([token for token in tokens if token < self._first_special])


def _parts(text: str) -> list[str]:
    """Short enough for tiktoken."""
    parts = []
    for start in range(0, len(text), MAX_CHARACTERS):
        part = text[start : start + MAX_CHARACTERS]
        runs = rf"\s{{{MAX_RUN}}}(?=\s)|\S{{{MAX_RUN}}}(?=\S)"
        cuts = [0, *(run.end() for run in re.finditer(runs, part)), len(part)]
        parts += [part[a:b] for a, b in itertools.pairwise(cuts)]
    return parts


def _read_ranks(path: pathlib.Path) -> dict[bytes, int]:
    """Lines of a token's bytes in base 64, a space, and its id; the ids count from 0."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(
                f"{path}, line {number} must be a token in base 64 and its rank, got {line[:60]!r}"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ValueError(f"{path} must give each rank from 0 on to one token")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{path} must have a token for every byte, it lacks {missing[0]}")
    return ranks


def _read_special(path: pathlib.Path) -> dict[int, str]:
    """Names by id, where the file has any."""
    if not path.is_file():
        return {}
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        return {int(i): token["content"] for i, token in config["added_tokens_decoder"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} must be JSON in which added_tokens_decoder has the special tokens by id, each "
            "with its content"
        ) from None
