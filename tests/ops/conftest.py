"""Meshes of the operations over peer memory."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import Mesh

from parallel import DEVICES, devices_of, make_mesh


@pytest.fixture(params=DEVICES)
def mesh(request: pytest.FixtureRequest) -> Mesh:
    """All of its "model" for GPUs, and two groups of 4 CPU devices."""
    devices = devices_of(*request.param)
    return make_mesh(devices, data=2 if request.param[0] == "cpu" else 1)


@pytest.fixture
def cpu_mesh() -> Mesh:
    return make_mesh(jax.devices("cpu")[:8], data=2)
