"""project against float64 products, and its rotation against complex numbers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import platforms
from jax_flashmla import project


@pytest.fixture(scope="module", params=platforms.CPU_AND_KERNELS)
def implementation(request):
    yield from platforms.each(request)


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    groups: int
    k: int
    n: int
    rope: int = 0
    layout: str = "none"
    transposed: bool = False
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        sizes = f"{self.rows}-{self.groups}x{self.k}x{self.n}+{self.rope}"
        return f"{sizes}-{self.layout}{'-t' * self.transposed}-{self.dtype}"


CASES = [
    Case(1, 1, 776, 136),  # k and n end within a tile
    Case(5, 3, 128, 512, rope=64, layout="deinterleaved"),
    Case(33, 2, 64, 72, rope=16, layout="half", dtype="float16"),
    Case(70, 2, 200, 64, transposed=True),
    Case(2, 4, 512, 128, rope=8, transposed=True),  # copied, not rotated
    Case(128, 1, 72, 200, rope=24, layout="interleaved"),
    Case(16, 1, 640, 8, dtype="float16"),
]
WIDE = [
    Case(1, 1, 7168, 2112),
    Case(3, 1, 2048, 1000),
    Case(4, 16, 512, 136, transposed=True, dtype="float16"),
    Case(2, 3, 96, 72, rope=16, layout="half", dtype="float16"),
    Case(4, 2, 32, 8, transposed=True),  # one step
    Case(12, 1, 2048, 1000),
    Case(9, 16, 512, 136, transposed=True, dtype="float16"),
    Case(17, 1, 4096, 320),
    Case(32, 1, 4096, 320),
    Case(128, 16, 512, 128, transposed=True),
    Case(20, 1, 512, 2240),  # three blocks share a sum on 132 multiprocessors
    Case(128, 1, 512, 2240),
    Case(100, 1, 2048, 320),  # in halves of 64 and 36 rows
    Case(20, 40, 128, 520, rope=16, layout="half"),  # more blocks than multiprocessors hold two of
]
FLOAT32 = Case(3, 2, 13, 7, rope=6, layout="half", dtype="float32")


def make_arrays(case: Case) -> dict[str, Any]:
    rng = np.random.default_rng(11)
    shape = (case.groups, case.n, case.k) if case.transposed else (case.groups, case.k, case.n)
    arrays: dict[str, Any] = {
        "x": rng.standard_normal((case.rows, case.groups, case.k + case.rope)),
        "w": rng.standard_normal(shape) * case.k**-0.5,
    }
    arrays = {name: a.astype(jnp.dtype(case.dtype)) for name, a in arrays.items()}
    if case.layout != "none":
        angles = rng.uniform(-9, 9, (case.rows, case.rope // 2))
        arrays |= {"cos": np.float32(np.cos(angles)), "sin": np.float32(np.sin(angles))}
    return arrays


def expected(case: Case, arrays: dict[str, Any]) -> np.ndarray:
    x, w = (arrays[name].astype(np.float64) for name in ("x", "w"))
    y = np.einsum("rgk,gnk->rgn" if case.transposed else "rgk,gkn->rgn", x[..., : case.k], w)
    rest = x[..., case.k :]
    if case.layout != "none":
        first, second = rest[..., ::2], rest[..., 1::2]
        if case.layout == "half":
            first, second = np.split(rest, 2, -1)
        turned = (first + 1j * second) * (arrays["cos"] + 1j * arrays["sin"])[:, None]
        parts = [turned.real, turned.imag]
        if case.layout == "interleaved":
            rest = np.stack(parts, -1).reshape(rest.shape)
        else:
            rest = np.concatenate(parts, -1)
    return np.concatenate([y, rest], -1)


@functools.cache
def jitted(case: Case, implementation: str | None) -> Any:
    return jax.jit(
        functools.partial(
            project, layout=case.layout, transposed=case.transposed, implementation=implementation
        )
    )


def check(case: Case, implementation: str) -> None:
    arrays = make_arrays(case)
    y = np.asarray(jitted(case, implementation)(**arrays)).astype(np.float64)
    # Half a unit of the result's last place, and the rounding of sums of numbers of about 1.
    eps = float(jnp.finfo(case.dtype).eps)
    np.testing.assert_allclose(y, expected(case, arrays), rtol=eps, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_and_rotations(case: Case, implementation: str) -> None:
    check(case, implementation)


def test_several_weights_are_one_call(implementation: str) -> None:
    case = Case(5, 2, 136, 72)
    arrays = make_arrays(case)
    w = arrays["w"]
    split = [w[..., :40], w[..., 40:56], w[..., 56:]]
    got = jax.jit(functools.partial(project, implementation=implementation))(arrays["x"], split)
    eps = float(jnp.finfo(case.dtype).eps)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected(case, arrays), eps, 2e-5)


@pytest.mark.parametrize(
    ("rows", "groups", "m", "dtype"),
    [(1, 1, 64, "bfloat16"), (21, 2, 72, "float16"), (70, 1, 8, "bfloat16")],
)
def test_products_with_a_float32_weight_are_not_rounded(rows, groups, m, dtype, implementation):
    case = Case(rows, groups, 1000, 24, rope=16, layout="half", dtype=dtype)
    arrays = make_arrays(case)
    exact = np.random.default_rng(3).standard_normal((groups, case.k, m)).astype(np.float32)
    y, products = jax.jit(functools.partial(project, layout="half", implementation=implementation))(
        **arrays, exact=exact
    )
    want = np.einsum("rgk,gkm->rgm", arrays["x"][..., : case.k].astype(np.float64), exact)
    np.testing.assert_allclose(products, want, rtol=1e-5, atol=2e-4)  # of sums of about 30
    assert products.dtype == jnp.float32
    alone = jitted(case, implementation)(**arrays)
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (y, alone)), 0.01, 0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_sums_that_blocks_share(case: Case) -> None:
    check(case, "kernel")


@pytest.mark.parametrize("name", ["xla", "kernel"])
def test_float32_on_a_cpu(name: str) -> None:
    check(FLOAT32, name)


@pytest.mark.parametrize(("case", "batch"), [(CASES[0], 16), (Case(1, 1, 768, 136), 4)], ids=str)
def test_equal_rows_in_another_batch_have_equal_bits(case, batch, implementation) -> None:
    """The kernels add in an order that does not depend on the other rows."""
    if implementation == "xla":
        pytest.skip("XLA picks another product for another shape")
    arrays = make_arrays(case)
    one = jitted(case, implementation)(**arrays)
    many = jitted(case, implementation)(**{**arrays, "x": np.repeat(arrays["x"], batch, 0)})
    np.testing.assert_array_equal(np.asarray(many[3:4]), np.asarray(one))


@pytest.mark.parametrize(("name", "expected"), [(None, False), ("kernel", True)])
def test_a_cpu_leaves_it_to_xla_unless_asked(name: str | None, expected: bool) -> None:
    with jax.default_device(jax.devices("cpu")[0]):
        compiled = jitted(CASES[0], name).lower(**make_arrays(CASES[0])).compile()
    assert ("flashmla_project" in compiled.as_text()) == expected


@pytest.mark.parametrize("mapped", ["x", "w"])
def test_vmap_is_one_call_each(mapped: str, implementation: str) -> None:
    case = CASES[1]
    arrays = make_arrays(case)
    stacked = np.stack([arrays[mapped], -arrays[mapped]])
    call = jitted(case, implementation)
    got = jax.vmap(lambda a: call(**{**arrays, mapped: a}))(stacked)
    for i in range(2):
        want = call(**{**arrays, mapped: stacked[i]})
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (got[i], want)), rtol=0.01)


def test_the_reference_is_differentiable() -> None:
    arrays = make_arrays(FLOAT32)

    def total(x, implementation):
        return (jitted(FLOAT32, implementation)(**{**arrays, "x": x}) ** 2).sum()

    x = jnp.asarray(arrays["x"])
    gradient, step = jax.grad(total)(x, "xla"), jnp.cos(jnp.arange(x.size)).reshape(x.shape) * 1e-2
    change = total(x + step, "xla") - total(x - step, "xla")
    np.testing.assert_allclose(change / 2, (gradient * step).sum(), rtol=1e-3)
    with pytest.raises(NotImplementedError, match="project cannot be differentiated"):
        jax.grad(total)(x, "kernel")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": np.zeros((2, 3), np.float32)}, ValueError, r"x must have rank 3"),
        ({"w": np.zeros((2, 13, 7), np.float16)}, TypeError, "w must have x's dtype"),
        ({"w": np.zeros((3, 13, 7), np.float32)}, ValueError, "w must be .* x's groups = 2"),
        ({"w": np.zeros((2, 20, 7), np.float32)}, ValueError, "at most its 19 columns"),
        ({"w": np.zeros((2, 12, 7), np.float32)}, ValueError, "even number of columns"),
        ({"cos": None}, TypeError, "cos must be an array"),
        ({"layout": "none"}, ValueError, 'cos must be None with layout "none"'),
        ({"layout": "other"}, ValueError, "layout must be one of"),
        ({"w": [np.zeros((2, 13, 7), np.float32)] * 4}, ValueError, "1 to 3 of them, got 4"),
        ({"exact": np.zeros((2, 12, 4), np.float32)}, ValueError, "exact must be .* w's k = 13"),
        ({"exact": np.zeros((2, 13, 4), np.float16)}, TypeError, "exact must have dtype"),
        ({"transposed": 1}, TypeError, "transposed must be a Python bool"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        project(**{**make_arrays(FLOAT32), "layout": FLOAT32.layout, **changes})


@pytest.mark.parametrize(("groups", "rows", "m", "kernel"), [
    (16383, 128, 8, True), (16384, 128, 8, False), (16384, 128, 0, True), (65535, 32, 8, True),
])  # fmt: skip
def test_a_float32_weight_of_more_groups_than_a_grid_has_goes_to_xla(groups, rows, m, kernel):
    shapes = [(rows, groups, 8), (groups, 8, 8), (groups, 8, m)]
    x, w, exact = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in zip(shapes, ("bfloat16", "bfloat16", "float32"), strict=True)
    )
    call = lambda x, w, e: project(x, w, exact=e if m else None)  # noqa: E731
    text = jax.jit(call).trace(x, w, exact).lower(lowering_platforms=("cuda",)).as_text()
    assert ("@flashmla_project_v1(" in text) == kernel
