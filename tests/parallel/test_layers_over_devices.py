"""Layers with heads and sequences over devices of one process, against one device."""

from __future__ import annotations

import pytest

from jax_flashmla import connect_peers
from parallel import DEVICES, check_layers, devices_of, make_mesh


@pytest.mark.parametrize("sums", ["psum", "peers"])
@pytest.mark.parametrize("devices", DEVICES)
def test_heads_over_devices(devices: tuple[str, int], sums: str) -> None:
    mesh = make_mesh(devices_of(*devices))
    peers = connect_peers(mesh, "model") if sums == "peers" else None
    assert peers is None or peers.refusal is None
    check_layers(mesh, peers)
    assert peers is None or not peers.failed()


@pytest.mark.parametrize("devices", DEVICES)
def test_sequences_and_heads_over_devices(devices: tuple[str, int]) -> None:
    """Over 2 devices each has half of the sequences and all heads."""
    mesh = make_mesh(devices_of(*devices), data=2)
    check_layers(mesh, connect_peers(mesh, "model"))
