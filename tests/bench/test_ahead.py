"""Programs that are compiled at once before shapes are measured, and the clock of a run."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla.bench import ahead
from jax_flashmla.bench.ahead import compile_shapes
from jax_flashmla.bench.noise import host_normal, runs
from jax_flashmla.bench.stopwatch import Stopwatch

THREE = jax.ShapeDtypeStruct((3,), jnp.float32)


def test_one_shape_s_failure_is_raised_in_its_turn():
    def fails():
        raise ValueError("of this shape")

    double = jax.jit(lambda x: x * 2)
    first, failed, last = compile_shapes(
        [lambda: {"kernel": double.lower(THREE)}, fails, lambda: {"xla": double.lower(THREE)}]
    )
    assert isinstance(failed, ValueError)
    assert first["kernel"](jnp.arange(3.0)).tolist() == [0, 2, 4]
    assert set(last) == {"xla"}
    with pytest.raises(TypeError):  # compiled for other arguments
        last["xla"](jnp.arange(4.0))


def test_a_program_that_does_not_compile_costs_no_other():
    class Lowered:
        def compile(self):
            raise RuntimeError("XLA says no")

    (found,) = compile_shapes([lambda: {"kernel": jax.jit(jnp.sum).lower(THREE), "xla": Lowered()}])
    assert found["kernel"](jnp.ones(3)) == 3
    for _ in range(2):
        with pytest.raises(RuntimeError, match="XLA says no"):
            found["xla"](jnp.ones(3))


def test_programs_are_compiled_at_the_same_time(monkeypatch):
    """Each waits for all the others."""
    monkeypatch.setattr(ahead, "THREADS", 4)
    together = threading.Barrier(4, timeout=20)

    class Lowered:
        def compile(self):
            together.wait()
            return together.wait

    found = compile_shapes([lambda: {"kernel": Lowered(), "xla": Lowered()}] * 2)
    assert all(program.error is None for programs in found for program in programs.values())


def test_runs_go_round():
    numbers = np.array([7, 3, 9, 1])
    found = runs(numbers, np.array([0, 3, 2]), 4)
    assert found.tolist() == [[7, 3, 9, 1], [1, 7, 3, 9], [9, 1, 7, 3]]
    assert found.dtype == np.int32


def test_numbers_of_another_seed_begin_elsewhere():
    one, other = (host_normal((2, 5), np.float32, seed) for seed in (0, 1))
    assert one.shape == other.shape == (2, 5)
    assert not np.intersect1d(one, other).size
    long = host_normal((3 << 21,), np.float32, 3)  # more than are drawn
    assert np.array_equal(long[:1000], long[1 << 22 :][:1000])
    assert np.array_equal(long[: 1 << 20], host_normal((1 << 20,), np.float32, 3))


def test_a_stopwatch_adds_up(monkeypatch):
    times = iter([10.0, 10.5, 20.0, 20.25, 30.0, 31.0])
    monkeypatch.setattr("jax_flashmla.bench.stopwatch.time.perf_counter", lambda: next(times))
    watch = Stopwatch()
    with watch("make"):
        pass
    with watch("time"):
        pass
    with pytest.raises(ZeroDivisionError), watch("make"):
        raise ZeroDivisionError
    assert watch.seconds == {"make": 1.5, "time": 0.25}
