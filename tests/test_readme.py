"""The README's code runs as printed."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


def run_example(heading: str, num_lines: int) -> dict:
    """The names that the code under a heading leaves; it has about num_lines, imports aside."""
    section = README.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("import ", "from "))]
    assert len(lines) <= num_lines + 5
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    return names


def test_python_example_runs():
    names = run_example("The API in 30 lines", 30)
    np.testing.assert_array_equal(names["cache"].table.cache_seqlens, [78, 208, 13])
    assert names["cache"].check() == []
    assert names["outs"].shape == (2, 3, 1, 16, 512)
    # Every row of the cache is ones, so every mean of values is.
    assert bool((names["outs"] == jnp.ones((), names["outs"].dtype)).all())


def test_layer_example_runs():
    names = run_example("An attention layer in 20 lines", 20)
    np.testing.assert_array_equal(names["cache"].table.cache_seqlens, [78, 13])
    assert names["cache"].check() == []
    assert names["y"].shape == (2, 1, 2048)
    assert bool(jnp.isfinite(names["y"]).all())


def test_sparse_example_runs():
    names = run_example("Sparse attention in 20 lines", 20)
    np.testing.assert_array_equal(names["cache"].table.cache_seqlens, [188, 28])
    assert names["cache"].check() == []
    assert names["y"].shape == (2, 1, 256)
    assert bool(jnp.isfinite(names["y"]).all())
    config = names["config"]
    assert config.indexer.topk < 180  # so that it does select
    total = names["cache"].format.bytes_per_token + names["cache"].index_format.bytes_per_token
    assert total == 656 + 132  # as its comment says


@pytest.mark.parametrize("last", ["/jax-flashmla demo", "/pytest -n 2 --dist loadfile"])
def test_first_screen_has_the_commands(last):
    """Each a line of its own in a code block, which sets up all that it needs."""
    screen = README.read_text().splitlines()[:28]
    commands = [line for line in screen if line.startswith("python3 -m venv .venv && ")]
    assert [line for line in commands if line.endswith(last)]
    demos = [line for line in commands if line.endswith("/jax-flashmla demo")]
    assert len(demos) == 2  # and without the CUDA compiler
    assert "-C cmake.define.FLASHMLA_CUDA=OFF" in demos[1]
    assert any(line.startswith("![") for line in screen)
