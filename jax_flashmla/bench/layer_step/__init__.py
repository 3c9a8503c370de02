"""The benchmark of a whole attention layer's decoding step: projections, cache and attention."""

from __future__ import annotations

from jax_flashmla.bench.layer_step.shapes import Shape
from jax_flashmla.bench.operation import Axes, Grid, MakesCalls, Operation
from jax_flashmla.bench.order import spread
from jax_flashmla.bench.shape import Result


def _calls() -> MakesCalls:
    from jax_flashmla.bench.layer_step import calls

    return calls


def _v3() -> tuple[Shape, ...]:
    return tuple(Shape(b, h_q, 4096) for h_q in (16, 128) for b in (1, 32, 128))


def _v32() -> tuple[Shape, ...]:
    """V3.2's, and V3's layer of the same length, which attends to everything."""
    sparse = [Shape(32, h_q, s_k, "v32") for h_q in (16, 128) for s_k in (32768, 131072)]
    return (*sparse, *(Shape(32, h_q, 131072) for h_q in (16, 128)))


def _tiny() -> tuple[Shape, ...]:
    return (Shape(2, 4, 100, "tiny"), Shape(2, 4, 2200, "tiny_v32"))


def _title(result: Result) -> str:
    return f"{result['model']}, {result['h_q']} heads"


OPERATION = Operation(
    name="layer_step",
    setting="whole layers with weights and caches of their own; the limit is the weights read once "
    "and the attention kernels timed alone",
    shape=Shape,
    grids={
        "targets": Grid(lambda: spread(_v3() + _v32())),
        "v3": Grid(_v3),
        "v32": Grid(_v32),
        "tiny": Grid(_tiny),
    },
    default_grids={"gpu": "targets", "cpu": "tiny"},
    xla_shapes=(),
    dtypes=("bfloat16",),
    block_sizes=(64,),
    peers=lambda *_, **__: {},
    group=_title,
    axes=Axes(
        x="b",
        x_label="sequences",
        series="s_k",
        series_label="cached tokens of each",
        panel=lambda result: (
            ("v3", "v32", "tiny", "tiny_v32").index(result["model"]),
            result["h_q"],
        ),
        panel_title=_title,
        preferred=lambda results: results,
        kind=lambda result: result["h_q"],
        kind_label="heads",
        size="weight_bytes",
        size_label="bytes of weights",
    ),
    calls=_calls,
)
