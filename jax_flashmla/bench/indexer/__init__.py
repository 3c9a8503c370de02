"""The benchmarks of index_scores and index_topk: e4m3 queries, keys in blocks at random places."""

from __future__ import annotations

from types import ModuleType

from jax_flashmla.bench.indexer import grids, peers
from jax_flashmla.bench.indexer.shapes import ScoresShape, TopkShape
from jax_flashmla.bench.operation import Axes, Operation
from jax_flashmla.bench.shape import Result


def _group(result: Result) -> str:
    """The kind of shape."""
    if result["heads"] == 0:
        return "scores given"
    return f"{result['heads']} heads, s_q {result['s_q']}"


def _panel_title(result: Result) -> str:
    if result["heads"] == 0:
        return "scores given"
    return f"{result['heads']} heads, s_q {result['s_q']}"


def _same(results: list[Result]) -> list[Result]:
    return results


AXES = Axes(
    x="s_k",
    x_label="tokens of a sequence",
    series="b",
    series_label="sequences",
    panel=lambda result: (-result["heads"], result["s_q"]),
    panel_title=_panel_title,
    preferred=_same,
    kind=lambda result: result["heads"],
    kind_label="heads\n(0: scores given)",
    size="tokens",
    size_label="tokens of all sequences",
)


def _live_peer() -> ModuleType:
    from jax_flashmla.bench.indexer import live_peer

    return live_peer


def _scores_calls() -> ModuleType:
    from jax_flashmla.bench.indexer import scores_calls

    return scores_calls


def _topk_calls() -> ModuleType:
    from jax_flashmla.bench.indexer import topk_calls

    return topk_calls


SCORES = Operation(
    name="index_scores",
    setting="e4m3 queries, random data, blocks at random places of a cache",
    shape=ScoresShape,
    grids=grids.SCORES_GRIDS,
    default_grids={"gpu": "quick", "cpu": "cpu"},
    xla_shapes=grids.SCORES_XLA,
    dtypes=("bfloat16",),
    block_sizes=(64,),
    peers=peers.comparable,
    group=_group,
    axes=AXES,
    calls=_scores_calls,
    live_peer=_live_peer,
    load_peer=lambda: _live_peer().load(),
)
TOPK = Operation(
    name="index_topk",
    setting="e4m3 queries or given scores, random data, blocks at random places of a cache",
    shape=TopkShape,
    grids=grids.TOPK_GRIDS,
    default_grids={"gpu": "quick", "cpu": "cpu"},
    xla_shapes=grids.TOPK_XLA,
    dtypes=("bfloat16",),
    block_sizes=(64,),
    peers=peers.comparable,
    group=_group,
    axes=AXES,
    calls=_topk_calls,
    live_peer=_live_peer,
    load_peer=lambda: _live_peer().load(),
)
