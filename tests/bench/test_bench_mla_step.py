"""benchmarks/bench_mla_step.py at a tiny size."""

import json
import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "bench_mla_step.py"


def test_step_and_kernels_are_timed_and_recorded(tmp_path):
    file = tmp_path / "step.json"
    sizes = "--heads 4 2 --layers 2 --batch 2 --tokens 70 --hidden-size 32 --q-lora-rank 16"
    command = [
        sys.executable,
        "-P",
        str(SCRIPT),
        *sizes.split(),
        "--json",
        str(file),
        "--commit",
        "abc",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("its kernels alone") == 2
    found = json.loads(file.read_text())
    assert (found["layers"], found["tokens"], found["versions"]["jax"] != "") == (2, 70, True)
    assert found["commit"] == "abc"
    assert [step["h_q"] for step in found["steps"]] == [4, 2]
    for step in found["steps"]:
        for timing in (step["step"], step["kernels"]):
            assert 0 < timing["us_min"] <= timing["us"] <= timing["us_max"]
        assert step["cache_bytes"] == 2 * 2 * 70 * 576 * 2
        # w_dq, q_norm, w_uq, w_dkv, kv_norm, w_uk, w_uv, w_o, two layers of bfloat16
        h = step["h_q"]
        numbers = 32 * 16 + 16 + 16 * h * 192 + 32 * 576 + 512 + 2 * h * 128 * 512 + h * 128 * 32
        assert step["weight_bytes"] == 2 * 2 * numbers
