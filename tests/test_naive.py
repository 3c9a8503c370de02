"""The tests' naive attention against sums written out, where it is prepared for more than dense."""

import math

import numpy as np
import pytest

import naive

Q = np.array([[1.0, 0.0], [0.0, 2.0]])
ROWS = np.array([[1.0, 1.0], [2.0, -1.0], [np.nan, np.inf]])
SEEN = np.array([True, True, False])


def written_out(sink: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Both heads, scale 1, values the first column, over the first two rows."""
    out, lse = [], []
    for a, b in ((1.0, 2.0), (2.0, -2.0)):  # scores
        total = math.exp(a) + math.exp(b)
        out.append(
            (math.exp(a) * 1 + math.exp(b) * 2) / (total + (sink is not None and math.exp(sink)))
        )
        lse.append(math.log(total))
    return np.array(out)[:, None], np.array(lse)


@pytest.mark.parametrize("sink", [None, 0.5])
def test_masked_rows_are_not_read_and_a_sink_takes_weight_from_out_alone(sink):
    sinks = None if sink is None else np.full(2, sink)
    found = naive.attend(Q, ROWS, d_v=1, sm_scale=1.0, mask=SEEN, sink=sinks)
    for got, expected in zip(found, written_out(sink), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-14)


def test_a_row_that_is_gathered_twice_counts_twice():
    twice = ROWS[[0, 1, 0]]
    _, lse = naive.attend(Q[:1], twice, d_v=1, sm_scale=1.0)
    assert lse[0] == pytest.approx(math.log(2 * math.exp(1) + math.exp(2)))


@pytest.mark.parametrize("sinks", [None, np.zeros(2)])
def test_nothing_to_attend_to(sinks):
    out, lse = naive.attend(Q, ROWS, d_v=1, mask=np.zeros(3, bool), sink=sinks)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


def test_rows_of_each_query_and_values_apart():
    rng = np.random.default_rng(0)
    q, rows, values = (rng.standard_normal((4, 3, n)) for n in (2, 2, 5))
    out, lse = naive.attend(q, rows, values)
    for i in range(4):
        expected = naive.attend(q[i], rows[i], values[i], sm_scale=2**-0.5)
        np.testing.assert_allclose(out[i], expected[0], rtol=1e-14)
        np.testing.assert_allclose(lse[i], expected[1], rtol=1e-14)


def test_dense_is_causal_from_the_end():
    q, keys = np.ones((3, 2, 2)), np.arange(8.0).reshape(2, 2, 2)
    out, lse = naive.dense(q, keys, 2, d_v=2, causal=True)
    assert np.isneginf(lse[0]).all()
    np.testing.assert_array_equal(out[1], keys[0])  # head by head, its own KV head
    assert (out[2] > keys[0]).all()
