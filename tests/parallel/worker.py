"""One of several processes that run layers and long contexts over all of their devices.

    worker.py PLATFORM RANK PROCESSES ADDRESS

Prints what it has done, and a line "passed" at its end.
"""

from __future__ import annotations

import sys

import jax
import numpy as np

from jax_flashmla import connect_peers
from long_contexts import check_long_context
from parallel import check_layers, check_moves, make_mesh

TOKENS = {"cpu": 70, "cuda": 131_077}


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
    print("layers", flush=True)
    if peers.refusal is None:
        assert not peers.failed()
        check_layers(mesh, None)
    check_moves(make_mesh(list(by_rank.flat), data=by_rank.size))
    print("moves", flush=True)
    for connect in (connect_peers, None) if peers.refusal is None else (None,):
        check_long_context(
            list(by_rank.flat), TOKENS[platform], 2, heads_split=True, connect=connect
        )
    jax.distributed.shutdown()  # together: the first to leave would be reported as lost
    print("passed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
