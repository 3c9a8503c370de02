"""One of several processes that run layers over all of their devices.

    worker.py PLATFORM RANK PROCESSES ADDRESS

Prints a line "passed" at its end.
"""

from __future__ import annotations

import sys

import jax
import numpy as np

from jax_flashmla import connect_peers
from parallel import check_layers, make_mesh


def main(platform: str, rank: int, processes: int, address: str) -> None:
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", 2)
        jax.distributed.initialize(address, processes, rank)
    else:
        jax.distributed.initialize(address, processes, rank, local_device_ids=[rank])
    # Heads over processes, sequences over the devices of each.
    by_rank = np.array(jax.devices()).reshape(processes, -1)
    assert [row[0].process_index for row in by_rank] == list(range(processes))
    mesh = make_mesh(list(by_rank.T.flat), data=by_rank.shape[1])
    peers = connect_peers(mesh, "model")
    assert (peers.refusal is None) == (platform == "cuda"), peers.refusal
    check_layers(mesh, peers)
    if peers.refusal is None:
        assert not peers.failed()
        check_layers(mesh, None)
    jax.distributed.shutdown()  # together: the first to leave would be reported as lost
    print("passed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
