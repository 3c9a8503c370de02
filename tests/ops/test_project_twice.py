"""project_twice against two calls of project, which have tests of their own."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import platforms
from jax_flashmla import project, project_twice

# rows, x's groups and k, w's n, v's heads, m and p
QUERIES = (5, 1, 136, 4 * 80, 4, 64, 128)  # 16 columns of each head are rotated
VALUES = (3, 4, 128, 64, 1, 256, 200)
WIDE = [(1, 1, 1536, 3072, 16, 128, 512), (16, 16, 512, 128, 1, 2048, 7168)]


@pytest.fixture(scope="module", params=platforms.CPU_AND_KERNELS)
def implementation(request):
    yield from platforms.each(request)


def make_arrays(sizes: tuple[int, ...], transposed: bool, dtype: str) -> dict[str, Any]:
    rows, groups, k, n, heads, m, p = sizes
    rng = np.random.default_rng(5)
    shape = (groups, n, k) if transposed else (groups, k, n)
    arrays: dict[str, Any] = {
        "x": rng.standard_normal((rows, groups, k)),
        "w": rng.standard_normal(shape) * k**-0.5,
        "v": rng.standard_normal((heads, m, p)) * m**-0.5,
    }
    arrays = {name: a.astype(jnp.dtype(dtype)) for name, a in arrays.items()}
    if rope := groups * n // heads - m:
        angles = rng.uniform(-9, 9, (rows, rope // 2))
        arrays |= {"cos": np.float32(np.cos(angles)), "sin": np.float32(np.sin(angles))}
        arrays["layout"] = "half"
    return arrays | {"transposed": transposed}


@functools.cache
def jitted(function: Any, implementation: str | None) -> Any:
    call = functools.partial(function, implementation=implementation)
    return jax.jit(call, static_argnames=("layout", "transposed"))


def one_by_one(x, w, v, *, transposed, implementation, **angles):
    between = project(x, w, transposed=transposed, implementation=implementation)
    between = between.reshape(x.shape[0], v.shape[0], -1)
    return project(between, v, implementation=implementation, **angles)


def check(arrays: dict[str, Any], implementation: str) -> None:
    y = jitted(project_twice, implementation)(**arrays)
    want = jitted(one_by_one, implementation)(**arrays)
    if implementation == "kernel":
        np.testing.assert_array_equal(np.asarray(y), np.asarray(want))
    else:  # XLA adds in another order, and so may round the first product otherwise
        y, want = (np.asarray(a, np.float64) for a in (y, want))
        np.testing.assert_allclose(y, want, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("sizes", "transposed"), [(QUERIES, False), (VALUES, True)], ids=["queries", "values"]
)
def test_it_is_project_twice(sizes, transposed, dtype, implementation) -> None:
    check(make_arrays(sizes, transposed, dtype), implementation)


@pytest.mark.parametrize(
    ("sizes", "transposed"), [(QUERIES, False), (VALUES, True)], ids=["queries", "values"]
)
def test_another_weight_of_x_has_a_result_of_its_own(sizes, transposed, implementation) -> None:
    arrays = make_arrays(sizes, transposed, "bfloat16")
    beside = arrays["w"][:, :56, :] if transposed else arrays["w"][..., :56]
    y, products = jitted(project_twice, implementation)(**arrays, beside=beside)
    alone = jitted(project_twice, implementation)(**arrays)
    want = jitted(project, implementation)(arrays["x"], beside, transposed=transposed)
    for got, expected in ((y, alone), (products, want)):
        pair = (np.asarray(a, np.float32) for a in (got, expected))
        np.testing.assert_allclose(*pair, rtol=0.01, atol=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "transposed"), list(zip(WIDE, (False, True), strict=True)))
def test_the_second_waits_for_the_first(sizes, transposed) -> None:
    """Rows that the first product has not made yet would be seen, as buffers change every call."""
    arrays = make_arrays(sizes, transposed, "bfloat16")
    for sign in (1, -1, 2, -2):
        check({**arrays, "x": arrays["x"] * arrays["x"].dtype.type(sign)}, "kernel")


def test_the_kernels_and_the_reference_agree() -> None:
    arrays = make_arrays(QUERIES, False, "float32")
    with jax.default_device(jax.devices("cpu")[0]):
        got, want = (jitted(project_twice, name)(**arrays) for name in ("kernel", "xla"))
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mapped", ["x", "v"])
def test_vmap(mapped: str, implementation: str) -> None:
    arrays = make_arrays(QUERIES, False, "bfloat16")
    stacked = np.stack([arrays[mapped], -arrays[mapped]])
    call = jitted(project_twice, implementation)
    got = jax.vmap(lambda a: call(**{**arrays, mapped: a}))(stacked)
    for i in range(2):
        want = call(**{**arrays, mapped: stacked[i]})
        pair = (np.asarray(a, np.float32) for a in (got[i], want))
        np.testing.assert_allclose(*pair, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": np.zeros((2, 3), np.float32)}, ValueError, "x must have rank 3"),
        ({"w": np.zeros((1, 135, 320), np.float32)}, ValueError, "w must be .* k = 136"),
        ({"transposed": True}, ValueError, "w must be .groups, n, k. with"),
        ({"transposed": 1}, TypeError, "transposed must be a Python bool"),
        ({"w": np.zeros((1, 136, 320), np.float16)}, TypeError, "w must have x's dtype"),
        ({"beside": np.zeros((1, 135, 8), np.float32)}, ValueError, "beside must be .* k = 136"),
        ({"beside": np.zeros((1, 136, 8), np.float16)}, TypeError, "beside must have x's dtype"),
        ({"v": np.zeros((4, 64, 8), np.float16)}, TypeError, "v must have x's dtype"),
        ({"v": np.zeros((3, 64, 8), np.float32)}, ValueError, "v must be .* share out"),
        ({"v": np.zeros((4, 81, 8), np.float32)}, ValueError, "v must be .* at least m each"),
        ({"v": np.zeros((4, 63, 8), np.float32)}, ValueError, "even number of columns"),
        ({"cos": None}, TypeError, "cos must be an array"),
        ({"layout": "other"}, ValueError, "layout must be one of"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        project_twice(**{**make_arrays(QUERIES, False, "float32"), **changes})


def test_differentiating_the_kernels_says_what_to_do() -> None:
    arrays = make_arrays(QUERIES, False, "float32")
    x = arrays.pop("x")
    with pytest.raises(NotImplementedError, match="project_twice cannot be differentiated"):
        jax.grad(lambda x: project_twice(x, **arrays, implementation="kernel").sum())(x)
    gradient = jax.grad(lambda x: project_twice(x, **arrays, implementation="xla").sum())(x)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0
