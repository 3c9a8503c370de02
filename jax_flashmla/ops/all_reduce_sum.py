"""Small sums over the devices of a mesh axis, over peer memory."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla._xla.operation import Operation
from jax_flashmla.peers import Peers, check_peers, peers_refusal


def all_reduce_sum(
    x: jax.Array, axis: str, *, peers: Peers | None = None, implementation: str | None = None
) -> jax.Array:
    """`jax.lax.psum(x, axis)` inside `jax.shard_map`, at the latency of one kernel where it can be.

    What a decoding step sums over its heads is small, and such a sum takes as long as its latency.
    Between connected peers it is one kernel that writes to the other devices' memory; XLA captures
    it in CUDA graphs with what is around it. Elements are summed in float32 in the order of
    the axis and rounded once: all devices get the same bits, at every call.

    The default rule: over peers where `peers` are given and connected, x is bfloat16, float16 or
    float32, and has at most 2 MiB on each device; `jax.lax.psum` everywhere else.

    All devices of the axis make the same sums in the same order, as the devices of one jitted
    function do. With `--xla_gpu_command_buffer_scheduling_mode=CONCURRENT`, which is not the
    default, sums that do not depend on each other have no order: do not use peers then. On CPU
    devices XLA runs what does not depend on each other in any order: there each sum over some
    peers, and each exchange of `jax_flashmla.context`, must depend on the one before.

    Args:
        x: this device's summand, of any shape.
        axis: a manual axis of the mesh.
        peers: from `connect_peers` with shard_map's mesh and this axis; None for `jax.lax.psum`.
        implementation: None for the rule above, "kernel" to insist on peers, "xla" for
            `jax.lax.psum`.

    Returns:
        The sum, of x's shape and dtype, the same on all devices of the axis.

    Raises:
        TypeError, ValueError: an argument is not as described.
        NotImplementedError: implementation is "kernel", and `psum` would be taken; or the kernel is
            differentiated.
    """
    _checks.check_implementation(implementation)
    _checks.refuse_foreign("x", x, "[...]")
    _checks.axis_size("axis", axis)
    if peers is not None:
        check_peers(peers, axis)
    refusal = "it is not asked for" if implementation == "xla" else peers_refusal(peers, x)
    if peers is not None and refusal is None:
        (out,) = _operation(x, axis=axis, group=peers.group, implementation=implementation)
        return out
    if implementation == "kernel":
        raise NotImplementedError(f'all_reduce_sum with implementation="kernel": {refusal}')
    return jax.lax.psum(x, axis)


def _batch(
    operands: tuple[jax.Array], dims: tuple[int], **params: Any
) -> tuple[list[jax.Array], list[int]]:
    (x,) = operands
    if x.size * x.dtype.itemsize > _limits.MAX_SUM_BYTES:  # all mapped sums together
        return [jax.lax.psum(x, params["axis"])], list(dims)
    return _operation.bind(x, **params), list(dims)


_operation = Operation(
    "all_reduce_sum",
    static=("axis", "group"),
    results=lambda x, *, axis, group: [(x.shape, x.dtype)],
    num_results=1,
    reference=lambda x, *, axis, group: [jax.lax.psum(x, axis)],
    batch=_batch,
    attributes=lambda *, axis, group: {"group": np.int64(group)},
    invariant=lambda *, axis, group: axis,
)
