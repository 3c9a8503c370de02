"""Arrays exchanged between the devices of a mesh axis, over peer memory in one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _checks, _limits
from jax_flashmla._xla.operation import Operation
from jax_flashmla.peers import Peers, check_peers

_VECTOR = 16  # bytes; kVectorBytes in csrc/sm90/peers/region.h


def exchange_refusal(
    peers: Peers | None, axis: str, xs: Sequence[jax.Array], gather: bool
) -> str | None:
    """Why `exchange` does not take these arrays; None where it does."""
    if peers is None:
        return "peers is None"
    size = check_peers(peers, axis).size
    if peers.refusal is not None:
        return peers.refusal
    segments = [x.size * x.dtype.itemsize // (1 if gather else size) for x in xs]
    if not all(x.dtype in _checks.CACHE_DTYPES for x in xs):
        names = ", ".join(x.dtype.name for x in xs)
        return f"arrays must be {_checks.dtype_names(_checks.CACHE_DTYPES)}, got {names}"
    if any(nbytes == 0 or nbytes % _VECTOR for nbytes in segments):
        return f"segments must have multiples of {_VECTOR} bytes, got {segments}"
    if sum(segments) * size > _limits.MAX_EXCHANGE_BYTES:
        return (
            f"devices may give each other at most {_limits.MAX_EXCHANGE_BYTES} bytes, got "
            f"{sum(segments) * size}"
        )
    return None


def exchange(
    xs: Sequence[jax.Array], axis: str, *, peers: Peers, gather: bool
) -> Sequence[jax.Array]:
    """What the devices of an axis have for each other, inside `jax.shard_map`.

    As `jax.lax.all_to_all`, or `all_gather` with results known to be the same on all devices, of
    one or two arrays in one kernel. Calls and sums over the same peers are made in the same order
    on all devices, as with `all_reduce_sum`. `exchange_refusal` says what it does not take.

    Args:
        xs: one or two arrays of bfloat16, float16 or float32: [n, ...] with a segment for each of n
            devices; [...] with gather.
        axis: a manual axis of the mesh.
        peers: connected, from `connect_peers` with shard_map's mesh and this axis.
        gather: whether all devices get all that each one has.

    Returns:
        Of each array [n, ...] of its dtype: a segment from each device, in the order of the axis. A
        word of 32 bits that is all ones, a NaN, may arrive as another NaN.

    Raises:
        TypeError, ValueError: an argument is not as described.
        NotImplementedError: as exchange_refusal says; or it is differentiated.
    """
    if not 1 <= len(xs) <= _limits.MAX_EXCHANGED:
        raise ValueError(f"xs must be 1 to {_limits.MAX_EXCHANGED} arrays, got {len(xs)}")
    size = _checks.axis_size("axis", axis)
    if not gather and any(x.shape[:1] != (size,) for x in xs):
        raise ValueError(
            f"xs must be [n, ...] with a segment for each of the {size} devices of {axis!r}, got "
            f"shapes {[x.shape for x in xs]}"
        )
    refusal = exchange_refusal(peers, axis, xs, gather)
    if refusal is not None:
        raise NotImplementedError(f"exchange over {axis!r}: {refusal}")
    return _operation(
        *xs, axis=axis, group=peers.group, size=peers.size, gather=gather, implementation=None
    )


def _results(
    *xs: Any, axis: str, group: int, size: int, gather: bool
) -> list[tuple[tuple[int, ...], Any]]:
    return [((size, *x.shape) if gather else x.shape, x.dtype) for x in xs]


def _reference(*xs: jax.Array, axis: str, group: int, size: int, gather: bool) -> list[jax.Array]:
    if gather:  # as a sum of what is 0 but in the rank's place: known to be the same on all ranks
        rank = jax.lax.axis_index(axis)
        alone = [jnp.zeros((size, *x.shape), x.dtype).at[rank].set(x) for x in xs]
        return [jax.lax.psum(x, axis) for x in alone]
    return [jax.lax.all_to_all(x, axis, 0, 0) for x in xs]


def _batch(
    operands: tuple[jax.Array, ...], dims: tuple[int | None, ...], **params: Any
) -> tuple[list[jax.Array], list[int]]:
    """The mapped axis inside of segments."""
    place = 0 if params["gather"] else 1
    n = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)

    def fold(x: jax.Array, dim: int | None) -> jax.Array:
        if dim is not None:
            return jnp.moveaxis(x, dim, place)
        x = jnp.expand_dims(x, place)
        return jnp.broadcast_to(x, (*x.shape[:place], n, *x.shape[place + 1 :]))

    folded = [fold(x, dim) for x, dim in zip(operands, dims, strict=True)]
    nbytes = sum(x.size * x.dtype.itemsize for x in folded)
    if nbytes * (params["size"] if params["gather"] else 1) > _limits.MAX_EXCHANGE_BYTES:
        names = ("axis", "group", "size", "gather")
        return _reference(*folded, **{k: params[k] for k in names}), [1] * len(folded)
    return _operation.bind(*folded, **params), [1] * len(folded)


_operation = Operation(
    "exchange",
    static=("axis", "group", "size", "gather"),
    results=_results,
    num_results=_limits.MAX_EXCHANGED,
    reference=_reference,
    batch=_batch,
    attributes=lambda *, axis, group, size, gather: {
        "group": np.int64(group),
        "gather": np.bool_(gather),
    },
    invariant=lambda *, axis, group, size, gather: axis if gather else None,
)
