"""index_topk over tokens that ranks share: the same selection as of one cache, bit for bit."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import index_cases
from index_cases import IndexCase, Problem
from jax_flashmla import context, index_scores, index_topk
from jax_flashmla.ops import index_topk as topk_module
from parallel import devices_of
from stored import poisoned_blocks


def share_keys(problem: Problem, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Each rank's array of two layers [size, blocks, bytes], keys in the second; and its table."""
    case, given = problem.case, problem.arguments
    max_blocks = -(-case.max_blocks // size) + 1
    count = case.b * max_blocks
    tables = np.stack([np.arange(count).reshape(case.b, -1)[::-1] for _ in range(size)])
    blocks = np.stack([poisoned_blocks(index_cases.FORMAT, 2 * count)] * size)
    i, t = np.nonzero(problem.visible.any(axis=1))
    rank, local = t % size, t // size
    at = given["block_table"][i, t // 64], t % 64
    to = rank, tables[rank, i, local // 64] + count, local % 64
    for plane in ("codes", "scales"):
        index_cases.keys_of(blocks)[plane][to] = index_cases.keys_of(given["blocks"])[plane][at]
    return blocks, tables.astype(np.int32)


def check(
    problem: Problem, size: int, indices: np.ndarray, positions: np.ndarray, tables: np.ndarray
) -> None:
    """Each rank's [size, b, s_q, topk], held against what one device selects of all tokens."""
    _, expected = index_topk(**problem.arguments, topk=problem.case.topk, return_positions=True)
    for rank in range(size):
        mine = np.full(expected.shape, -1)
        for at in np.ndindex(expected.shape[:2]):
            row = np.asarray(expected[at])
            row = row[(row >= 0) & (row % size == rank)]
            mine[at][: len(row)] = row
        np.testing.assert_array_equal(positions[rank], mine)
        local = np.where(mine < 0, -1, mine // size)
        np.testing.assert_array_equal(indices[rank], index_cases.slots_of(local, tables[rank]))


CASES = [
    (IndexCase(b=3, s_q=3, heads=4, s_k=600, integers=True, topk=100), 8, True),  # mostly ties
    (IndexCase(b=3, s_q=1, heads=4, s_k=300, topk=64), 2, False),
    (IndexCase(b=2, s_q=2, heads=4, s_k=70, topk=500, causal=False), 4, False),  # all, and more
]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("case", "size", "given"), CASES, ids=str)
def test_ranks_select_what_one_device_does(case: IndexCase, size: int, given: bool) -> None:
    check_selection(case, devices_of("cpu", size), given)


@pytest.mark.gpu
@pytest.mark.parametrize("given", [True, False], ids=["of scores", "of keys"])
@pytest.mark.parametrize("size", [2, 4])
def test_gpus_select_what_one_does(size: int, given: bool) -> None:
    case = IndexCase(b=3, s_q=2, heads=64, s_k=9000, topk=2048)
    check_selection(case, devices_of("cuda", size), given)


def check_selection(case: IndexCase, devices: list[jax.Device], given: bool) -> None:
    size = len(devices)
    problem = index_cases.make_problem(case)
    blocks, tables = share_keys(problem, size)
    fixed = {k: problem.arguments[k] for k in ("q", "weights", "cache_seqlens")}
    options = {"format": index_cases.FORMAT, "causal": case.causal}

    def select(blocks: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        arguments = {
            **fixed, "blocks": blocks[0], "block_table": table[0],
            "first_block": blocks.shape[1] // 2, "layer_blocks": blocks.shape[1] // 2, **options,
        }  # fmt: skip
        if given:
            here = jax.lax.axis_index("t"), size
            scores = index_scores(**arguments, context=here)
            arguments |= dict.fromkeys(("q", "weights", "blocks"), None)
            arguments |= {"scores": scores, "first_block": 0}
        got = context.index_topk(**arguments, axis="t", topk=case.topk, return_positions=True)
        return got[0][None], got[1][None]

    mesh = jax.make_mesh((size,), ("t",), axis_types=(AxisType.Auto,), devices=devices)
    sharded = jax.jit(jax.shard_map(select, mesh=mesh, in_specs=P("t"), out_specs=P("t")))
    placed = (jax.device_put(x, NamedSharding(mesh, P("t"))) for x in (blocks, tables))
    check(problem, size, *map(np.asarray, sharded(*placed)), tables)


@pytest.mark.usefixtures("on_cpu")
def test_query_tokens_are_taken_so_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no room for more than eight."""
    monkeypatch.setattr(topk_module, "_SCORE_BYTES", 1)
    case = IndexCase(b=2, s_q=19, heads=2, s_k=100, topk=20)
    problem = index_cases.make_problem(case)
    blocks, tables = share_keys(problem, 2)
    mapped = functools.partial(select_of_two, problem)
    indices, positions = jax.jit(jax.vmap(mapped, axis_name="t"))(blocks, tables)
    monkeypatch.undo()
    check(problem, 2, np.asarray(indices), np.asarray(positions), tables)


def select_of_two(problem: Problem, blocks: jax.Array, table: jax.Array) -> tuple:
    half = blocks.shape[0] // 2
    return context.index_topk(
        **{**problem.arguments, "blocks": blocks, "block_table": table},
        axis="t", topk=problem.case.topk, return_positions=True, first_block=half,
        layer_blocks=half,
    )  # fmt: skip


def test_one_rank_selects_the_best_of_its_own(kernel: str) -> None:
    """And scores its own alone."""
    case, size = IndexCase(b=2, s_q=3, heads=4, s_k=150, topk=20), 2
    problem = index_cases.make_problem(case)
    blocks, tables = share_keys(problem, size)
    whole = np.asarray(index_scores(**problem.arguments, implementation=kernel))

    @jax.jit
    def run(blocks: jax.Array, table: jax.Array, rank: jax.Array) -> tuple[jax.Array, tuple]:
        arguments = {
            **problem.arguments, "blocks": blocks, "block_table": table, "implementation": kernel,
            "first_block": len(blocks) // 2, "layer_blocks": len(blocks) // 2,
            "context": (rank, size),
        }  # fmt: skip
        best = index_topk(**arguments, topk=case.topk, return_positions=True)
        return index_scores(**arguments), best

    for rank in range(size):
        scores, best = run(blocks[rank], tables[rank], np.int32(rank))
        scores, mine = np.asarray(scores), whole[:, :, rank::size]
        np.testing.assert_array_equal(scores[:, :, : mine.shape[2]], mine)
        assert np.isneginf(scores[:, :, mine.shape[2] :]).all()
        local = index_cases.naive_topk(mine, np.ones(mine.shape, bool), case.topk)
        np.testing.assert_array_equal(best[0], index_cases.slots_of(local, tables[rank]))
        np.testing.assert_array_equal(best[1], np.where(local < 0, -1, local * size + rank))
