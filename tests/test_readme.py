"""The README's code runs as printed."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_python_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 1
    assert (
        sum(bool(line.strip()) for line in blocks[0].splitlines()) <= 36
    )  # "30 lines", imports aside
    names: dict = {}
    exec(compile(blocks[0], str(README), "exec"), names)
    np.testing.assert_array_equal(names["cache"].table.cache_seqlens, [78, 208, 13])
    assert names["cache"].check() == []
    assert names["outs"].shape == (2, 3, 1, 16, 512)
    # Every row of the cache is ones, so every mean of values is.
    assert bool((names["outs"] == jnp.ones((), names["outs"].dtype)).all())


@pytest.mark.parametrize("last", ["/jax-flashmla demo", "/pytest"])
def test_first_screen_has_the_commands(last):
    """Each a line of its own in a code block, which sets up all that it needs."""
    screen = README.read_text().splitlines()[:28]
    commands = [line for line in screen if line.startswith("python3 -m venv .venv && ")]
    assert [line for line in commands if line.endswith(last)]
