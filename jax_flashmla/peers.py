"""Devices that reach each other's memory: small sums and exchanges need no collective library.

Connecting is done once, by the host and outside of XLA. Each device gets a mailbox, into which the
others write: within a process by peer access, between the processes of a host by CUDA IPC.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import numbers
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jax_flashmla import _checks, _limits
from jax_flashmla._xla.dispatch import platform_refusal
from jax_flashmla._xla.modules import module_of

_HANDLE_BYTES = 64  # of cudaIpcMemHandle_t
_connected: dict[tuple[Any, ...], Peers] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Peers:
    """The devices along one axis of a mesh, connected: see `connect_peers`. Static and hashable.

    Attributes:
        mesh: the mesh; that of the `jax.shard_map` in which sums and exchanges are made.
        axis: the axis along which devices are connected.
        refusal: why they are not, and XLA's collectives are taken; None where they are.
    """

    mesh: Mesh
    axis: str
    refusal: str | None
    group: int = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """Devices along the axis."""
        return int(self.mesh.shape[self.axis])

    def failed(self) -> bool:
        """Whether a device of this process waited in vain for another: all since then is NaN."""
        if self.refusal is not None:
            return False
        module = module_of(_platform(self.mesh))
        return any(module.has_failed(self.group, d.local_hardware_id) for d in _local(self.mesh))

    def close(self) -> None:
        """Frees the mailboxes. Nothing that uses these peers may be running, or is called again."""
        if self.refusal is None:
            _close(self.mesh, self.group)
        _connected.pop(_key(self.mesh, self.axis), None)


def connect_peers(mesh: Mesh, axis: str, *, timeout: float = 60.0) -> Peers:
    """Connects the devices along an axis of a mesh, for `all_reduce_sum` and context parallelism.

    Called once, outside of jit; with the devices of several processes, by all processes of
    `jax.distributed`. Called again with the same mesh and axis it gives the same peers, with their
    first timeout. Each GPU keeps 16 MiB for it, outside of XLA's memory.

    Between GPUs of one host (2, 4 or 8, or any number up to 8, of compute capability 9.0) that can
    access each other's memory, as over NVLink, and between CPU devices of one process, peers are
    connected. Others are not: `refusal` then says why, and nothing else changes.

    Args:
        mesh: the mesh that `jax.shard_map` is given.
        axis: one of its axes.
        timeout: seconds that a device waits for another within a sum or an exchange. Then its
            results and all later ones are NaN on all devices, and `Peers.failed()` is true. Long
            enough for what devices may be apart, as by compiling.

    Returns:
        Peers, to be passed to `all_reduce_sum`, `jax_flashmla.layers.decode` or the functions of
        `jax_flashmla.context`.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh with devices, got {mesh!r}")
    if not _checks.is_name(axis, mesh.axis_names):
        raise ValueError(
            f"axis must be one of the mesh's axes {mesh.axis_names}, got {_checks.short(axis)}"
        )
    if isinstance(timeout, bool) or not isinstance(timeout, numbers.Real):
        raise TypeError(f"timeout must be a number of seconds, got {_checks.describe(timeout)}")
    if not 0 < timeout < 1e9:
        raise ValueError(f"timeout must be positive seconds, below 1e9, got {timeout!r}")
    key = _key(mesh, axis)
    if key not in _connected:
        digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
        group = int.from_bytes(digest, "big")  # the same in every process
        refusal = _static_refusal(mesh, axis) or _connect(mesh, axis, group, timeout)
        _connected[key] = Peers(mesh, axis, refusal, group)
    return _connected[key]


def _key(mesh: Mesh, axis: str) -> tuple[Any, ...]:
    ids = tuple(device.id for device in mesh.devices.flat)
    return _platform(mesh), axis, mesh.axis_names, mesh.devices.shape, ids


def _platform(mesh: Mesh) -> str:
    platform = mesh.devices.flat[0].platform
    return "cuda" if platform == "gpu" else str(platform)


def _local(mesh: Mesh) -> list[jax.Device]:
    return [d for d in mesh.devices.flat if d.process_index == jax.process_index()]


def _subgroups(mesh: Mesh, axis: str) -> Any:
    """The mesh's devices, an array [subgroups, size]: a row sums."""
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1)
    return devices.reshape(-1, devices.shape[-1])


def _static_refusal(mesh: Mesh, axis: str) -> str | None:
    """Why no process would try to connect: the same in each of them."""
    platform, size = _platform(mesh), mesh.shape[axis]
    if not 2 <= size <= _limits.MAX_PEERS:
        return f"between 2 and {_limits.MAX_PEERS} devices can be connected, not {size}"
    if platform not in ("cpu", "cuda"):
        return f"there are kernels for cpu and cuda, not for {platform}"
    if platform == "cpu" and len(_local(mesh)) != mesh.size:
        return "CPU devices of several processes cannot be connected"
    return None


def _connect(mesh: Mesh, axis: str, group: int, timeout: float) -> str | None:
    """Opens the mailboxes of this process's devices, and reaches the others'; why it could not."""
    platform, rows = _platform(mesh), _subgroups(mesh, axis)
    several = len(_local(mesh)) != mesh.size
    # Of each device: whether it is open, its host, its handle.
    mine = np.zeros((*rows.shape, 1 + 16 + _HANDLE_BYTES), np.uint8)
    reason = platform_refusal(platform)

    def attempt(step: Callable[[], None]) -> bool:
        nonlocal reason
        if reason is None:
            try:
                step()
            except RuntimeError as error:
                reason = str(error)
        return reason is None

    def each_local(step: Callable[[int, int], None]) -> None:
        for row, rank in np.ndindex(*rows.shape):
            if rows[row, rank].process_index == jax.process_index():
                step(row, rank)

    def open_one(row: int, rank: int) -> None:
        ordinal, size = rows[row, rank].local_hardware_id, rows.shape[1]
        handle = module_of(platform).open_group(group, ordinal, rank, size, row, float(timeout))
        record = bytes([1]) + _host() + handle.ljust(_HANDLE_BYTES, b"\0")
        mine[row, rank] = np.frombuffer(record, np.uint8)

    attempt(lambda: each_local(open_one))
    records = _exchange(mine, rows, several)
    if not records[..., 0].all():
        _close(mesh, group)
        return reason or "a device of another process cannot be connected"

    def reach_others(row: int, rank: int) -> None:
        device = rows[row, rank]
        for peer_rank, peer in enumerate(rows[row]):
            if peer_rank == rank:
                continue
            here = peer.process_index == device.process_index
            _, host, handle = np.split(records[row, peer_rank], [1, 17])
            if not here and host.tobytes() != _host():
                raise RuntimeError(f"{device} and {peer} are on different hosts")
            ordinal = peer.local_hardware_id if here else -1
            module_of(platform).reach_member(
                group, device.local_hardware_id, peer_rank, ordinal, handle.tobytes()
            )
        mine[row, rank, 0] = 2

    attempt(lambda: each_local(reach_others))
    records = _exchange(mine, rows, several)
    if (records[..., 0] == 2).all():
        return None
    _close(mesh, group)
    return reason or "a device of another process cannot be connected"


def _exchange(mine: np.ndarray, rows: Any, several: bool) -> np.ndarray:
    """Each device's record, from the process that has it."""
    if not several:
        return mine
    of_process = np.asarray(multihost_utils.process_allgather(mine))
    records = np.empty_like(mine)
    for row, rank in np.ndindex(*rows.shape):
        records[row, rank] = of_process[rows[row, rank].process_index, row, rank]
    return records


def _close(mesh: Mesh, group: int) -> None:
    with contextlib.suppress(ImportError):
        module = module_of(_platform(mesh))
        for device in _local(mesh):
            module.close_group(group, device.local_hardware_id)


def _host() -> bytes:
    """16 bytes that differ from host to host, and from boot to boot."""
    boot_id = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return hashlib.blake2b(boot_id.read_bytes(), digest_size=16).digest()


def check_peers(peers: Any, axis: str) -> Peers:
    """Peers of the axis of the mesh that is traced."""
    if not isinstance(peers, Peers):
        raise TypeError(
            f"peers must be Peers from connect_peers or None, got {type(peers).__name__}"
        )
    mesh = jax.sharding.get_abstract_mesh()
    expected, got = dict(peers.mesh.shape), dict(mesh.shape)
    if peers.axis != axis or expected != got:
        raise ValueError(
            f"peers must be connected over axis {axis!r} of shard_map's mesh {got}, got those over "
            f"{peers.axis!r} of {expected}"
        )
    return peers


def peers_refusal(peers: Peers | None, x: jax.Array) -> str | None:
    """Why a sum is not made over peer memory."""
    if peers is None:
        return "peers is None"
    if peers.refusal is not None:
        return peers.refusal
    if x.dtype not in _checks.CACHE_DTYPES:
        return f"x must be {_checks.dtype_names(_checks.CACHE_DTYPES)}, got {x.dtype}"
    nbytes = x.size * x.dtype.itemsize
    if not 0 < nbytes <= _limits.MAX_SUM_BYTES:
        return f"x must have 1 to {_limits.MAX_SUM_BYTES} bytes, got {nbytes}"
    return None
