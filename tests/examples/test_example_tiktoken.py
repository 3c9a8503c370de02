"""Kimi K2's vocabulary in the example, on a small one of the same form."""

from __future__ import annotations

import base64
import json
import shutil
import sys

import pytest

import generate
import golden_models
from deepseek.tiktoken_vocabulary import MAX_RUN, TiktokenTokenizer
from deepseek.tokenizer import TextStream, load_tokenizer

MERGED = [
    b"he",
    b"ll",
    b"hell",
    b"hello",
    b" hello",
    "你".encode()[:2],
    "你".encode(),
    "好".encode(),
]
FIRST_SPECIAL = 256 + len(MERGED)
SPECIAL = {FIRST_SPECIAL: "[BOS]", FIRST_SPECIAL + 2: "<|im_end|>"}
VOCABULARY = 280


def write(directory, tokens=None, special=SPECIAL):
    tokens = [*(bytes([i]) for i in range(256)), *MERGED] if tokens is None else tokens
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    (directory / "tiktoken.model").write_bytes(b"".join(lines))
    added = {str(i): {"content": name, "special": True} for i, name in special.items()}
    config = json.dumps({"added_tokens_decoder": added, "tokenizer_class": "TikTokenTokenizer"})
    (directory / "tokenizer_config.json").write_text(config)
    return directory / "tiktoken.model"


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture
def tokenizer(tmp_path):
    pytest.importorskip("tiktoken")
    write(tmp_path)
    return load_tokenizer(tmp_path, "auto", VOCABULARY)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("hello hello", [259, 260]),
        ("hell", [258]),
        ("你好", [262, *bytes_of("好")]),  # merges follow the ranks: no pair of bytes leads to 好
        ("a[BOS]b", [97, FIRST_SPECIAL, 98]),
        ("<|im_end|>", [FIRST_SPECIAL + 2]),
        (f"<|reserved_token_{FIRST_SPECIAL + 1}|>", [FIRST_SPECIAL + 1]),
        ("[EOS]", bytes_of("[EOS]")),  # no special token's name here
        ("", []),
    ],
)
def test_text_to_tokens(tokenizer, text, tokens):
    assert isinstance(tokenizer, TiktokenTokenizer)
    assert tokenizer.encode(text) == tokens


@pytest.mark.parametrize("text", ["hello 你好!\n\n  x1234 don't É", "\u2028\f\t", "😀" * 3])
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    stream = TextStream(tokenizer)
    assert "".join(stream.add(token) for token in tokenizer.encode(text)) + stream.end() == text


def test_words_are_cut_as_the_model_has_learnt(tokenizer):
    words = tokenizer._encoding._pat_str
    regex = pytest.importorskip("regex")
    found = [m[0] for m in regex.finditer(f"(?V1){words}", "Don't 你好ab 12345 x!\n\n  y")]
    assert found == ["Don't", " ", "你好", "ab", " ", "123", "45", " x", "!\n\n", " ", " y"]


def test_special_and_unnamed_tokens_are_left_out_of_texts(tokenizer):
    assert tokenizer.decode([104, FIRST_SPECIAL, VOCABULARY - 1, 105]) == "hi"


@pytest.mark.parametrize("run", ["a", " ", "你"])
def test_long_runs(tokenizer, run):
    text = run * (3 * MAX_RUN + 5)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "tiktoken.model").write_text("aGk= x\n"), "line 1 must be a token"),
        (lambda d: (d / "tiktoken.model").write_text("aGk=\n"), "line 1 must be a token"),
        (lambda d: (d / "tiktoken.model").write_text("?? 0\n"), "line 1 must be a token"),
        (lambda d: (d / "tiktoken.model").write_text("aGk= 1\n"), "each rank from 0 on"),
        (lambda d: (d / "tiktoken.model").write_text(""), "each rank from 0 on"),
        (lambda d: write(d, [b"a"]), "a token for every byte, it lacks 0"),
        (lambda d: (d / "tokenizer_config.json").write_text("[]"), "added_tokens_decoder"),
        (lambda d: (d / "tokenizer_config.json").write_text('{"x": {}}'), "added_tokens_decoder"),
    ],
)
def test_bad_files_are_named(tmp_path, spoil, message):
    pytest.importorskip("tiktoken")
    write(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path, "auto", VOCABULARY)


def test_more_tokens_than_the_model_has_are_refused(tmp_path):
    pytest.importorskip("tiktoken")
    write(tmp_path)
    with pytest.raises(ValueError, match=f"has {FIRST_SPECIAL} tokens, the model only 260"):
        load_tokenizer(tmp_path, "auto", 260)


@pytest.mark.usefixtures("on_cpu")
def test_without_tiktoken_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    directory = shutil.copytree(golden_models.GOLDEN / "deepseek_v3", tmp_path / "model")
    write(directory)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert generate.main(["--checkpoint", str(directory), "--prompt", "a"]) == 2
    assert "pip install tiktoken" in capsys.readouterr().err
