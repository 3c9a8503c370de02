"""Calls of different shapes and hostile values one after the other: none sees what another left.

The CPU's threads keep their working memory between calls. One program runs all calls of a sequence
with one part, so on one thread.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
import tolerances
from jax_flashmla import dense_decode, make_schedule

pytestmark = pytest.mark.usefixtures("on_cpu")
FEW = dataclasses.replace(tolerances.OUT, cosine=None)  # errors of few elements need not cancel


@dataclasses.dataclass(frozen=True)
class Call:
    d_qk: int
    d_v: int = 16
    h_q: int = 4
    s_q: int = 1
    block_size: int = 8
    tokens: int = 13
    num_parts: int = 1
    dtype: str = "float32"
    causal: bool = False
    hostile: str | None = None  # "q" or "blocks"
    value: float = np.nan

    @functools.cached_property
    def arguments(self) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(self.d_qk)
        max_blocks = -(-self.tokens // self.block_size)
        q = rng.standard_normal((1, self.s_q, self.h_q, self.d_qk), np.float32)
        blocks = rng.standard_normal((max_blocks, self.block_size, 1, self.d_qk), np.float32)
        if self.hostile == "q":
            q[:] = self.value
        elif self.hostile == "blocks":
            blocks[:] = self.value
        dtype = jnp.dtype(self.dtype)
        table = np.arange(max_blocks, dtype=np.int32)[None]
        return q.astype(dtype), blocks.astype(dtype), table, np.array([self.tokens], np.int32)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        q, blocks, _, _ = self.arguments
        keys = blocks.reshape(-1, 1, self.d_qk)[: self.tokens]
        return naive.dense(q[0], keys, self.tokens, d_v=self.d_v, causal=self.causal)

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        q, blocks, table, cache_seqlens = map(jnp.asarray, self.arguments)
        schedule = make_schedule(
            cache_seqlens, h_q=self.h_q, s_q=self.s_q, num_parts=self.num_parts
        )
        out, lse = dense_decode(
            q,
            blocks,
            table,
            cache_seqlens,
            d_v=self.d_v,
            causal=self.causal,
            schedule=schedule,
            implementation="kernel",
        )
        return np.asarray(out), np.asarray(lse)


def check(calls: list[Call]) -> None:
    for call in calls:
        out, lse = call.run()
        if call.hostile:
            continue  # what it leaves behind is what matters: the next call is clean
        bounds = tolerances.F32_DECODE if call.dtype == "float32" else {"out": FEW}
        tolerances.assert_decoded((out[0], lse[0]), call.expected(), **bounds)


def test_a_narrower_call_after_a_wider_one() -> None:
    check([Call(d_qk) for d_qk in (20, 32, 20, 17, 31, 16, 32, 18)])


def test_two_layers_with_different_ropes() -> None:
    check([Call(16 + rope, s_q=3, causal=True) for rope in (16, 8) * 3])


@pytest.mark.parametrize("hostile", ["q", "blocks"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_clean_call_after_a_hostile_one(hostile: str, value: float) -> None:
    bad = Call(32, h_q=64, tokens=150, hostile=hostile, value=value)
    check([bad, Call(20), bad, Call(17, h_q=7), bad, Call(32), bad, Call(31, tokens=1)])


def test_a_merge_after_hostile_partial_results() -> None:
    bad = Call(32, tokens=2000, num_parts=6, hostile="blocks")
    check([bad, Call(20, tokens=900, num_parts=3), bad, Call(32, tokens=1300, num_parts=4)])


calls = st.builds(
    Call,
    d_qk=st.integers(16, 40) | st.just(576),
    d_v=st.integers(1, 16),
    h_q=st.sampled_from([1, 3, 4, 65]),
    s_q=st.integers(1, 2),
    block_size=st.sampled_from([1, 5, 8, 64]),
    tokens=st.integers(0, 90),
    num_parts=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    causal=st.booleans(),
    hostile=st.sampled_from([None, None, "q", "blocks"]),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
)


@settings(max_examples=20)
@given(st.lists(calls.filter(lambda call: call.tokens > 0), min_size=2, max_size=5))
def test_any_sequence_of_calls(sequence: list[Call]) -> None:
    check([*sequence, Call(20), Call(17, dtype="bfloat16")])
