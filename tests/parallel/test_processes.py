"""The same over the devices of two processes, which jax.distributed brings together."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from parallel import devices_of

WORKER = pathlib.Path(__file__).with_name("worker.py")
TIMEOUT = 240  # seconds


def free_address() -> str:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return f"localhost:{server.getsockname()[1]}"


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_layers_over_two_processes(platform: str) -> None:
    if platform == "cuda":
        devices_of(platform, 2)
    support = WORKER.parents[1] / "support"
    path = os.pathsep.join([str(support), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "JAX_PLATFORMS": platform,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process holds most of a GPU's memory
    }
    address = free_address()
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), platform, str(rank), "2", address],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=TIMEOUT)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
        assert "passed" in output.splitlines(), output
