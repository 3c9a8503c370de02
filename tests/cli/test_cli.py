"""The command line: what it accepts, what it checks, what it says."""

import argparse
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla
import naive
from jax_flashmla import PagedCache, __version__
from jax_flashmla.bench.naive import step_errors
from jax_flashmla.cli import main, model, workload

# A prompt without tokens, one that ends a block, one that fills several: 5 steps cross into new
# blocks in two of them.
SMALL = ("demo", "--lengths", "0,62,130", "--heads", "3", "--layers", "2", "--steps", "5")


def parse(*options: str) -> workload.Workload:
    parser = argparse.ArgumentParser()
    workload.add_arguments(parser)
    return workload.from_arguments(parser.parse_args(options))


@pytest.mark.parametrize(
    "text",
    [
        "5,300,17",
        "5 300 17",
        "5,\n300\t17\n",
        "# tokens\n5, 300 # long, 9\n17#8",
        "#1\r\n5 300 17 #",
    ],
)
def test_lengths_from_option_and_file(text, tmp_path):
    file = tmp_path / "lengths.txt"
    file.write_text(text)
    assert parse("--lengths", text).lengths == (5, 300, 17)
    assert parse("--lengths-file", str(file), "--batch", "3").lengths == (5, 300, 17)


def test_drawn_lengths_are_ragged_and_follow_the_seed():
    drawn = parse("--batch", "32", "--seed", "3").lengths
    assert drawn == parse("--batch", "32", "--seed", "3").lengths
    assert drawn != parse("--batch", "32", "--seed", "4").lengths
    assert len(drawn) == 32
    assert len(set(drawn)) > 16
    assert 1 <= min(drawn) <= max(drawn) <= workload.MAX_DRAWN_LENGTH


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "5,x"], "lengths must be integers, got 'x'"),
        (["--lengths", "5,-1"], "lengths must not be negative, got -1"),
        (["--lengths", ""], "lengths must name at least one sequence"),
        (["--lengths", "5,6", "--batch", "3"], "batch is 3, but 2 lengths are given"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--heads", "0"], "heads must be at least 1, got 0"),
        (["--layers", "0"], "layers must be at least 1, got 0"),
        (["--steps", "-2"], "steps must be at least 1, got -2"),
        (["--seed", "-1"], "--seed: must be an integer from 0 to 2^31 - 1, got '-1'"),
        (["--lengths-file", "no-such-file"], "No such file"),
        (["--lengths", "5", "--lengths-file", "f"], "not allowed with"),
        (["--dtype", "float64"], "invalid choice"),
        (["--lengths", "# 5"], "lengths must name at least one sequence"),
        (["--lengths", "5," * 16385], "batch must be at most 16384, got 16385"),
        (
            ["--lengths", "99999999999", "--steps", "1"],
            "must be at most 2147483647, got 400000000000",
        ),
        (["--layers", "99999999"], "layers * batch * (longest length + steps) must be at most"),
        (["--heads", "2147483647"], "batch * heads must be at most 2147483647, got 17179869176"),
    ],
)
def test_bad_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_demo_matches_and_reports(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(SMALL) == 0
    said = capsys.readouterr().out
    assert "all 5 steps match" in said
    assert "flashmla_dense_decode_v1 x 2" in said
    assert "3 sequences, prompts of 0 to 130 tokens" in said
    assert "blocks │ 6 of 64 tokens" in " ".join(said.split())  # 1 + 2 + 3
    assert "tokens/s" in said
    # 576 values against 3 heads of 192 + 128, 2 bytes each
    assert "1,152 in each layer" in said
    assert "1,920, 1.7 times" in said


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_demo_runs_in_other_types(capsys, dtype):
    assert main([*SMALL, "--dtype", dtype]) == 0
    assert dtype in capsys.readouterr().out


def test_wrong_attention_in_float32_is_a_failure(capsys, monkeypatch):
    """Its tolerance is not so wide that a rounding to 16 bits would pass."""
    real = model.dense_decode

    def rounds(q, blocks, *arguments, **options):
        out, lse = real(q, blocks, *arguments, **options)
        return out.astype(jnp.bfloat16).astype(out.dtype), lse

    monkeypatch.setattr(model, "dense_decode", rounds)
    assert main([*SMALL, "--dtype", "float32"]) == 1
    assert "MISMATCH against naive attention in 5 of 5 steps" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"jax-flashmla {__version__}\n"


def test_wrong_attention_is_a_failure(capsys, monkeypatch):
    real = model.dense_decode

    def forgets_the_newest_token(q, blocks, block_table, cache_seqlens, **options):
        return real(q, blocks, block_table, cache_seqlens - 1, **options)

    monkeypatch.setattr(model, "dense_decode", forgets_the_newest_token)
    assert main(SMALL) == 1
    assert "MISMATCH against naive attention in 5 of 5 steps" in capsys.readouterr().out


def test_nan_in_one_place_is_a_failure(capsys, monkeypatch):
    real = model.dense_decode

    def spoils_one_value(*arguments, **options):
        out, lse = real(*arguments, **options)
        return out.at[1, 0, 2, 7].set(jnp.nan), lse

    monkeypatch.setattr(model, "dense_decode", spoils_one_value)
    assert main(SMALL) == 1
    assert "MISMATCH" in capsys.readouterr().out


def test_lost_rows_are_a_failure(capsys, monkeypatch):
    real = PagedCache.write

    def loses_a_layer(self, rows, slots, *, layer=None, **options):
        lost = isinstance(layer, int) and layer == 1  # a decoding step's; a prompt's is traced
        return self if lost else real(self, rows, slots, layer=layer, **options)

    monkeypatch.setattr(PagedCache, "write", loses_a_layer)
    assert main(SMALL) == 1
    assert "MISMATCH" in capsys.readouterr().out


def test_naive_check_agrees_with_float64():
    """The demo's judge is itself judged: by the tests' own, in NumPy."""
    rng = np.random.default_rng(0)
    layers, b, h_q, d_qk, d_v, lengths = 2, 2, 3, 8, 5, np.array([4, 7], np.int32)
    history = rng.normal(size=(layers, b, 7, d_qk)).astype(np.float32)
    q = rng.normal(size=(layers, b, h_q, d_qk)).astype(np.float32)
    out, lse = np.zeros((layers, b, h_q, d_v)), np.zeros((layers, b, h_q))
    for layer, sequence in np.ndindex(layers, b):
        keys = history[layer, sequence, : lengths[sequence]]
        out[layer, sequence], lse[layer, sequence] = naive.attend(
            q[layer, sequence], keys, d_v=d_v, sm_scale=0.5
        )

    def errors(out, lse):
        arrays = [jnp.asarray(x, jnp.float32) for x in (history, q, out, lse)]
        return step_errors(arrays[0], jnp.asarray(lengths), *arrays[1:], d_v=d_v, sm_scale=0.5)

    assert max(map(float, errors(out, lse))) < 1e-5
    out[1, 0, 2, 3] += 0.25
    lse[0, 1, 0] -= 0.125
    spoilt = errors(out, lse)
    assert float(spoilt.out_absolute) == pytest.approx(0.25, rel=1e-3)
    assert float(spoilt.lse) == pytest.approx(0.125 / (1 + abs(lse[0, 1, 0] + 0.125)), rel=1e-3)


def test_info_says_what_runs_here(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    for expected in ("jaxlib", "CPU kernels", "CUDA kernels"):
        assert expected in said
    for operation in ("dense_decode", "sparse_decode", "sparse_prefill", "index_topk"):
        assert f"custom call flashmla_{operation}_v1 x 1" in said
    assert "WRONG" not in said
    assert "fails" not in said


def test_info_as_json_needs_no_terminal_package(capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "rich" else real(name)
    )
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
    monkeypatch.setenv("SOME_TOKEN", "secret")
    assert main(["info", "--json"]) == 0
    said = capsys.readouterr().out
    found = json.loads(said)
    assert found["versions"]["jax"] == jax.__version__
    assert found["environment"]["XLA_FLAGS"] == "--xla_dump_to=/nowhere"
    assert "secret" not in said
    assert set(found["kernels"]) == {"cpu", "cuda"}
    assert len(found["devices"]) >= jax.local_device_count()
    assert all(device["right"] for device in found["devices"])
    monkeypatch.setattr(jax_flashmla, "dense_decode", lambda *arguments: 1 / 0)
    assert main(["info", "--json"]) == 1
    assert "ZeroDivisionError" in json.loads(capsys.readouterr().out)["devices"][0]["dense_decode"]


def test_info_notices_a_wrong_result_and_a_failure(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    real = jax_flashmla.dense_decode

    def wrong(*arguments):
        out, lse = real(*arguments)
        return out * 2, lse

    def fails(*arguments):
        raise RuntimeError("[no] such thing")

    for decode, said in ((wrong, "WRONG RESULT"), (fails, "fails: RuntimeError: [no] such thing")):
        monkeypatch.setattr(jax_flashmla, "dense_decode", decode)
        assert main(["info"]) == 1
        assert said in capsys.readouterr().out


def test_info_notices_a_wrong_selection(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    real = jax_flashmla.index_topk
    monkeypatch.setattr(jax_flashmla, "index_topk", lambda *a, **options: real(*a, **options) + 1)
    assert main(["info"]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG RESULT" in line]
    assert wrong
    assert all("index_topk" in line for line in wrong)


def test_without_rich_it_says_what_to_install(capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "rich" else real(name)
    )
    assert main(["info"]) == 2
    assert "pip install 'jax-flashmla[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["--help"], ["demo", "--help"], ["bench", "--help"]])
def test_help_loads_no_plotting_and_no_terminal_package(command):
    script = f"""
import sys
from jax_flashmla.cli import main
try:
    main({command!r})
except SystemExit as stopped:
    assert stopped.code == 0
assert not {{"matplotlib", "rich"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True
    )
    assert "usage: jax-flashmla" in done.stdout
