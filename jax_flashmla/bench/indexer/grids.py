"""The named grids of shapes, and the shapes at which plain XLA is timed too."""

from __future__ import annotations

from jax_flashmla.bench.indexer import peers
from jax_flashmla.bench.indexer.shapes import ScoresShape, TopkShape
from jax_flashmla.bench.operation import Grid
from jax_flashmla.bench.order import spread

K = 1024
LENGTHS = (8 * K, 32 * K, 128 * K)
BATCHES = (1, 4, 16, 64, 128)


def _scores() -> tuple[ScoresShape, ...]:
    """DeepGEMM's own shapes, and more query tokens than it takes."""
    few = [ScoresShape(b, 1, 64, s_k) for s_k in LENGTHS for b in BATCHES]
    more = [ScoresShape(64, s_q, 64, 32 * K) for s_q in (2, 3, 4, 8)]
    half = [ScoresShape(64, s_q, 32, 32 * K) for s_q in (1, 2, 4, 8)]
    prompt = [ScoresShape(1, 2 * K, 64, 64 * K)]
    known = [shape for shape in peers.recorded() if type(shape) is ScoresShape]
    return spread(list(dict.fromkeys([*few, *more, *half, *prompt, *known])))


def _topk() -> tuple[TopkShape, ...]:
    """Scored and selected, with other numbers of heads and query tokens, and selected alone."""
    few = [TopkShape(b, 1, 64, s_k) for s_k in LENGTHS for b in BATCHES]
    middle = [TopkShape(128, 1, 64, 16 * K)]
    half = [TopkShape(b, 1, 32, s_k) for s_k in LENGTHS for b in BATCHES]
    draft = [TopkShape(b, 2, 64, s_k) for s_k in LENGTHS for b in BATCHES]
    given = [s for s in peers.recorded() if isinstance(s, TopkShape) and s.given]
    return spread([*few, *middle, *half, *draft, *given])


SCORES_XLA = (ScoresShape(1, 1, 64, 32 * K), ScoresShape(16, 1, 64, 32 * K))
TOPK_XLA = (
    TopkShape(1, 1, 64, 32 * K),
    TopkShape(16, 1, 64, 32 * K),
    *(
        TopkShape(b, 1, 0, s_k)
        for b, s_k in ((1, 8 * K), (1, 32 * K), (1, 128 * K), (64, 8 * K), (64, 32 * K))
    ),
)
SCORES_GRIDS = {
    "indexer": Grid(_scores),
    "quick": Grid(lambda: tuple(ScoresShape(b, 1, 64, 32 * K) for b in (1, 16, 64))),
    "xla": Grid(lambda: SCORES_XLA),
    "cpu": Grid(lambda: tuple(ScoresShape(b, 1, 16, 4 * K) for b in (1, 4))),
    "tiny": Grid(lambda: (ScoresShape(2, 1, 4, 200), ScoresShape(1, 3, 5, 130))),
}
TOPK_GRIDS = {
    "indexer": Grid(_topk),
    "quick": Grid(lambda: tuple(TopkShape(b, 1, 64, 32 * K) for b in (1, 16, 64))),
    "xla": Grid(lambda: TOPK_XLA),
    "cpu": Grid(lambda: tuple(TopkShape(b, 1, 16, 4 * K, 512) for b in (1, 4))),
    "tiny": Grid(lambda: (TopkShape(2, 1, 4, 200, 70), TopkShape(1, 3, 0, 130, 20))),
}
