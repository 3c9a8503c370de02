from typing_extensions import CapsuleType

def registrations() -> dict[str, CapsuleType]:
    """XLA FFI handlers for the platform "CUDA", by target name."""

def ffi_api_version() -> tuple[int, int]:
    """(major, minor) of the XLA FFI headers that the module was built with."""

def open_group(
    group: int, device: int, rank: int, size: int, subgroup: int, timeout_seconds: float, /
) -> bytes:
    """Makes a device a member of a group; what another process reaches it by."""

def reach_member(
    group: int, device: int, peer_rank: int, peer_device: int, handle: bytes, /
) -> None:
    """Connects a device to a member: device peer_device of this process, or -1 and its handle."""

def has_failed(group: int, device: int, /) -> bool:
    """Whether a member waited in vain for another."""

def close_group(group: int, device: int, /) -> None:
    """Ends a device's membership."""
