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
def test_over_two_processes(platform: str, tmp_path: pathlib.Path) -> None:
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
    # To files: nobody reads a pipe of one while the other is awaited, and what jax.distributed
    # says of its end, in lines or parts of them, is not what is judged.
    files = [(tmp_path / f"{rank}.out", tmp_path / f"{rank}.err") for rank in range(2)]
    workers = []
    for rank, (out, err) in enumerate(files):
        with out.open("w") as to, err.open("w") as messages:
            command = [sys.executable, str(WORKER), platform, str(rank), "2", address]
            workers.append(subprocess.Popen(command, env=environment, stdout=to, stderr=messages))
    try:
        codes = [worker.wait(timeout=TIMEOUT) for worker in workers]
    except subprocess.TimeoutExpired:
        codes = [worker.poll() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    report = "\n".join(file.read_text() for pair in files for file in pair)
    assert codes == [0, 0], report
    assert all("passed" in out.read_text().splitlines() for out, _ in files), report
