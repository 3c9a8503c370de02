"""examples/generate.py: texts as they come, sampling, tokenizers, errors."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest
import tokenizers

import generate
import golden_models
from deepseek.config import ModelConfig
from deepseek.devices import connect
from deepseek.serve import Server, Token
from deepseek.tokenizer import ByteTokenizer, FileTokenizer, TextStream
from deepseek.weights import load_model

pytestmark = pytest.mark.usefixtures("on_cpu")

V3 = golden_models.GOLDEN / "deepseek_v3"


def expected_text(i: int, directory: pathlib.Path = V3, count: int | None = None) -> str:
    """The prompt and the first `count` tokens that transformers adds."""
    golden = golden_models.load(directory)
    end = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    tokens = [t for t in golden[f"greedy.{i}"].tolist()[:count] if t != end]
    return bytes(golden[f"prompt.{i}"].tolist()).decode() + bytes(tokens).decode(errors="replace")


def test_command_prints_what_transformers_generates(tmp_path):
    prompts = golden_models.maker().PROMPTS
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[1:]))
    script = pathlib.Path(generate.__file__)
    command = [sys.executable, str(script), "--checkpoint", str(V3), "--prompt", prompts[0]]
    command += ["--prompts-file", str(tmp_path / "prompts.txt"), "--batch", "2"]
    command += ["--max-new-tokens", "24", "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == "".join(expected_text(i) + "\n" for i in range(5))
    assert b"tokens/s" in done.stderr


def test_sparse_model_generates_from_an_fp8_cache_past_topk(capsys):
    directory = golden_models.GOLDEN / "deepseek_v32_wide"
    prompt = golden_models.maker().PROMPTS[1]
    options = ["--checkpoint", str(directory), "--prompt", prompt, "--max-new-tokens", "4"]
    out = run(capsys, *options, "--dtype", "bfloat16", "--cache-format", "v32")
    assert out.startswith(expected_text(1, directory, count=2))
    assert generate.main([*options, "--cache-format", "v32", "--dtype", "float32"]) == 2
    assert "--dtype must be bfloat16 or float16 with --cache-format v32" in capsys.readouterr().err
    narrow = [option.replace("v32_wide", "v32") for option in options]
    assert generate.main([*narrow, "--cache-format", "v32"]) == 2
    assert "kv_lora_rank 512 and qk_rope_head_dim 64, got 16 and 8" in capsys.readouterr().err


def run(capsys, *options: str) -> str:
    arguments = ["--checkpoint", str(V3), "--dtype", "float32", "--max-new-tokens", "12"]
    assert generate.main([*arguments, *options]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("name", "devices"), [("deepseek_v32", 2), ("deepseek_v3", 4)])
def test_several_devices_change_no_text(capsys, name, devices):
    directory = golden_models.GOLDEN / name
    options = ["--checkpoint", str(directory), "--max-new-tokens", "24", "--batch", "2"]
    for prompt in golden_models.maker().PROMPTS[:2]:
        options += ["--prompt", prompt]
    out = run(capsys, *options, "--devices", str(devices))
    assert out == "".join(expected_text(i, directory) + "\n" for i in range(2))


def test_devices_have_shares_of_the_weights_and_all_of_the_cache():
    config = ModelConfig.from_directory(V3)
    peers = connect(4, config)
    assert peers.refusal is None  # else sums would not be over peers
    model = load_model(V3, config, dtype=jnp.float32, peers=peers)
    moe = model.layers[1].mlp
    for parameter, split in [
        (model.layers[0].self_attn.w_uk, 0),
        (model.layers[1].self_attn.w_o, 0),
        (model.layers[0].mlp.up_proj, 1),
        (model.layers[0].mlp.down_proj, 0),
        (moe.experts.gate_proj, 2),
        (moe.experts.down_proj, 1),
        (moe.shared_experts.down_proj, 0),
        (model.lm_head.kernel, 1),
        (model.layers[0].self_attn.w_dkv, None),
        (moe.gate.weight, None),
        (model.embed_tokens.embedding, None),
    ]:
        expected = list(parameter.shape)
        if split is not None:
            expected[split] //= 4
        shards = parameter[...].addressable_shards
        assert [list(shard.data.shape) for shard in shards] == [expected] * 4
    server = Server(config, model, batch=1, max_tokens=64, dtype=jnp.float32)
    shapes = {shard.data.shape for shard in server._server.cache.blocks.addressable_shards}
    assert shapes == {server._server.cache.blocks.shape}


def test_stop_token_ends_a_text(capsys):
    golden = golden_models.load(V3)
    prompt = bytes(golden["prompt.2"].tolist()).decode()
    third = golden["greedy.2"].tolist()[2]
    out = run(capsys, "--prompt", prompt, "--stop-token", str(third))
    assert out == prompt + bytes(golden["greedy.2"].tolist()[:2]).decode() + "\n"


def test_drafts_and_shared_beginnings_change_no_text(capsys):
    beginning = "b" * 66
    prompts = ["--prompt", beginning + "c", "--prompt", beginning + "dd", "--batch", "1"]
    prompts += ["--max-new-tokens", "24"]
    expected = run(capsys, *prompts)
    arguments = ["--checkpoint", str(V3), "--dtype", "float32", *prompts, "--speculate", "3"]
    assert generate.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == expected
    assert "; 64 tokens of prompts were in the cache already; " in err
    accepted, drafted = map(int, re.search(r"(\d+) of (\d+) drafted tokens accepted", err).groups())
    assert 0 < accepted <= drafted


def test_stop_string_ends_a_text(capsys):
    text = run(capsys, "--prompt", "ab")
    answer = text.removesuffix("\n").removeprefix("ab")
    assert len(answer) > 5
    assert run(capsys, "--prompt", "ab", "--stop-string", answer[2:4]) == "ab" + answer[:4] + "\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: shutil.rmtree(d), "the checkpoint must be a folder"),
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: edit(d, model_type="llama"), "model_type must be one of .*, got 'llama'"),
        (lambda d: edit(d, hidden_act="gelu"), "hidden_act must be silu"),
        (lambda d: edit(d, n_group=3), "n_group must divide n_routed_experts"),
        (lambda d: edit(d, num_experts_per_tok=7), "topk_group = 2 have num_experts_per_tok = 7"),
        (
            lambda d: edit(d, vocab_size=300),
            "neither tokenizer.json nor tiktoken.model, and its vocabulary of 300",
        ),
        (lambda d: edit(d, topk_method="random"), "no topk_method 'random'"),
        (lambda d: edit(d, first_k_dense_replace=None), "must have the key first_k_dense_replace"),
        (lambda d: (d / "model.safetensors").unlink(), "must hold model.safetensors"),
        (lambda d: edit(d, max_position_embeddings=9), "prompt 0 is too long: 2 tokens"),
    ],
)
def test_bad_checkpoints_are_named(tmp_path, capsys, change, message):
    directory = shutil.copytree(V3, tmp_path / "model")
    change(directory)
    options = ["--checkpoint", str(directory), "--prompt", "ab", "--max-new-tokens", "8"]
    assert generate.main(options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(message, err), err


def edit(directory: pathlib.Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there must be a prompt"),
        (["--prompts-file", "/nowhere/at/all"], "No such file"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be at least 0"),
        (["--prompt", "a", "--top-p", "0"], "top_p must be more than 0"),
        (["--prompt", "a", "--speculate", "-1"], "--speculate must be at least 0, got -1"),
        (
            ["--prompt", "a", "--max-new-tokens", "9", "--stop-string", ""],
            "stop_strings must be non-empty",
        ),
        (["--prompt", "a", "--batch", "0"], "batch must be at least 1"),
        (["--prompt", "a", "--cache-blocks", "0"], "--cache-blocks must be at least 1, got 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (
            ["--prompt", "a", "--max-new-tokens", "-3"],
            "--max-new-tokens must be at least 1, got -3",
        ),
        (["--prompt", "a", "--devices", "0"], "--devices must be between 1 and the"),
        (["--prompt", "a", "--devices", "999"], "--devices must be between 1 and the"),
        (
            ["--prompt", "a", "--devices", "3"],
            "--devices must divide the model's num_attention_heads = 4, moe_intermediate_size = 16",
        ),
        (["--prompt", ""], "prompt 0 must have at least one token"),
    ],
)
def test_bad_options_are_named(capsys, options, message):
    assert generate.main(["--checkpoint", str(V3), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_is_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    prompts = ["one\u2028still", "form\ffeed", "\x85\x1c\v", " ", "tab\t\rback"]
    file.write_bytes("\n".join(prompts).encode())
    assert generate.read_lines(file) == prompts
    file.write_bytes(b"dos\r\nline\r\n")
    assert generate.read_lines(file) == ["dos", "line"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb\n", "line 2 is empty"),
        (b"", "line 1 is empty"),
        (b"a\r\n\r\n", "line 2 is empty"),
        (b"\xff", "must be in UTF-8"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path, capsys, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert generate.main(["--checkpoint", str(V3), "--prompts-file", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_tokens_outside_the_vocabulary_are_refused(tmp_path, capsys):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"w": 256}, unk_token="w"))
    directory = shutil.copytree(V3, tmp_path / "model")
    tokenizer.save(str(directory / "tokenizer.json"))
    assert generate.main(["--checkpoint", str(directory), "--prompt", "w"]) == 2
    assert "prompt 0 has the token 256, the model's vocabulary only 256" in capsys.readouterr().err


def test_tokenizer_file_is_used_where_there_is_one(tmp_path, capsys):
    directory = shutil.copytree(V3, tmp_path / "model")
    vocabulary = {f"w{i}": i for i in range(256)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    golden = golden_models.load(V3)
    prompt = " ".join(f"w{t}" for t in golden["prompt.3"])
    out = run(capsys, "--checkpoint", str(directory), "--prompt", prompt)
    words = " ".join(f"w{t}" for t in golden["greedy.3"].tolist()[:12])
    assert out == f"{prompt}{words}\n"
    assert FileTokenizer(directory / "tokenizer.json").encode("w7 w3") == [7, 3]


def test_texts_are_streamed_in_order(capsys):
    shown = []

    def tokens():
        for prompt, text, last in (
            (1, "b", False),
            (0, "a", False),
            (1, "B", True),
            (0, "A", True),
        ):
            yield Token(prompt, ord(text), last)
            shown.append(capsys.readouterr().out)

    generate.print_in_order(tokens(), ["0:", "1:"], ByteTokenizer(), frozenset())
    assert shown == ["0:", "a", "", "A\n1:bB\n"]


def test_characters_are_not_cut():
    text = "é€😀!"
    stream = TextStream(ByteTokenizer())
    pieces = [stream.add(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.add("é".encode()[0]) == ""
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"


def test_a_long_text_is_not_decoded_anew_for_each_token():
    class Spaced:
        """Words, joined by spaces; 0 has no text."""

        most = 0

        def decode(self, tokens):
            self.most = max(self.most, len(tokens))
            return " ".join(f"w{token}" for token in tokens if token)

    tokenizer = Spaced()
    stream = TextStream(tokenizer)
    tokens = [0, 1, 0, 0, 2, *range(3, 500), 0]
    assert "".join(map(stream.add, tokens)) + stream.end() == tokenizer.decode(tokens)
    tokenizer.most = 0
    stream.add(1)
    assert tokenizer.most <= 3
