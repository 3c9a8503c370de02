"""Which shapes are benchmarked, what each costs at least, and what the peers take for it."""

import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

D_QK, D_V, BLOCK_SIZE, ITEMSIZE = 576, 512, 64, 2
PEERS_FILE = Path(__file__).parent / "peers" / "h200_dense_decode.json"
SHORT_LENGTH = 256  # tokens of all but one sequence where lengths == "skewed"


@dataclass(frozen=True, order=True)
class Row:
    """One shape. `lengths` says how the b sequences' lengths follow from s_k:

    equal   every sequence has s_k tokens
    normal  max(1, N(s_k, s_k / 2)), seed 7
    skewed  one sequence of s_k tokens among b - 1 of SHORT_LENGTH
    """

    b: int
    s_q: int
    h_q: int
    s_k: int
    lengths: str = "equal"

    def __str__(self) -> str:
        return f"b={self.b} s_q={self.s_q} h_q={self.h_q} s_k={self.s_k} {self.lengths}"

    def seqlens(self) -> np.ndarray:
        """int32[b], tokens in each sequence's cache, those of the queries included."""
        if self.lengths == "equal":
            tokens = [self.s_k] * self.b
        elif self.lengths == "normal":
            generator = random.Random(7)
            drawn = (generator.normalvariate(self.s_k, self.s_k / 2) for _ in range(self.b))
            tokens = [max(1, int(n)) for n in drawn]
        elif self.lengths == "skewed":
            tokens = [SHORT_LENGTH] * self.b
            tokens[self.b // 2] = self.s_k
        else:
            raise ValueError(f"lengths must be equal, normal or skewed, got {self.lengths!r}")
        return np.asarray(tokens, np.int32)

    @property
    def cached_tokens(self) -> int:
        return int(self.seqlens().sum(dtype=np.int64))

    @property
    def num_blocks(self) -> int:
        """Blocks that one cache of this shape fills."""
        return int((-(-self.seqlens() // BLOCK_SIZE)).sum())

    @property
    def flops(self) -> int:
        """Of q k^T and p v over every cached token; causal masking is not subtracted."""
        return 2 * (D_QK + D_V) * self.cached_tokens * self.s_q * self.h_q

    @property
    def bytes(self) -> int:
        """The cache read once, q read once, out written once."""
        q_and_out = self.b * self.s_q * self.h_q * (D_QK + D_V)
        return ITEMSIZE * (D_QK * self.cached_tokens + q_and_out)

    def limit_us(self) -> float:
        """The limit model of the peers' file: the H200's measured ceilings plus 5 us."""
        ceilings = _peers_document()["ceilings"]
        read_us = self.bytes / (ceilings["read_gbs"] * 1e3)
        math_us = self.flops / (ceilings["wgmma_sustained_tflops"] * 1e6)
        return max(read_us, math_us) + 5.0


@functools.cache
def _peers_document() -> dict:
    return json.loads(PEERS_FILE.read_text())


@functools.cache
def peers() -> dict[Row, dict[str, float]]:
    """Row -> {"flashmla_us": ..., "best_us": ..., ...}, measured on an H200."""
    return {
        Row(r["b"], r["s_q"], r["h_q"], r["s_k"], r["lengths"]): {
            key: value for key, value in r.items() if key.endswith("_us") and key != "limit_us"
        }
        for r in _peers_document()["rows"]
    }


# What a JAX user would otherwise run is measured beside these rows.
XLA_ROWS = tuple(
    Row(b, s_q, h_q, s_k)
    for b, s_q, h_q, s_k in (
        (1, 1, 16, 2048), (1, 1, 128, 8192), (1, 1, 16, 32768), (4, 1, 128, 8192),
        (8, 1, 16, 2048), (16, 1, 16, 4096), (16, 1, 128, 4096), (64, 1, 16, 4096),
        (64, 1, 128, 4096), (128, 1, 16, 4096), (128, 1, 128, 4096), (128, 2, 128, 4096),
    )
)  # fmt: skip


def _quick() -> tuple[Row, ...]:
    shapes = ((1, 2048), (1, 32768), (4, 8192), (16, 4096), (64, 1024), (128, 4096))
    return tuple(Row(b, 1, h_q, s_k) for h_q in (16, 128) for b, s_k in shapes)


def _off_table() -> tuple[Row, ...]:
    heads = [Row(b, 1, h_q, 4096) for h_q in (8, 20, 32, 40, 64, 96) for b in (1, 16, 128)]
    queries = [Row(b, s_q, h_q, 4096) for s_q in (3, 5, 8) for h_q in (16, 128) for b in (1, 32)]
    skewed = [Row(128, 1, h_q, 65536, "skewed") for h_q in (16, 128)]
    ragged = [Row(b, 1, h_q, 2048, "normal") for h_q in (16, 64) for b in (16, 256)]
    ends = [
        Row(b, 1, h_q, s_k) for h_q in (16, 128) for b, s_k in ((1, 64), (512, 64), (1, 262144))
    ]
    return (*heads, *queries, *skewed, *ragged, *ends)


def _cpu() -> tuple[Row, ...]:
    return (
        Row(1, 1, 16, 1024),
        Row(4, 1, 16, 4096),
        Row(2, 1, 128, 512),
        Row(2, 2, 16, 1024),
        Row(4, 1, 16, 512, "normal"),
    )


def grid(name: str) -> tuple[Row, ...]:
    """The rows of a named grid; see GRIDS."""
    return GRIDS[name]()


GRIDS = {
    "targets": lambda: tuple(peers()),
    "quick": _quick,
    "off-table": _off_table,
    "xla": lambda: XLA_ROWS,
    "cpu": _cpu,
    "tiny": lambda: (Row(2, 1, 4, 96), Row(3, 2, 4, 80, "normal"), Row(4, 1, 3, 320, "skewed")),
}


def matches(row: Row, condition: str) -> bool:
    """Whether the row meets a condition such as "b=128,h_q=16" (all parts must hold)."""
    for part in condition.split(","):
        field, separator, value = part.partition("=")
        if not separator or field not in Row.__dataclass_fields__:
            known = ", ".join(Row.__dataclass_fields__)
            raise ValueError(
                f"a row condition must read field=value with field in {known}, got {part!r}"
            )
        if str(getattr(row, field)) != value:
            return False
    return True
