"""Mesh axes that a function is given by name, and that nothing around it maps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import index_cases
import layer_cases
from jax_flashmla import all_reduce_sum, context
from jax_flashmla.layers import decode, prefill

pytestmark = pytest.mark.usefixtures("on_cpu")

Q, BLOCKS = jnp.ones((1, 1, 2, 24)), jnp.ones((2, 8, 1, 24))
TABLE, LENGTHS = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)


def index_topk(axis: str) -> object:
    problem = index_cases.make_problem(index_cases.IndexCase(b=1, s_q=1, heads=2, s_k=70, topk=3))
    return context.index_topk(**problem.arguments, axis=axis, topk=3)


def layer(function: Callable, **axis: str) -> object:
    config = layer_cases.V3
    cache, slots = layer_cases.make_cache(config, [4]).advance()
    x, params = layer_cases.make_x(config, 1, 1), layer_cases.make_params(config)
    return function(config, params, x, cache, slots=slots, **axis)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("axis", lambda axis: all_reduce_sum(jnp.ones(4), axis)),
        ("axis", lambda axis: context.dense_decode(Q, BLOCKS, TABLE, LENGTHS, axis=axis, d_v=16)),
        (
            "axis",
            lambda axis: context.dense_decode(
                Q, BLOCKS, TABLE, LENGTHS, axis=axis, heads_split=True, d_v=16
            ),
        ),
        ("axis", lambda axis: context.sparse_decode(Q, BLOCKS, TABLE[None], axis=axis, d_v=16)),
        ("axis", lambda axis: context.merge_over(Q, Q[..., 0], axis=axis)),
        ("axis", index_topk),
        (
            "context_axis",
            lambda axis: layer_cases.make_cache(layer_cases.V3, [4]).advance(context_axis=axis),
        ),
        ("context_axis", lambda axis: layer(decode, context_axis=axis)),
        ("heads_axis", lambda axis: layer(decode, heads_axis=axis)),
        ("heads_axis", lambda axis: layer(prefill, heads_axis=axis)),
    ],
)
def test_an_axis_that_is_not_mapped_is_named(name: str, call: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be a mesh axis .* got 'model' outside"):
        call("model")

    def body(x: jax.Array) -> jax.Array:
        call("modle")
        return x

    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("model",))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match=rf"^{name} must be .*\('model',\) .*, got 'modle'"):
        jax.eval_shape(mapped, jnp.ones(2))


def test_context_is_said_by_its_axis() -> None:
    def body(q: jax.Array) -> tuple[jax.Array, jax.Array]:
        return context.dense_decode(q, BLOCKS, TABLE, LENGTHS, axis="model", d_v=16, context=(0, 2))

    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("model",))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.raises(TypeError, match="context must be left out: axis says it"):
        jax.eval_shape(mapped, Q)
