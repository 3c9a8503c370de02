"""What a layer refuses, and how it says so."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layer_cases
from jax_flashmla import CacheFormat
from jax_flashmla.layers import AbsorbedWeights, decode, prefill
from layer_cases import LITE, V3

pytestmark = pytest.mark.usefixtures("on_cpu")


class Foreign:
    """Like a tensor of torch."""

    shape, dtype = (2, 2, 24), "torch.float32"

    def __dlpack__(self): ...


def right() -> dict[str, Any]:
    cache, slots = layer_cases.make_cache(V3, [8, 8]).advance(2)
    return {
        "config": V3,
        "params": layer_cases.make_params(V3),
        "x": jnp.ones((2, 2, 24)),
        "cache": cache,
        "slots": slots,
    }


def other_cache(**format: int | None):
    cache = right()["cache"]
    return dataclasses.replace(cache, format=dataclasses.replace(cache.format, **format))


WRONG = {
    "config of another type": ({"config": {}}, TypeError, "config must be an MLAConfig, got dict"),
    "params of another type": ({"params": {}}, TypeError, "params must be MLAParams, got dict"),
    "params of another layer": (
        {"params": layer_cases.make_params(LITE)},
        ValueError,
        r"params\.w_q must be None, got \(24, 8, 14\); params\.w_dq must be \(24, 10\), got None",
    ),
    "params of fewer heads": (
        {"params": layer_cases.make_params(dataclasses.replace(V3, num_heads=4))},
        ValueError,
        r"params\.w_uq must be \(10, 8, 14\), got \(10, 4, 14\)",
    ),
    "cache of another type": ({"cache": None}, TypeError, "cache must be a PagedCache, got None"),
    "cache of wider rows": (
        {"cache": other_cache(d_qk=32, row_stride=None)},
        ValueError,
        r"cache must have config.cache_format\(\)'s d_qk = 24, d_v = 16 and h_kv = 1, got",
    ),
    "cache of another value": ({"cache": other_cache(d_v=8)}, ValueError, "d_v = 16"),
    "cache of two heads": ({"cache": other_cache(h_kv=2)}, ValueError, "h_kv = 1"),
    "slots of another type": ({"slots": 3}, TypeError, "slots must be the Slots that cache.adv"),
    "x of another batch": (
        {"x": jnp.ones((3, 2, 24))},
        ValueError,
        r"hidden_size, \(2, 2, 24\), got shape \(3, 2, 24\)",
    ),
    "x of more tokens than slots": ({"x": jnp.ones((2, 3, 24))}, ValueError, r"\(2, 2, 24\), got"),
    "x of another width": ({"x": jnp.ones((2, 2, 23))}, ValueError, r"\(2, 2, 24\), got"),
    "x of integers": ({"x": jnp.ones((2, 2, 24), jnp.int32)}, TypeError, "floating dtype, got in"),
    "x of another library": (
        {"x": Foreign()},
        TypeError,
        r"x must be .*Foreign: convert it with jax.dlpack",
    ),
    "x of a list": (
        {"x": [1.0]},
        TypeError,
        r"x must be an array \[b, s, hidden_size\], got",
    ),
    "x with a mask": (
        {"x": np.ma.masked_array(np.ones((2, 2, 24), np.float32))},
        TypeError,
        "x must be a JAX or NumPy array .* without a mask, got a masked array",
    ),
    "params of another library": (
        {"params": dataclasses.replace(layer_cases.make_params(V3), w_uk=Foreign())},
        TypeError,
        r"params.w_uk must be a JAX or NumPy array \[heads, nope, kv_rank\], got .*Foreign",
    ),
    "a layer past the last": ({"layer": 1}, ValueError, "layer must be between 0 and 0, got 1"),
    "a layer of NumPy past the last": (
        {"layer": np.int64(5)},
        ValueError,
        "layer must be between 0 and 0, got 5",
    ),
    "a layer of another type": (
        {"layer": "a"},
        TypeError,
        "layer must be an integer scalar, got 'a' of type str",
    ),
    "a layer that is no integer": (
        {"layer": 1.0},
        TypeError,
        "layer must be an integer scalar, got 1.0 of type float",
    ),
    "an implementation": ({"implementation": "gpu"}, ValueError, "implementation must be None"),
}


@pytest.mark.parametrize("function", [decode, prefill])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(function, wrong):
    arguments, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        function(**{**right(), **arguments})


def test_absorbed_weights_of_another_layer():
    absorbed = AbsorbedWeights(w_q=jnp.ones((10, 8, 23)), w_o=jnp.ones((8, 16, 24)))
    with pytest.raises(ValueError, match=r"absorbed.w_q must be \(10, 8, 24\), got \(10, 8, 23\)"):
        decode(**right(), absorbed=absorbed)


def test_a_format_that_no_layer_has():
    assert V3.cache_format() == CacheFormat(d_qk=24, d_v=16)


@pytest.mark.parametrize("function", [decode, prefill])
def test_arrays_of_numpy_are_taken(function):
    arguments = right()
    _, expected = function(**arguments)
    params = jax.tree.map(np.asarray, arguments["params"])
    _, got = function(**{**arguments, "params": params, "x": np.ones((2, 2, 24), np.float32)})
    np.testing.assert_array_equal(got, expected)
