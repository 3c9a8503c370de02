"""The benchmark of dense_decode: causal, d_qk 576, d_v 512, one KV head."""

from __future__ import annotations

from jax_flashmla.bench.dense_decode import peers
from jax_flashmla.bench.dense_decode.grids import GRIDS, XLA_SHAPES
from jax_flashmla.bench.dense_decode.shapes import ROW_BYTES, Shape
from jax_flashmla.bench.operation import Axes, CallsPeer, MakesCalls, Operation
from jax_flashmla.bench.shape import Result

SMALL_BATCH = 4  # sequences; at most these few leave the device waiting for latencies
SHORT_US = 60.0  # shapes of larger batches whose limit is below this are short


def _group(result: Result) -> str:
    """The kind of shape: what bounds it differs."""
    if result["format"] != "dense":
        return f"{result['format']}, {result['h_q']} heads"
    if result["b"] <= SMALL_BATCH:
        return f"b <= {SMALL_BATCH}"
    comparison = "<" if result["limit_us"] < SHORT_US else ">="
    return f"b > {SMALL_BATCH}, limit {comparison} {SHORT_US:.0f} us"


def _panel_title(result: Result) -> str:
    heads = "1 head" if result["h_q"] == 1 else f"{result['h_q']} heads"
    queries = f", {result['s_q']} query tokens" if result["s_q"] > 1 else ""
    format = "" if result["format"] == "dense" else f", {result['format']}"
    return heads + queries + format


def _preferred(results: list[Result]) -> list[Result]:
    """Without unequal lengths, and without s_q > 1, while there are others."""
    for condition in (lambda r: r["lengths"] == "equal", lambda r: r["s_q"] == 1):
        results = [result for result in results if condition(result)] or results
    return results


def _calls() -> MakesCalls:
    from jax_flashmla.bench.dense_decode import calls

    return calls


def _live_peer() -> CallsPeer:
    from jax_flashmla.bench.dense_decode import live_peer

    return live_peer


OPERATION = Operation(
    name="dense_decode",
    setting="causal, d_qk 576, d_v 512, random data, random block order",
    shape=Shape,
    grids=GRIDS,
    default_grids={"gpu": "quick", "cpu": "cpu"},
    xla_shapes=XLA_SHAPES,
    dtypes=("bfloat16", "float16"),
    block_sizes=(16, 32, 64, 128, 256),
    peers=peers.comparable,
    group=_group,
    axes=Axes(
        x="s_k",
        x_label="cached tokens of each sequence",
        series="b",
        series_label="sequences",
        panel=lambda result: (
            tuple(ROW_BYTES).index(result["format"]),
            result["h_q"],
            result["s_q"],
        ),
        panel_title=_panel_title,
        preferred=_preferred,
        kind=lambda result: result["s_q"] * result["h_q"],
        kind_label="queries a cache row\nserves (s_q x h_q)",
        size="cached_tokens",
        size_label="cached tokens",
    ),
    calls=_calls,
    live_peer=_live_peer,
)
