"""Samples, arguments and errors of the benchmark."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla.bench.attention_error import attention_error, heads_at
from jax_flashmla.bench.measure import METHODS, take_samples
from jax_flashmla.bench.noise import COUNT, host_normal
from jax_flashmla.bench.order import spread


def test_samples_are_medians_of_the_time_of_a_call():
    """A run takes 2 ms, whatever starts and ends a sample 1 ms: that is not in it."""
    asked = []

    def seconds_of(repeats: int) -> float:
        asked.append(repeats)
        return 0.001 + 0.002 * repeats

    brief = METHODS["gpu"].brief()
    timing = take_samples(seconds_of, 4, brief)
    assert (timing.us, timing.us_min, timing.us_max) == pytest.approx((500, 500, 500))
    assert timing.us_sustained is None
    assert asked.count(1) == 3
    assert len(asked) == 3 + 3 * brief.samples  # warm, lead, lead and sample
    full = METHODS["gpu"]
    assert (full.samples, brief.samples) == (5, 5)
    assert brief.rest_seconds < full.rest_seconds
    assert (brief.sample_seconds, brief.warm_seconds) == (full.sample_seconds, full.warm_seconds)


def test_noise_is_normal_and_goes_on_where_it_ends():
    few = host_normal((3, 5), jnp.bfloat16, seed=1)
    assert few.dtype == jnp.bfloat16
    assert not np.array_equal(few, host_normal((3, 5), jnp.bfloat16))
    many = host_normal((COUNT + 7,), np.float32, scale=0.5)
    np.testing.assert_array_equal(many[-7:], many[:7])
    assert many.std() == pytest.approx(0.5, rel=1e-2)


def test_error_is_the_worst_head_s():
    q, rows = host_normal((2, 8), np.float32), host_normal((30, 8), np.float32, seed=1)
    scores = q.astype(np.float64) @ rows.T * 0.3
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    out = np.zeros((1, 3, 4, 6), np.float32)
    out[0, -1, :2] = weights @ rows[:, :6]  # two more heads are padding
    error = attention_error(heads_at(out, 0, -1), q, rows, d_v=6, sm_scale=0.3)
    assert error < 1e-6
    out[0, -1, 1] *= 1.25
    error = attention_error(heads_at(out, 0, -1), q, rows, d_v=6, sm_scale=0.3)
    assert error == pytest.approx(0.25, rel=1e-5)
    out[0, -1, 0, 0] = np.nan
    assert not attention_error(heads_at(out, 0, -1), q, rows, d_v=6, sm_scale=0.3) <= 1


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 41, 72, 100])
def test_any_beginning_of_a_spread_grid_is_a_fair_sample(n):
    order = spread(range(n))
    assert sorted(order) == list(range(n))
    for length in range(8, n):
        thirds = [sum(i * 3 // n == third for i in order[:length]) for third in range(3)]
        assert max(thirds) - min(thirds) <= 3, (length, thirds)
