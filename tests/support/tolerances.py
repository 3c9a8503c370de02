"""How far from the truth an implementation may be, with the reason beside each number."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tolerance:
    absolute: float
    relative: float
    cosine: float | None = None  # of the array as a whole: 1 - 2 x.y / (x.x + y.y)


# FlashMLA's own, for bfloat16 and float16 alike. Absolute: outputs average many values, so small
# ones are differences of large ones. Relative: 2 units of bfloat16's 8 bits (2^-7 each). Cosine:
# errors of single elements must be noise, not a scale or a missing key.
OUT = Tolerance(absolute=8e-4, relative=2.01 / 128, cosine=5e-6)

# FlashMLA's own relative bound: lse is float32, of scores whose products are exact and whose sum is
# rounded, with exp2 and log2 taken approximately. Absolute: its queries are so small that scores
# are near 0; ours sum products up to some 100 before 576^-0.5 scales them, of which float32 rounds
# off 2^-18 in each of 36 steps of 16 columns: 1e-6 where these add up as noise, here twice that.
LSE = Tolerance(absolute=2e-6, relative=8.01 / 65536)

# Of one kernel's outputs against another's, each of which may err as OUT says, on its own.
TWO_OUTS = Tolerance(absolute=1.6e-3, relative=4.02 / 128, cosine=1e-5)

# FlashMLA's own for sparse decode, against attention over the dequantised cache: as OUT. The
# absolute bound is a little wider, for rows are fewer, and averages over them larger.
SPARSE_OUT = Tolerance(absolute=1e-3, relative=2.01 / 128, cosine=5e-6)

# FlashMLA's own for sparse prefill; lse's absolute bound, and that of the largest score: as LSE.
PREFILL_OUT = Tolerance(absolute=8e-4, relative=3.01 / 128, cosine=7e-6)
PREFILL_LSE = Tolerance(absolute=2e-6, relative=2.01 / 65536)

# Of float32 caches against float64: each score is a sum of up to 576 products of which every one is
# rounded (2^-24), and the weights' relative error is the scores' absolute one.
F32_DECODE = {
    "out": Tolerance(absolute=2e-6, relative=1e-5, cosine=1e-11),
    "lse": Tolerance(absolute=2e-6, relative=1e-6),
}

# An indexer's scores, about 1 large, against float64 over the same codes and scales. Tensor cores
# add e4m3 products with 13 bits behind the leading one, so the absolute bound is 2^-9 of the
# largest heads' products, which cancel. Cosine: DeepGEMM's own against simulated quantisation.
INDEX_SCORES = Tolerance(absolute=2e-3, relative=1e-2, cosine=5e-6)

# The same in float32 on the CPU: products are exact, up to 64 * 128 of them are added (2^-24 each).
F32_INDEX_SCORES = Tolerance(absolute=1e-5, relative=1e-5, cosine=1e-11)

# A layer in float32 against float64: five matrix products, each of whose sums rounds (2^-24), on
# outputs of about 1; and the two paths take them in different orders.
F32_LAYER = Tolerance(absolute=5e-6, relative=1e-5, cosine=1e-11)

# A layer in bfloat16 against float64 with the same, rounded weights: latents, queries, attention
# and output are each rounded to 8 bits (2^-9), and errors of scores grow with the scores.
BF16_LAYER = Tolerance(absolute=0.06, relative=0.03, cosine=1e-4)

# A layer in float32 against transformers in float32, outputs of about 1: both round every product
# and sum (2^-24), in different orders. What the project promises.
F32_PARITY = Tolerance(absolute=1e-5, relative=1e-5, cosine=1e-11)

# A layer in bfloat16 against transformers in float32 with the same, rounded weights: as BF16_LAYER.
BF16_PARITY = BF16_LAYER

# The same with latents in e4m3 (3 bits of fraction: 2^-4 of each, hundreds of them averaged).
FP8_PARITY = Tolerance(absolute=0.2, relative=0.1, cosine=1e-3)

# Logits of a whole small model in float32 against transformers', about 1.5 large: the errors of its
# layers (F32_PARITY) added up, and multiplied by the norms and projections that follow.
F32_LOGITS = Tolerance(absolute=5e-5, relative=5e-5, cosine=1e-10)

# The same in bfloat16: as BF16_LAYER, after two norms, the MLP and the head.
BF16_LOGITS = Tolerance(absolute=0.15, relative=0.05, cosine=3e-4)

# Of merged parts against the whole, both float32 on one device: some roundings of 2^-24 each.
MERGE = Tolerance(absolute=2e-6, relative=1e-5)

# Of a gradient in bfloat16 against float64: its last rounding (2^-9), and that of the keys' sum.
GRADIENT = Tolerance(absolute=1e-3, relative=2**-7)


def assert_close(name: str, got: np.ndarray, expected: np.ndarray, tolerance: Tolerance) -> None:
    """Every element within the absolute or the relative bound, infinities equal, no NaN."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    assert not np.isnan(expected).any(), f"{name}: NaN expected"
    assert not np.isnan(got).any(), f"{name}: {np.isnan(got).sum()} NaN of {got.size}"
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(got[infinite], expected[infinite], err_msg=name)
    got, expected = np.where(infinite, 0, got), np.where(infinite, 0, expected)
    error = np.abs(got - expected)
    bound = np.maximum(tolerance.absolute, tolerance.relative * np.abs(expected))
    if (error > bound).any():
        worst = np.unravel_index(np.argmax(error - bound), error.shape)
        raise AssertionError(
            f"{name}: {(error > bound).sum()} of {error.size} elements out of bounds; at "
            f"{tuple(int(i) for i in worst)} got {got[worst]}, expected {expected[worst]}, bound "
            f"{bound[worst]:.3g}"
        )
    size = np.sum(got**2 + expected**2)
    if tolerance.cosine is not None and size > 0:
        distance = 1 - 2 * np.sum(got * expected) / size
        assert distance <= tolerance.cosine, f"{name}: cosine distance {distance:.3g}"


def assert_decoded(
    got: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    *,
    out: Tolerance = OUT,
    lse: Tolerance = LSE,
) -> None:
    """(out, lse) against the (out, lse) expected."""
    for name, x, y, bound in zip(("out", "lse"), got, expected, (out, lse), strict=True):
        assert_close(name, x, y, bound)
