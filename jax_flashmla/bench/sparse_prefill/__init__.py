"""The benchmark of sparse_prefill: d_v 512, random indices into one array of 16-bit rows."""

from __future__ import annotations

from jax_flashmla.bench.operation import Axes, CallsPeer, MakesCalls, Operation
from jax_flashmla.bench.shape import Result
from jax_flashmla.bench.sparse_prefill import peers
from jax_flashmla.bench.sparse_prefill.grids import GRIDS, XLA_SHAPES
from jax_flashmla.bench.sparse_prefill.shapes import Shape


def _calls() -> MakesCalls:
    from jax_flashmla.bench.sparse_prefill import calls

    return calls


def _live_peer() -> CallsPeer:
    from jax_flashmla.bench.sparse_prefill import live_peer

    return live_peer


def _panel_title(result: Result) -> str:
    return f"top {result['topk']} of {result['s_kv']}"


OPERATION = Operation(
    name="sparse_prefill",
    setting="d_v 512, random data, random indices, all valid",
    shape=Shape,
    grids=GRIDS,
    default_grids={"gpu": "quick", "cpu": "cpu"},
    xla_shapes=XLA_SHAPES,
    dtypes=("bfloat16", "float16"),
    block_sizes=(64,),
    peers=peers.comparable,
    group=lambda result: f"h_q {result['h_q']}, topk {result['topk']}",
    axes=Axes(
        x="s_q",
        x_label="query tokens",
        series="h_q",
        series_label="heads",
        panel=lambda result: (result["topk"], result["s_kv"]),
        panel_title=_panel_title,
        preferred=lambda results: [r for r in results if r["d_qk"] == 576] or results,
        kind=lambda result: result["h_q"],
        kind_label="heads that a gathered\nrow serves",
        size="gathered_tokens",
        size_label="gathered rows",
    ),
    calls=_calls,
    live_peer=_live_peer,
)
