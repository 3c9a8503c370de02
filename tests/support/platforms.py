"""Each implementation on each platform, for fixtures that whole modules share."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

# (platform, `implementation=`)
CPU_AND_KERNELS = [
    pytest.param(("cpu", "xla"), id="cpu-xla"),
    pytest.param(("cpu", "kernel"), id="cpu-kernel"),
    pytest.param(("cuda", "kernel"), id="cuda-kernel", marks=pytest.mark.gpu),
]
EVERYWHERE = [
    *CPU_AND_KERNELS,
    pytest.param(("cuda", "xla"), id="cuda-xla", marks=pytest.mark.gpu),
]


def each(request: pytest.FixtureRequest) -> Iterator[str]:
    """The parameter's implementation, while its platform is the default one."""
    platform, name = request.param
    with jax.default_device(jax.devices(platform)[0]):
        yield name
