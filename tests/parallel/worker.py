"""One of several processes that run layers over all of their devices.

    worker.py PLATFORM RANK PROCESSES ADDRESS

Prints "passed" at its end.
"""

from __future__ import annotations

import sys

import jax

from jax_flashmla import connect_peers
from parallel import check_layers, make_mesh


def main(platform: str, rank: int, processes: int, address: str) -> None:
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", 2)
        jax.distributed.initialize(address, processes, rank)
    else:
        jax.distributed.initialize(address, processes, rank, local_device_ids=[rank])
    devices = jax.devices()
    assert len({device.process_index for device in devices}) == processes
    mesh = make_mesh(devices)
    peers = connect_peers(mesh, "model")
    assert (peers.refusal is None) == (platform == "cuda"), peers.refusal
    check_layers(mesh, peers)
    if peers.refusal is None:
        assert not peers.failed()
        check_layers(mesh, None)
    else:
        check_layers(make_mesh(devices, data=processes), None)
    print("passed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
