"""The named grids of shapes, and the shapes at which plain XLA is timed too."""

from __future__ import annotations

from jax_flashmla.bench.operation import Grid
from jax_flashmla.bench.sparse_decode import peers
from jax_flashmla.bench.sparse_decode.shapes import Shape

# What a JAX user would otherwise run is measured beside these shapes.
XLA_SHAPES = tuple(
    Shape(b, 1, h_q, topk, extra_topk, format)
    for b, h_q, topk, extra_topk, format in (
        (1, 64, 2048, 0, "v32"), (16, 64, 2048, 0, "v32"), (64, 128, 2048, 0, "v32"),
        (128, 16, 2048, 0, "v32"), (128, 64, 2048, 0, "v32"), (16, 64, 512, 0, "v32"),
        (16, 64, 128, 512, "v4"), (128, 128, 2048, 0, "dense"), (128, 16, 2048, 0, "dense"),
    )
)  # fmt: skip


def _targets() -> tuple[Shape, ...]:
    """Every shape that is recorded of FlashMLA."""
    return tuple(peers.recorded())


def _quick() -> tuple[Shape, ...]:
    v32 = [Shape(b, 1, h_q, 2048) for h_q in (16, 64, 128) for b in (1, 16, 64, 256)]
    v4 = [Shape(b, 1, 64, 128, 512, "v4") for b in (1, 64)]
    return (*v32, Shape(128, 1, 16, 2048, 0, "dense"), *v4)


def _off_table() -> tuple[Shape, ...]:
    """Shapes that no peer is recorded for."""
    batches = (1, 8, 32, 128, 256)
    few_heads = [Shape(b, 1, h_q, 2048) for h_q in (8, 16, 32) for b in batches]
    other_topk = [
        Shape(b, 1, h_q, topk) for topk in (512, 1024) for h_q in (16, 64, 128) for b in (2, 32, 96)
    ]
    drafts = [Shape(b, s_q, h_q, 2048) for s_q in (3, 4) for h_q in (64, 128) for b in (1, 8, 64)]
    odd_heads = [Shape(b, 1, h_q, 2048) for h_q in (1, 20, 96) for b in (4, 128)]
    formats = [
        Shape(b, 1, h_q, 2048, 0, format)
        for format in ("dense", "v32_nope")
        for h_q in (16, 64, 128)
        for b in (1, 16, 128)
    ]
    v4 = [
        Shape(b, s_q, h_q, 128, topk, "v4")
        for h_q, topk in ((16, 512), (64, 1024), (128, 512))
        for b, s_q in ((2, 1), (32, 1), (32, 4), (128, 1))
    ]
    return (*few_heads, *other_topk, *drafts, *odd_heads, *_prefill(), *formats, *v4)


def _prefill() -> tuple[Shape, ...]:
    """A chunk of a prompt, straight from the fp8 cache."""
    return tuple(Shape(1, 4096, h_q, 2048) for h_q in (16, 64, 128))


def _results() -> tuple[Shape, ...]:
    """What benchmarks/results has: the targets, then what models ask beside them."""
    few_heads = [Shape(b, 1, h_q, 2048) for h_q in (8, 16, 32) for b in (1, 32, 128, 256)]
    bf16 = [Shape(b, 1, 16, 2048, 0, "dense") for b in (128, 256)]
    drafts = [Shape(64, s_q, h_q, 2048) for s_q in (3, 4) for h_q in (64, 128)]
    other_topk = [Shape(b, 1, h_q, 1024) for h_q in (64, 128) for b in (16, 128)]
    no_rope = [Shape(b, 1, 64, 2048, 0, "v32_nope") for b in (128, 256)]
    return (*_targets(), *few_heads, *bf16, *_prefill()[::-1], *drafts, *other_topk, *no_rope)


def _layers() -> tuple[Shape, ...]:
    """Serving shapes, each as a stack of LAYERS layers in one jitted function."""
    return tuple(Shape(b, 1, h_q, 2048) for h_q in (16, 128) for b in (1, 8, 32, 128))


def _cpu() -> tuple[Shape, ...]:
    """Small enough for a minute on a few cores."""
    shapes = [Shape(b, 1, h_q, 512, s_k=2048) for h_q in (16, 64) for b in (1, 4)]
    return (
        *shapes,
        Shape(4, 1, 16, 512, 0, "dense", s_k=2048),
        Shape(4, 2, 16, 128, 256, "v4", s_k=2048),
    )


def _tiny() -> tuple[Shape, ...]:
    """For tests of the benchmark itself."""
    return (
        Shape(2, 1, 4, 70, s_k=128),
        Shape(1, 2, 3, 30, 65, "v4", s_k=256),
        Shape(2, 1, 3, 20, 0, "dense", s_k=256),
    )


LAYERS = 61  # as many as DeepSeek-V3.2 has
GRIDS = {
    "targets": Grid(_targets),
    "quick": Grid(_quick),
    "off_table": Grid(_off_table),
    "prefill": Grid(_prefill),
    "results": Grid(_results),
    "layers": Grid(_layers, layers=LAYERS),
    "xla": Grid(lambda: XLA_SHAPES),
    "cpu": Grid(_cpu),
    "tiny": Grid(_tiny),
}
