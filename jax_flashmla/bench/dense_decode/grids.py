"""The named grids of shapes, and the shapes at which plain XLA is timed too."""

from __future__ import annotations

from jax_flashmla.bench.dense_decode import peers
from jax_flashmla.bench.dense_decode.shapes import Shape
from jax_flashmla.bench.operation import Grid
from jax_flashmla.bench.order import spread

# What a JAX user would otherwise run is measured beside these shapes.
XLA_SHAPES = tuple(
    Shape(b, s_q, h_q, s_k)
    for b, s_q, h_q, s_k in (
        (1, 1, 16, 2048), (1, 1, 128, 8192), (1, 1, 16, 32768), (4, 1, 128, 8192),
        (8, 1, 16, 2048), (16, 1, 16, 4096), (16, 1, 128, 4096), (64, 1, 16, 4096),
        (64, 1, 128, 4096), (128, 1, 16, 4096), (128, 1, 128, 4096), (128, 2, 128, 4096),
    )
)  # fmt: skip


def _targets() -> tuple[Shape, ...]:
    """Every shape that is recorded of the peers."""
    return tuple(peers.recorded())


def _quick() -> tuple[Shape, ...]:
    shapes = ((1, 2048), (1, 32768), (4, 8192), (16, 4096), (64, 1024), (128, 4096))
    return tuple(Shape(b, 1, h_q, s_k) for h_q in (16, 128) for b, s_k in shapes)


def _off_table() -> tuple[Shape, ...]:
    """Shapes that nobody tunes for; each one's caches fit in 40 GB."""
    shapes = ((1, 8192), (16, 2048), (128, 4096))
    heads = [Shape(b, 1, h_q, s_k) for h_q in (8, 20, 32, 40, 64, 96) for b, s_k in shapes]
    speculative = ((2, 64), (3, 16), (3, 128), (5, 32), (6, 20), (8, 16), (8, 128))
    queries = [
        Shape(b, s_q, h_q, s_k) for s_q, h_q in speculative for b, s_k in ((1, 16384), (32, 4096))
    ]
    skewed = [Shape(128, 1, h_q, 65536, "skewed") for h_q in (16, 128)]
    ragged = [
        Shape(b, 1, h_q, s_k, "normal") for h_q in (16, 64) for b, s_k in ((16, 2048), (256, 1024))
    ]
    extremes = ((1, 64), (512, 64), (512, 2048), (1, 262144), (8, 262144))
    ends = [Shape(b, 1, h_q, s_k) for h_q in (16, 128) for b, s_k in extremes]
    return (*heads, *queries, *skewed, *ragged, *ends)


def _fp8() -> tuple[Shape, ...]:
    """Every shape that is recorded of the fp8 peer; few heads, over bfloat16 too."""
    large = ((128, 4096), (256, 2048))
    formats = ("dense", *peers.FP8_FORMATS)
    few_heads = [
        Shape(b, 1, h_q, s_k, "equal", format)
        for b, s_k in large
        for h_q in (8, 16, 32)
        for format in formats
    ]
    return tuple(dict.fromkeys([*few_heads, *spread(tuple(peers.recorded_fp8()))]))


def _layers() -> tuple[Shape, ...]:
    """Serving shapes, each as a stack of LAYERS layers in one jitted function."""
    shapes = ((1, 4096), (8, 4096), (32, 4096), (128, 4096))
    return tuple(Shape(b, 1, h_q, s_k) for h_q in (16, 128) for b, s_k in shapes)


def _cpu() -> tuple[Shape, ...]:
    """Small enough for a minute on a few cores."""
    return (
        Shape(4, 1, 16, 4096),
        Shape(1, 1, 16, 4096),
        Shape(1, 1, 16, 1024),
        Shape(4, 1, 1, 4096),
        Shape(4, 1, 16, 1024),
        Shape(4, 1, 16, 512, "normal"),
        Shape(4, 1, 128, 1024),
        Shape(1, 1, 128, 1024),
        Shape(4, 2, 64, 1024),
        Shape(32, 1, 16, 256),
    )


def _tiny() -> tuple[Shape, ...]:
    """For tests of the benchmark itself."""
    return (Shape(2, 1, 4, 96), Shape(3, 2, 4, 80, "normal"), Shape(4, 1, 3, 320, "skewed"))


def _tiny_fp8() -> tuple[Shape, ...]:
    return (Shape(2, 1, 4, 96, format="v32"), Shape(2, 2, 3, 80, "normal", "fp8_row"))


LAYERS = 61  # as many as DeepSeek-V3 has
GRIDS = {
    "targets": Grid(_targets),
    "quick": Grid(_quick),
    "off_table": Grid(_off_table),
    "fp8": Grid(_fp8),
    "tiny_fp8": Grid(_tiny_fp8),
    "layers": Grid(_layers, layers=LAYERS),
    "xla": Grid(lambda: XLA_SHAPES),
    "cpu": Grid(_cpu),
    "tiny": Grid(_tiny),
}
