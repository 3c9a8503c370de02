"""The limit model: how fast a row could be on a device, from what its memory and units sustain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jax_flashmla.cli.bench import peers
from jax_flashmla.cli.bench.shapes import Row

if TYPE_CHECKING:
    from jax_flashmla.cli.bench.measure import Ceilings

LAUNCH_US = 5.0  # what the model allows a GPU for launching, loading the first tile and merging


@dataclass(frozen=True)
class Limits:
    """What bounds a row's time: max(bytes / read_gbs, flops / tflops) + overhead_us."""

    read_gbs: float
    read_source: str
    tflops: float
    tflops_source: str
    overhead_us: float

    def us(self, row: Row) -> float:
        """Microseconds below which the model says that the row cannot go."""
        read_us = row.bytes / (self.read_gbs * 1e3)
        math_us = row.flops / (self.tflops * 1e6)
        return max(read_us, math_us) + self.overhead_us


def h200_limits() -> Limits:
    """As recorded beside the peers: memory as bulk copies read it, tensor cores at full power."""
    known = peers.document()["ceilings"]
    return Limits(
        known["read_gbs"],
        "recorded on an H200",
        known["wgmma_sustained_tflops"],
        "recorded on an H200",
        LAUNCH_US,
    )


def limits_of(platform: str, device_kind: str, ceilings: Ceilings) -> Limits:
    """The limits of a device: recorded where its kind has been measured, else from this run.

    An H100 SXM has the multiprocessors and the power limit of an H200, but other memory: its
    bandwidth is the best that XLA's copy and sum reached in this run. On any other device the
    arithmetic is that of XLA's matrix product too.
    """
    h200 = h200_limits()
    if peers.is_h200(device_kind):
        return h200
    read = max(ceilings.read_gbs, ceilings.copy_gbs), "XLA's copy or sum in this run"
    if {"H100", "HBM3"} <= set(device_kind.split()):  # "NVIDIA H100 80GB HBM3" is the SXM one
        return Limits(*read, h200.tflops, h200.tflops_source, LAUNCH_US)
    product = ceilings.matmul_tflops, "XLA's matrix product in this run"
    return Limits(*read, *product, LAUNCH_US if platform == "gpu" else 0.0)
