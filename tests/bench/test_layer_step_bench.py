"""The benchmark of whole layers: what it counts, checks and shows."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from jax_flashmla.bench import report
from jax_flashmla.bench.ahead import compile_shapes
from jax_flashmla.bench.kernel_table import profile_kernels, short_name
from jax_flashmla.bench.layer_step import OPERATION, calls, shapes
from jax_flashmla.bench.limits import Limits
from jax_flashmla.bench.measure import METHODS
from jax_flashmla.bench.measure_shape import measure_shape
from jax_flashmla.bench.setup import Setup
from jax_flashmla.layers import MLAParams

TINY = shapes.Shape(2, 4, 100, "tiny")


@pytest.mark.parametrize("model", ["v3", "v32", "tiny_v32"])
def test_weight_bytes_are_those_of_the_layer(model: str) -> None:
    shape = shapes.Shape(32, 16, 4096, model)
    arrays = jax.tree.leaves(MLAParams.shapes(calls.config_of(shape), jnp.bfloat16))
    matrices = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays if len(a.shape) > 1)
    assert shape.weight_bytes == matrices


def test_grids_fit_an_h100_and_are_distinct() -> None:
    for grid in OPERATION.grids.values():
        found = grid.shapes()
        assert len(set(found)) == len(found)
        assert all(calls.memory(shape, None) < 70e9 for shape in found)


@pytest.fixture
def setup(monkeypatch):
    monkeypatch.setattr(shapes, "LAYERS", 2)
    method = dataclasses.replace(METHODS["cpu"], samples=1)
    limits = Limits(10.0, "any", 0.1, "any", 0.0)
    return Setup(jax.local_devices(backend="cpu")[0], method, limits, "bfloat16", 64, False)


def measure(setup):
    """TINY's result."""
    lower = functools.partial(calls.programs, TINY, None, setup, with_xla=False)
    (programs,) = compile_shapes([lower])
    return measure_shape(OPERATION, TINY, None, setup, programs)


def test_a_shape_is_measured_against_its_parts(setup) -> None:
    result = measure(setup)
    assert result["limit_us"] == result["alone_us"] + result["read_once_us"]
    assert result["read_once_us"] == TINY.weight_bytes / 10.0 / 1e3
    assert result["relative_error"] < 1e-2
    assert result["us"] > result["alone_us"] > 0


def test_a_wrong_layer_is_not_timed(setup, monkeypatch) -> None:
    right = calls.decode

    def wrong(*arguments, implementation, **options):
        cache, y = right(*arguments, implementation=implementation, **options)
        return cache, y if implementation == "xla" else y * 1.5

    monkeypatch.setattr(calls, "decode", wrong)
    calls.step.clear_cache()
    with pytest.raises(AssertionError, match="wrong result"):
        measure(setup)
    calls.step.clear_cache()


def test_kernel_tables() -> None:
    name = "void flashmla::sm90::merge::merge_kernel<bf16, 512>(Params, int)"
    assert short_name(name) == "merge::merge_kernel<bf16, 512>"
    assert short_name("loop_add_fusion_12") == "loop_add_fusion"
    kernels = [
        {"name": "a", "launches": 2.0, "us": 3.0},
        {"name": "b", "launches": 1.0, "us": 1.5},
    ]
    result = {**dataclasses.asdict(TINY), "us": 5.25, "kernels": kernels}
    text = report.kernel_tables({"operation": "layer_step", "shapes": [result, {}]})
    assert "b=2 h_q=4 s_k=100 model=tiny" in text
    assert "     4.50 us   3.00 x  together" in text


def test_a_cpu_shows_no_kernels() -> None:
    double = jax.jit(lambda x: x * 2)
    assert profile_kernels(lambda: double(jnp.ones(3)), 1, runs=1) == []
