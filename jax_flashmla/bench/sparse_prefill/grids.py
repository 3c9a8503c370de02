"""The named grids of shapes, and the shapes at which plain XLA is timed too."""

from __future__ import annotations

from jax_flashmla.bench.operation import Grid
from jax_flashmla.bench.sparse_prefill import peers
from jax_flashmla.bench.sparse_prefill.shapes import Shape

# What a JAX user would otherwise run is measured beside these shapes.
XLA_SHAPES = (Shape(1024, 64, 2048, 32768), Shape(1024, 128, 2048, 32768))


def _targets() -> tuple[Shape, ...]:
    """Every shape that is recorded of FlashMLA."""
    return tuple(peers.recorded())


def _quick() -> tuple[Shape, ...]:
    return tuple(Shape(1024, h_q, topk, 32768) for h_q in (64, 128) for topk in (512, 2048))


def _off_table() -> tuple[Shape, ...]:
    """Shapes that no peer is recorded for."""
    few_heads = [Shape(4096, h_q, 2048, 32768) for h_q in (8, 16, 32, 96)]
    short = [Shape(s_q, h_q, 2048, 32768) for s_q in (64, 200, 512) for h_q in (64, 128)]
    other_topk = [Shape(4096, h_q, topk, 32768) for topk in (128, 1024) for h_q in (64, 128)]
    no_rope = [Shape(4096, h_q, 2048, 32768, 512) for h_q in (64, 128)]
    return (*few_heads, *short, *other_topk, *no_rope)


def _cpu() -> tuple[Shape, ...]:
    """Small enough for a minute on a few cores."""
    return tuple(Shape(8, h_q, 512, 2048) for h_q in (16, 64))


def _tiny() -> tuple[Shape, ...]:
    """For tests of the benchmark itself."""
    return Shape(3, 4, 70, 128), Shape(2, 3, 30, 100, 512)


GRIDS = {
    "targets": Grid(_targets),
    "quick": Grid(_quick),
    "off_table": Grid(_off_table),
    "xla": Grid(lambda: XLA_SHAPES),
    "cpu": Grid(_cpu),
    "tiny": Grid(_tiny),
}
