"""The limit model: how fast a shape could be on a device, by what its memory and units sustain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from jax_flashmla.bench.shape import Shape

if TYPE_CHECKING:
    from jax_flashmla.bench.measure import Ceilings

LAUNCH_US = 5.0  # what the model allows a GPU for launching, loading the first tile and merging


@dataclass(frozen=True)
class Limits:
    """What bounds a shape's time: max(bytes / read_gbs, flops / tflops) + overhead_us.

    Bytes that are gathered count at gather_gbs instead: by the bytes of a row. A shape that takes
    less to start than attention says so as its own `overhead_us`.
    """

    read_gbs: float
    read_source: str
    tflops: float
    tflops_source: str
    overhead_us: float
    gather_gbs: Mapping[int, float] = field(default_factory=dict)
    gather_source: str = ""

    def us(self, shape: Shape) -> float:
        """Microseconds below which the model says that the shape cannot go."""
        gathered = shape.gathered
        read_us = (shape.bytes - sum(gathered.values())) / (self.read_gbs * 1e3)
        for row_bytes, n in gathered.items():
            read_us += n / (self.gather_gbs.get(row_bytes, self.read_gbs) * 1e3)
        math_us = shape.flops / (self.tflops * 1e6)
        own = getattr(shape, "overhead_us", self.overhead_us)
        return max(read_us, math_us) + min(own, self.overhead_us)


# Rows at random from 8 GB, as hand-written copies gather them on an H100 that reads 3,200 GB/s:
# GB/s by bytes of a row. Those of 584 bytes are taken for rows of 576 and 8.
H100_GATHER = {528: 2540.0, 576: 2790.0, 584: 2750.0, 656: 2600.0, 1152: 2960.0}
H100_READ_GBS = 3200.0

# Measured on an H200: memory as bulk copies read it, bfloat16 wgmma at full power.
H200 = Limits(4580.0, "recorded on an H200", 860.0, "recorded on an H200", LAUNCH_US)


def is_h200(device_kind: str) -> bool:
    """Whether it is the GPU that H200 is of: neither its PCIe form nor a GH200."""
    words = device_kind.split()
    return "H200" in words and "NVL" not in words


def is_h100(device_kind: str) -> bool:
    """Whether it is an H100 SXM, "NVIDIA H100 80GB HBM3"."""
    return {"H100", "HBM3"} <= set(device_kind.split())


def limits_of(platform: str, device_kind: str, ceilings: Ceilings) -> Limits:
    """The limits of a device: recorded where its kind has been measured, else from this run.

    An H100 SXM has the multiprocessors and the power limit of an H200, but other memory: its
    bandwidth is the best that XLA's copy and sum reached in this run. On any other device the
    arithmetic is that of XLA's matrix product too.

    Rows are gathered as fast as XLA did in this run; on an H100 or H200 at least at the share of
    its read bandwidth that an H100 was seen to reach.
    """
    read = max(ceilings.read_gbs, ceilings.copy_gbs), "XLA's copy or sum in this run"
    if is_h200(device_kind):
        limits = H200
    elif is_h100(device_kind):
        limits = Limits(*read, H200.tflops, H200.tflops_source, LAUNCH_US)
    else:
        product = ceilings.matmul_tflops, "XLA's matrix product in this run"
        limits = Limits(*read, *product, LAUNCH_US if platform == "gpu" else 0.0)
        return replace(limits, gather_gbs=ceilings.gather_gbs, gather_source="XLA in this run")
    share = {size: gbs / H100_READ_GBS for size, gbs in H100_GATHER.items()}
    gather_gbs = {
        size: max(measured, share.get(size, 0.0) * limits.read_gbs)
        for size, measured in ceilings.gather_gbs.items()
    }
    source = "XLA in this run, at least an H100's recorded share of reading"
    return replace(limits, gather_gbs=gather_gbs, gather_source=source)
