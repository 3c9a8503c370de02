"""The limit model: how fast a shape could be on a device, by what its memory and units sustain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jax_flashmla.bench.shape import Shape

if TYPE_CHECKING:
    from jax_flashmla.bench.measure import Ceilings

LAUNCH_US = 5.0  # what the model allows a GPU for launching, loading the first tile and merging


@dataclass(frozen=True)
class Limits:
    """What bounds a shape's time: max(bytes / read_gbs, flops / tflops) + overhead_us."""

    read_gbs: float
    read_source: str
    tflops: float
    tflops_source: str
    overhead_us: float

    def us(self, shape: Shape) -> float:
        """Microseconds below which the model says that the shape cannot go."""
        read_us = shape.bytes / (self.read_gbs * 1e3)
        math_us = shape.flops / (self.tflops * 1e6)
        return max(read_us, math_us) + self.overhead_us


# Measured on an H200: memory as bulk copies read it, bfloat16 wgmma at full power.
H200 = Limits(4580.0, "recorded on an H200", 860.0, "recorded on an H200", LAUNCH_US)


def is_h200(device_kind: str) -> bool:
    """Whether it is the GPU that H200 is of: neither its PCIe form nor a GH200."""
    words = device_kind.split()
    return "H200" in words and "NVL" not in words


def limits_of(platform: str, device_kind: str, ceilings: Ceilings) -> Limits:
    """The limits of a device: recorded where its kind has been measured, else from this run.

    An H100 SXM has the multiprocessors and the power limit of an H200, but other memory: its
    bandwidth is the best that XLA's copy and sum reached in this run. On any other device the
    arithmetic is that of XLA's matrix product too.
    """
    if is_h200(device_kind):
        return H200
    read = max(ceilings.read_gbs, ceilings.copy_gbs), "XLA's copy or sum in this run"
    if {"H100", "HBM3"} <= set(device_kind.split()):  # "NVIDIA H100 80GB HBM3" is the SXM one
        return Limits(*read, H200.tflops, H200.tflops_source, LAUNCH_US)
    product = ceilings.matmul_tflops, "XLA's matrix product in this run"
    return Limits(*read, *product, LAUNCH_US if platform == "gpu" else 0.0)
