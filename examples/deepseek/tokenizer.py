"""Text to tokens and back."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Protocol

from deepseek.tiktoken_vocabulary import TiktokenTokenizer


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...


class ByteTokenizer:
    """A token for each byte of the text in UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json, special tokens included where it adds them."""

    def __init__(self, path: pathlib.Path) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens))


def load_tokenizer(directory: pathlib.Path, kind: str, vocab_size: int) -> Tokenizer:
    """The directory's tokenizer, or bytes.

    Args:
        directory: of the checkpoint.
        kind: "bytes"; or "auto" for tokenizer.json or Kimi K2's tiktoken.model where there is one,
            else for bytes if the model's vocabulary is that of bytes.
        vocab_size: of the model.

    Raises:
        ImportError: the package that reads the file is missing.
        ValueError: there is neither file and the vocabulary is not of 256 tokens, or is smaller; or
            a file is not what it should be.
    """
    path = directory / "tokenizer.json"
    if kind == "auto" and path.is_file():
        return FileTokenizer(path)
    path = directory / "tiktoken.model"
    if kind == "auto" and path.is_file():
        return TiktokenTokenizer(path, vocab_size)
    if vocab_size < 256 or (kind == "auto" and vocab_size != 256):
        raise ValueError(
            f"{directory} has neither tokenizer.json nor tiktoken.model, and its vocabulary of "
            f"{vocab_size} tokens is not that of bytes"
            + (" (--tokenizer bytes forces it)" if vocab_size > 256 else "")
        )
    return ByteTokenizer()


class TextStream:
    """Turns tokens that come one by one into text, a piece at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # those of the last piece, then those of the next
        self._given = 0  # tokens of the last piece

    def add(self, token: int) -> str:
        """What the token adds to the text; nothing while a character is incomplete."""
        self._tokens.append(token)
        piece = self.end()
        if piece and not piece.endswith("\N{REPLACEMENT CHARACTER}"):
            del self._tokens[: self._given]
            self._given = len(self._tokens)
            return piece
        return ""

    def end(self) -> str:
        """The rest."""
        given = self._tokenizer.decode(self._tokens[: self._given])
        return self._tokenizer.decode(self._tokens)[len(given) :]
