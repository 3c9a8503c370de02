"""The benchmark of sparse_decode: d_v 512, random indices into a paged cache of any format."""

from __future__ import annotations

from jax_flashmla.bench.operation import Axes, CallsPeer, MakesCalls, Operation
from jax_flashmla.bench.shape import Result
from jax_flashmla.bench.sparse_decode import peers
from jax_flashmla.bench.sparse_decode.grids import GRIDS, XLA_SHAPES
from jax_flashmla.bench.sparse_decode.shapes import FORMATS, Shape

PROMPT = 16  # query tokens of a sequence; above, they are a chunk of a prompt
FEW, MANY = 8, 64  # query tokens: up to FEW latencies decide, from MANY on all multiprocessors work


def _group(result: Result) -> str:
    """The kind of shape: what bounds it differs."""
    if result["s_q"] > PROMPT:
        return f"prompts, h_q {result['h_q']}, {result['format']}"
    if result["query_tokens"] <= FEW:
        return f"n <= {FEW}"
    if result["query_tokens"] < MANY:
        return f"{FEW} < n < {MANY}"
    return f"n >= {MANY}, h_q {result['h_q']}, {result['format']}"


def _panel_title(result: Result) -> str:
    extra = f" + {result['extra_topk']}" if result["extra_topk"] else ""
    return f"{result['format']}, top {result['topk']}{extra}"


def _preferred(results: list[Result]) -> list[Result]:
    """Without several query tokens a sequence while there are others."""
    return [result for result in results if result["s_q"] == 1] or results


def _calls() -> MakesCalls:
    from jax_flashmla.bench.sparse_decode import calls

    return calls


def _live_peer() -> CallsPeer:
    from jax_flashmla.bench.sparse_decode import live_peer

    return live_peer


OPERATION = Operation(
    name="sparse_decode",
    setting="d_v 512, random data, random indices within each sequence's tokens, all valid",
    shape=Shape,
    grids=GRIDS,
    default_grids={"gpu": "quick", "cpu": "cpu"},
    xla_shapes=XLA_SHAPES,
    dtypes=("bfloat16", "float16"),
    block_sizes=(16, 64, 256),
    peers=peers.comparable,
    group=_group,
    axes=Axes(
        x="query_tokens",
        x_label="query tokens (b x s_q)",
        series="h_q",
        series_label="heads",
        panel=lambda result: (
            tuple(FORMATS).index(result["format"]),
            result["topk"],
            result["extra_topk"],
        ),
        panel_title=_panel_title,
        preferred=_preferred,
        kind=lambda result: result["h_q"],
        kind_label="heads that a gathered\nrow serves",
        size="gathered_tokens",
        size_label="gathered rows",
    ),
    calls=_calls,
    live_peer=_live_peer,
)
