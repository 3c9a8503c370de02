"""Sums over a mesh axis: over peer memory where peers are connected, psum everywhere else."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cases
from jax_flashmla import Peers, all_reduce_sum, connect_peers
from parallel import make_mesh

CALL = "flashmla_all_reduce_sum_v1"


def mapped(mesh: Mesh, function, **options):
    """function of each device's row of [data, model, ...], with "model" gone from the result."""

    def body(x):
        return function(x[0, 0])[None]

    return jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=P("data", "model"), out_specs=P("data"), **options)
    )


def summands(mesh: Mesh, shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, np.ndarray]:
    """Random ones, a device's each, and their sums in float32 in the order of ranks, rounded."""
    outer = tuple(mesh.shape.values())
    x = cases.normal(np.random.default_rng(cases.SEED), (*outer, *shape), dtype)
    total = np.zeros((outer[0], *shape), np.float32)
    for rank in range(outer[1]):
        total = total + x[:, rank].astype(np.float32)
    placed = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
    return placed, total.astype(x.dtype)


def assert_everywhere(got: jax.Array, expected: np.ndarray) -> None:
    """Bits, on every device."""
    for shard in got.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1,), "float32"),
        ((3, 5), "bfloat16"),
        ((7168,), "bfloat16"),
        ((32, 7168), "bfloat16"),
        ((1000, 777), "float16"),
        ((1 << 19,), "float32"),
    ],
    ids=str,
)
def test_bits_are_those_of_a_sum_in_order(mesh: Mesh, shape: tuple[int, ...], dtype: str) -> None:
    peers = connect_peers(mesh, "model")
    assert peers.refusal is None
    x, expected = summands(mesh, shape, dtype)
    step = mapped(mesh, lambda x: all_reduce_sum(x, "model", peers=peers, implementation="kernel"))
    for _ in range(3):
        assert_everywhere(step(x), expected)
    assert not peers.failed()


SIZES = (5, 40_000, 1, 8192, 70_000, 3)


def check_turns(mesh: Mesh, turns: int, repeat) -> None:
    """Each turn adds 1 to the means over devices of arrays of SIZES, one after the other.

    Each is an array of its own: for two GPUs XLA's compiler (jax 0.11.2) crashes on the same sums
    of slices of one array that are written back, whatever the call does.
    """
    peers = connect_peers(mesh, "model")
    size = np.float32(mesh.shape["model"])

    def turn(xs):
        done, last = [], 0 * xs[-1][0]  # each depends on the one before, those of a turn before too
        for x in xs:
            mean = all_reduce_sum(x + last, "model", peers=peers) / size
            done.append(jax.lax.pcast(mean, "model", to="varying") + 1)
            last = 0 * done[-1][0]
        return done

    spec = P("data", "model")
    step = jax.jit(
        jax.shard_map(
            lambda *xs: [x[None, None] for x in repeat(turn, [x[0, 0] for x in xs])],
            mesh=mesh, in_specs=spec, out_specs=spec,
        )
    )  # fmt: skip
    xs = [np.full((*mesh.shape.values(), n), i, np.float32) for i, n in enumerate(SIZES)]
    got = step(*(jax.device_put(x, NamedSharding(mesh, spec)) for x in xs))
    for x, y in zip(got, xs, strict=True):
        np.testing.assert_array_equal(np.asarray(x), y + turns)
    assert not peers.failed()


def test_many_sums_of_changing_sizes(mesh: Mesh) -> None:
    """In one function, each on the result of the one before, as layers do."""
    check_turns(mesh, 4, lambda turn, xs: functools.reduce(lambda xs, _: turn(xs), range(4), xs))


def test_sums_in_a_loop(cpu_mesh: Mesh) -> None:
    check_turns(cpu_mesh, 20, lambda turn, xs: jax.lax.fori_loop(0, 20, lambda _, xs: turn(xs), xs))


def test_nan_and_infinity_pass_through(mesh: Mesh) -> None:
    """Also the word that marks an empty mailbox: all bits one."""
    peers = connect_peers(mesh, "model")
    x = np.ones((*mesh.shape.values(), 8), np.float32)
    x[:, 0, 0] = np.inf
    x[:, -1, 1] = np.uint32(0xFFFFFFFF).view(np.float32)
    x[:, :, 2] = -0.0
    placed = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
    got = mapped(mesh, lambda x: all_reduce_sum(x, "model", peers=peers))(placed)
    size = np.float32(mesh.shape["model"])
    row = np.array([np.inf, np.nan, 0.0] + [size] * 5, np.float32)
    assert_everywhere(got, np.broadcast_to(row, (x.shape[0], 8)))


def test_under_vmap_it_is_one_sum(cpu_mesh: Mesh) -> None:
    peers = connect_peers(cpu_mesh, "model")
    x, expected = summands(cpu_mesh, (3, 4, 5), "float32")
    one = functools.partial(all_reduce_sum, axis="model", peers=peers)
    step = mapped(cpu_mesh, jax.vmap(one, in_axes=1, out_axes=1))
    assert step.lower(x).as_text().count(CALL) == 1
    assert_everywhere(step(x), expected)


def test_mapped_sums_that_are_too_many_go_through_psum(cpu_mesh: Mesh) -> None:
    peers = connect_peers(cpu_mesh, "model")
    x, _ = summands(cpu_mesh, (3, 1 << 18), "float32")
    one = functools.partial(all_reduce_sum, axis="model", peers=peers)
    text = mapped(cpu_mesh, jax.vmap(one)).lower(x).as_text()
    assert CALL not in text
    assert "all_reduce" in text


def test_a_call_of_nothing_is_refused_before_it_is_divided_among_blocks() -> None:
    out = jax.ShapeDtypeStruct((0, 4), np.float32)
    call = jax.ffi.ffi_call(CALL, out, has_side_effect=True)  # which XLA does not leave out
    alone = jax.jit(functools.partial(call, group=np.int64(1)))
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(jax.errors.JaxRuntimeError, match=r"x must have elements, got \[0, 4\]"),
    ):
        jax.block_until_ready(alone(jnp.zeros((0, 4))))


def test_the_rule(cpu_mesh: Mesh) -> None:
    """Peers where they are given and take the sum, psum else; "kernel" and "xla" insist."""
    peers = connect_peers(cpu_mesh, "model")
    few, _ = summands(cpu_mesh, (8,), "float32")
    many, _ = summands(cpu_mesh, (2**19 + 1,), "float32")

    def text(x, **options) -> str:
        lowered = mapped(cpu_mesh, lambda x: all_reduce_sum(x, "model", **options)).lower(x)
        return lowered.as_text()

    assert CALL in text(few, peers=peers)
    for x, options in (
        (few, {}),
        (few, {"peers": peers, "implementation": "xla"}),
        (many, {"peers": peers}),
        (few.astype(jnp.int32), {"peers": peers}),
    ):
        assert CALL not in text(x, **options)
        assert "all_reduce" in text(x, **options)
    for x, options, match in (
        (few, {}, "peers is None"),
        (many, {"peers": peers}, "x must have 1 to 2097152 bytes, got 2097156"),
        (few.astype(jnp.int32), {"peers": peers}, "x must be bfloat16, float16 or float32"),
    ):
        with pytest.raises(NotImplementedError, match=match):
            text(x, implementation="kernel", **options)


def test_peers_of_another_mesh_are_refused(cpu_mesh: Mesh) -> None:
    peers = connect_peers(cpu_mesh, "model")
    other = make_mesh(jax.devices("cpu")[:8], data=1)
    with pytest.raises(
        ValueError, match=r"axis 'model' of shard_map's mesh .*'data': 1, 'model': 8"
    ):
        mapped(other, lambda x: all_reduce_sum(x, "model", peers=peers))(jnp.ones((1, 8, 4)))
    with pytest.raises(TypeError, match="peers must be Peers from connect_peers or None, got str"):
        mapped(cpu_mesh, lambda x: all_reduce_sum(x, "model", peers="model"))(jnp.ones((2, 4, 4)))


def test_connecting() -> None:
    devices = jax.devices("cpu")[:8]
    mesh = make_mesh(devices)
    peers = connect_peers(mesh, "model")
    assert (peers.refusal, peers.size) == (None, 8)
    assert connect_peers(mesh, "model") is peers
    assert "not 1" in str(connect_peers(mesh, "data").refusal)
    with pytest.raises(ValueError, match=r"axis must be one of the mesh's axes .* got 'heads'"):
        connect_peers(mesh, "heads")
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh"):
        connect_peers(mesh.abstract_mesh, "model")
    with pytest.raises(ValueError, match="timeout must be positive seconds"):
        connect_peers(mesh, "model", timeout=0)
    with pytest.raises(TypeError, match="timeout must be a number of seconds, got '60'"):
        connect_peers(mesh, "model", timeout="60")
    with pytest.raises(ValueError, match=r"axis must be one of the mesh's axes .* got \['model'\]"):
        connect_peers(mesh, ["model"])


def test_a_sum_without_connection_is_an_error(cpu_mesh: Mesh) -> None:
    mesh = Mesh(cpu_mesh.devices[::-1], cpu_mesh.axis_names)
    peers = connect_peers(mesh, "model")
    peers.close()
    step = mapped(mesh, lambda x: all_reduce_sum(x, "model", peers=peers))
    with pytest.raises(jax.errors.JaxRuntimeError, match="is not connected to the others"):
        jax.block_until_ready(step(jnp.ones((2, 4, 4))))


def test_a_device_that_does_not_come() -> None:
    """The others wait for a while, and say so; also ever after."""
    mesh = make_mesh(jax.devices("cpu")[:2])
    peers = connect_peers(Mesh(mesh.devices[:, ::-1], mesh.axis_names), "model", timeout=0.2)
    call = jax.ffi.ffi_call(CALL, jax.ShapeDtypeStruct((4,), np.float32))
    alone = jax.jit(functools.partial(call, group=np.int64(peers.group)))
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match="did not take part in this call"):
            jax.block_until_ready(alone(jax.device_put(np.ones(4, np.float32), mesh.devices[0, 0])))
    assert peers.failed()
    peers.close()


def test_derivatives_want_psum(cpu_mesh: Mesh) -> None:
    peers = connect_peers(cpu_mesh, "model")

    def loss(x, implementation):
        y = all_reduce_sum(x * x, "model", peers=peers, implementation=implementation)
        return jnp.sum(y)[None, None]

    def gradient(implementation):
        total = jax.shard_map(
            functools.partial(loss, implementation=implementation),
            mesh=cpu_mesh, in_specs=P("data", "model"), out_specs=P("data"),
        )  # fmt: skip
        return jax.grad(lambda x: total(x).sum())(jnp.ones((2, 4)))

    np.testing.assert_array_equal(gradient("xla"), np.full((2, 4), 2.0))
    with pytest.raises(NotImplementedError, match="all_reduce_sum cannot be differentiated"):
        gradient(None)


def test_explicit_meshes(cpu_mesh: Mesh) -> None:
    mesh = Mesh(cpu_mesh.devices, cpu_mesh.axis_names, axis_types=(AxisType.Explicit,) * 2)
    peers: Peers = connect_peers(mesh, "model")
    x, expected = summands(mesh, (6,), "float32")
    assert_everywhere(mapped(mesh, lambda x: all_reduce_sum(x, "model", peers=peers))(x), expected)
