from typing_extensions import CapsuleType

def registrations() -> dict[str, CapsuleType]:
    """XLA FFI handlers for the platform "cpu", by target name."""

def ffi_api_version() -> tuple[int, int]:
    """(major, minor) of the XLA FFI headers that the module was built with."""
