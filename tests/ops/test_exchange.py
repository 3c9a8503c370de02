"""Arrays exchanged over peer memory, against JAX's collectives, bit for bit."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cases
from jax_flashmla import Peers, all_reduce_sum, connect_peers, context
from jax_flashmla.ops.exchange import exchange, exchange_refusal
from parallel import make_mesh

CALL = "flashmla_exchange_v1"


def place(mesh: Mesh, x: np.ndarray) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, P("data", "model")))


def mapped(mesh: Mesh, function):
    """function of each device's own of [data, model, ...], which gives as many arrays."""

    def body(*xs):
        return [x[None, None] for x in function(*(x[0, 0] for x in xs))]

    spec = P("data", "model")
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))


def make_arrays(mesh: Mesh, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Of each device its own; the first in bfloat16, the others in float32."""
    rng, outer = np.random.default_rng(cases.SEED), tuple(mesh.shape.values())
    dtypes = ("bfloat16", "float32")
    return [cases.normal(rng, (*outer, *s), d) for s, d in zip(shapes, dtypes, strict=False)]


def expected_of(x: np.ndarray, gather: bool) -> np.ndarray:
    """[data, model, n, ...]."""
    if not gather:
        return x.swapaxes(1, 2)
    return np.broadcast_to(x[:, None], (x.shape[0], x.shape[1], *x.shape[1:]))


@pytest.mark.parametrize("gather", [False, True], ids=["to each its own", "gathered"])
@pytest.mark.parametrize(
    "shapes", [((8,),), ((3, 64, 512), (3, 64)), ((1000, 24), (4,)), ((129, 512), (5, 4))], ids=str
)
def test_bits_arrive(mesh: Mesh, shapes: tuple[tuple[int, ...], ...], gather: bool) -> None:
    """And so they do right behind sums over the same mailboxes."""
    peers = connect_peers(mesh, "model")
    assert peers.refusal is None
    size = peers.size
    xs = make_arrays(mesh, *(s if gather else (size, *s) for s in shapes))

    def step(*xs: jax.Array) -> list[jax.Array]:
        assert exchange_refusal(peers, "model", xs, gather) is None
        last = np.float32(0)
        for i in range(3):  # each call depends on the one before
            ones = jnp.ones((4 + 20_000 * i,), jnp.float32) + last
            total = all_reduce_sum(ones, "model", peers=peers)
            xs = [x + (0 * total[0]).astype(x.dtype) for x in xs]
            outs = exchange(xs, "model", peers=peers, gather=gather)
            last = 0 * outs[-1].ravel()[0].astype("float32")
        return [jax.lax.pcast(x, "model", to="varying") if gather else x for x in outs]

    got = mapped(mesh, step)(*(place(mesh, x) for x in xs))
    for x, y in zip(got, xs, strict=True):
        np.testing.assert_array_equal(np.asarray(x), expected_of(y, gather))
    assert not peers.failed()


def test_nan_and_infinity_arrive(mesh: Mesh) -> None:
    peers = connect_peers(mesh, "model")
    x = np.ones((*mesh.shape.values(), 8), np.float32)
    x[..., 0], x[..., 2] = np.inf, -0.0
    x[..., 1] = np.uint32(0xFFFFFFFF).view(np.float32)  # the word that marks an empty mailbox
    step = mapped(
        mesh,
        lambda x: [
            jax.lax.pcast(y, "model", to="varying")
            for y in exchange((x,), "model", peers=peers, gather=True)
        ],
    )
    (got,) = step(place(mesh, x))
    np.testing.assert_array_equal(np.asarray(got), expected_of(x, gather=True))


@pytest.mark.parametrize("gather", [False, True])
def test_under_vmap_it_is_one_exchange(cpu_mesh: Mesh, gather: bool) -> None:
    peers = connect_peers(cpu_mesh, "model")
    (x,) = make_arrays(cpu_mesh, (4, 8, 8))
    along = 1 if gather else 2

    def one(x: jax.Array, y: jax.Array) -> list[jax.Array]:
        outs = exchange((x, y), "model", peers=peers, gather=gather)
        return [jax.lax.pcast(x, "model", to="varying") if gather else x for x in outs]

    many = jax.vmap(one, in_axes=(along, None), out_axes=along)
    step = mapped(cpu_mesh, many)
    given = place(cpu_mesh, x), place(cpu_mesh, x[..., 0, :])
    assert step.lower(*given).as_text().count(CALL) == 1
    alone = mapped(cpu_mesh, one)
    got = step(*given)
    for i in range(x.shape[along + 2]):
        want = alone(place(cpu_mesh, x.take(i, along + 2)), given[1])
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(a).take(i, along + 2), np.asarray(b))


@pytest.mark.parametrize("gather", [False, True])
def test_mapped_exchanges_that_are_too_many_go_through_xla(cpu_mesh: Mesh, gather: bool) -> None:
    peers = connect_peers(cpu_mesh, "model")
    (x,) = make_arrays(cpu_mesh, (5, 1 << 17) if gather else (5, 4, 1 << 17))

    def one(x: jax.Array) -> jax.Array:
        (out,) = exchange((x,), "model", peers=peers, gather=gather)
        return jax.lax.pcast(out, "model", to="varying") if gather else out

    step = mapped(cpu_mesh, lambda x: [jax.vmap(one, out_axes=1)(x)])
    given = place(cpu_mesh, x)
    assert CALL not in step.lower(given).as_text()
    (got,) = step(given)
    np.testing.assert_array_equal(
        np.asarray(got), expected_of(x if gather else x.swapaxes(2, 3), gather)
    )


def test_what_it_does_not_take(cpu_mesh: Mesh) -> None:
    peers = connect_peers(cpu_mesh, "model")
    alone = connect_peers(make_mesh(jax.devices("cpu")[:1]), "model")

    def refusal(shape: tuple[int, ...], dtype: str, given: Peers | None, gather: bool) -> str:
        found = []

        def body(x: jax.Array) -> list[jax.Array]:
            found.append(exchange_refusal(given, "model", (x,), gather))
            return [x]

        mesh = cpu_mesh if given is not alone else alone.mesh
        jax.eval_shape(
            mapped(mesh, body), jax.ShapeDtypeStruct((*mesh.shape.values(), *shape), dtype)
        )
        return str(found[0])

    assert refusal((4, 8), "bfloat16", peers, False) == "None"
    assert refusal((4, 8), "bfloat16", None, False) == "peers is None"
    assert "not 1" in refusal((4, 8), "bfloat16", alone, False)
    found = refusal((4, 8), "int32", peers, False)
    assert found == "arrays must be bfloat16, float16 or float32, got int32"
    assert "multiples of 16 bytes, got [14]" in refusal((4, 7), "bfloat16", peers, False)
    assert "multiples of 16 bytes, got [56]" in refusal((4, 7), "bfloat16", peers, True)
    assert refusal((1 << 18,), "float32", peers, True) == "None"
    assert "at most 4194304 bytes, got 4194368" in refusal((2**18 + 4,), "float32", peers, True)
    with pytest.raises(NotImplementedError, match=r"exchange over 'model': segments must have"):
        mapped(cpu_mesh, lambda x: exchange((x,), "model", peers=peers, gather=False)).lower(
            jnp.zeros((2, 4, 4, 1))
        )


@pytest.mark.parametrize(
    ("shapes", "gather", "error", "match"),
    [
        ([], False, ValueError, "xs must be 1 to 2 arrays, got 0"),
        ([(4, 8)] * 3, True, ValueError, "xs must be 1 to 2 arrays, got 3"),
        ([(4, 8), (8, 4)], False, ValueError, r"the 4 devices of 'model', .* \(8, 4\)"),
        ([()], False, ValueError, r"the 4 devices of 'model', got shapes \[\(\)\]"),
    ],
)
def test_wrong_arguments_are_named(cpu_mesh: Mesh, shapes, gather, error, match) -> None:
    peers = connect_peers(cpu_mesh, "model")

    def body(x: jax.Array) -> list[jax.Array]:
        xs = [jnp.zeros(shape) + x for shape in shapes]
        return list(exchange(xs, "model", peers=peers, gather=gather))

    with pytest.raises(error, match=match):
        jax.eval_shape(mapped(cpu_mesh, body), jnp.zeros((2, 4)))


def test_peers_of_another_axis_are_refused(cpu_mesh: Mesh) -> None:
    """Wherever context parallelism takes them."""
    peers = connect_peers(cpu_mesh, "data")

    def body(given, x: jax.Array) -> list[jax.Array]:
        return list(context.merge_over(x, x[..., 0], axis="model", peers=given))

    x = jnp.zeros((2, 4, 1, 1, 4, 8))
    with pytest.raises(ValueError, match="peers must be connected over axis 'model'"):
        jax.eval_shape(mapped(cpu_mesh, functools.partial(body, peers)), x)
    with pytest.raises(TypeError, match="peers must be Peers from connect_peers or None, got str"):
        jax.eval_shape(mapped(cpu_mesh, functools.partial(body, "model")), x)


def test_a_device_that_does_not_come() -> None:
    """The others wait for a while, and say so."""
    mesh = make_mesh(jax.devices("cpu")[2:4])
    peers = connect_peers(mesh, "model", timeout=0.2)
    call = jax.ffi.ffi_call(CALL, [jax.ShapeDtypeStruct((2, 4), np.float32)])
    alone = jax.jit(functools.partial(call, group=np.int64(peers.group), gather=np.bool_(False)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="exchange: a device of the group did not"):
        jax.block_until_ready(
            alone(jax.device_put(np.ones((2, 4), np.float32), mesh.devices[0, 0]))
        )
    assert peers.failed()
    peers.close()


@pytest.mark.parametrize(
    ("shapes", "results", "gather", "match"),
    [
        ([(2, 4)] * 3, [(2, 4)] * 3, False, "one or two arrays and gives as many, got 3 and 3"),
        ([(2, 4)], [(2, 4)] * 2, False, "got 1 and 2"),
        ([(2, 4)], [(2, 8)], False, r"of x \[2, 4\], got \[2, 8\]"),
        ([(2, 4)], [(2, 4)], True, r"of x \[2, 4\], got \[2, 4\]"),
        ([(2, 3)], [(2, 3)], False, "multiple of 16 bytes, got 12"),
        ([(2, 4), (3, 4)], [(2, 4), (3, 4)], False, "between 2 and 8 segments, got 3"),
        ([(9, 4)], [(9, 4)], False, "got 9"),
    ],
)
def test_bad_calls_are_refused_before_memory_is_touched(shapes, results, gather, match) -> None:
    outs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in results]
    call = jax.jit(
        functools.partial(jax.ffi.ffi_call(CALL, outs), group=np.int64(1), gather=np.bool_(gather))
    )
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(Exception, match=match):
        jax.block_until_ready(call(*(jnp.zeros(shape, np.float32) for shape in shapes)))
