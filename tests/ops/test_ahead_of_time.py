"""Programs made in one place and run in another: export, lowering, the persistent cache."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp
import pytest

import cases
import tolerances
from jax_flashmla import (
    CacheFormat,
    cache_append,
    dense_decode,
    export_checks,
    kernel_refusal,
    make_schedule,
)
from jax_flashmla._xla import dispatch, operation

pytestmark = pytest.mark.usefixtures("on_cpu")

decode = functools.partial(dense_decode, d_v=cases.SMALL_D_V)


STEP = ("make_schedule", "cache_append", "dense_decode")


def layers(q: jax.Array, blocks: jax.Array, table: jax.Array, lengths: jax.Array) -> tuple:
    rows = jnp.ones((q.shape[0], 1, *blocks.shape[2:]), blocks.dtype)
    schedule = make_schedule(lengths, h_q=q.shape[2])
    blocks = cache_append(blocks, rows, table, lengths - 1)
    return dense_decode(q, blocks, table, lengths, schedule=schedule)


def hopper_case() -> cases.DecodeInputs:
    return cases.make_inputs(cases.DecodeCase(2, 1, 70, 16))


def test_export_for_cpu_and_cuda_and_back() -> None:
    arguments = hopper_case().arguments
    exported = jax.export.export(
        jax.jit(layers), platforms=("cpu", "cuda"), disabled_checks=export_checks()
    )(*arguments)
    assert exported.platforms == ("cpu", "cuda")
    restored = jax.export.deserialize(exported.serialize())
    out, lse = jax.jit(restored.call)(*arguments)
    tolerances.assert_decoded((out, lse), layers(*arguments))


def test_export_without_export_checks_is_refused() -> None:
    with pytest.raises(ValueError, match="flashmla"):
        jax.export.export(jax.jit(layers), platforms=("cpu",))(*hopper_case().arguments)


def lowered(function: Callable, platform: str, *arguments: object) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def test_lowering_for_cuda_without_a_gpu() -> None:
    text = lowered(layers, "cuda", *hopper_case().arguments)
    assert set(operation.targets()) >= {f"flashmla_{name}_v1" for name in STEP}
    for name in STEP:
        assert text.count(f"@flashmla_{name}_v1(") == 1
    assert "sm_scale = 0.0416666679 : f32" in text
    assert "causal = false" in text
    assert "output_operand_alias" in text


def test_lowering_for_cuda_of_dimensions_that_the_kernel_does_not_take() -> None:
    inputs = cases.make_inputs(cases.small(2, 1, 30, 4))
    dispatch.warn_once.cache_clear()
    message = "pure-JAX reference: the sm90 kernel takes d_qk = 576.* got d_qk = 24"
    with pytest.warns(RuntimeWarning, match=message):
        text = lowered(decode, "cuda", *inputs.arguments)
    assert "flashmla_dense_decode" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once only
        lowered(lambda *x: decode(*x, causal=True), "cuda", *inputs.arguments)
    message = r'dense_decode with implementation="kernel": the sm90 kernel takes'
    with pytest.raises(NotImplementedError, match=message):
        lowered(functools.partial(decode, implementation="kernel"), "cuda", *inputs.arguments)


def test_lowering_for_cuda_of_a_float32_cache() -> None:
    """cache_append has a kernel for it, dense_decode the reference."""
    inputs = cases.make_inputs(cases.DecodeCase(2, 1, 100, 4, dtype="float32"))
    dispatch.warn_once.cache_clear()
    message = "the sm90 kernel takes bfloat16 or float16, got float32"
    with pytest.warns(RuntimeWarning, match=message):
        text = lowered(layers, "cuda", *inputs.arguments)
    assert "flashmla_cache_append" in text
    assert "flashmla_dense_decode" not in text
    with pytest.raises(NotImplementedError, match=message):
        lowered(functools.partial(dense_decode, implementation="kernel"), "cuda", *inputs.arguments)


def test_lowering_for_a_platform_without_kernels_is_the_reference() -> None:
    arguments = hopper_case().arguments
    assert "custom_call @flashmla" not in lowered(layers, "tpu", *arguments)
    message = 'implementation="kernel": there are kernels for cpu and cuda'
    with pytest.raises(NotImplementedError, match=message):
        lowered(functools.partial(dense_decode, implementation="kernel"), "tpu", *arguments)


def test_kernel_refusal() -> None:
    assert kernel_refusal("cpu", d_qk=7, d_v=5, block_size=3) is None
    assert "not for tpu" in kernel_refusal("tpu")
    assert "got d_qk = 512" in kernel_refusal("cuda", d_qk=512)
    assert "bfloat16 or float16, got float32" in kernel_refusal("cuda", dtype=jnp.float32)


def run_python(script: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-P", "-c", script],  # the installed package, not the sources
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


COMPILE = """
import jax, jax.monitoring, numpy as np
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
import ml_dtypes
from jax_flashmla import dense_decode
q, blocks = np.ones((1, 1, 2, 24), ml_dtypes.bfloat16), np.ones((2, 8, 1, 24), ml_dtypes.bfloat16)
table, lengths = np.array([[0, 1]], np.int32), np.array([9], np.int32)
jax.jit(lambda *x: dense_decode(*x, d_v=16))(q, blocks, table, lengths)[0].block_until_ready()
print(events.count("/jax/compilation_cache/cache_hits"),
      events.count("/jax/compilation_cache/cache_misses"))
"""


def test_persistent_compilation_cache_hits_in_another_process(tmp_path: os.PathLike) -> None:
    environment = {
        "JAX_COMPILATION_CACHE_DIR": os.fspath(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    hits, misses = map(int, run_python(COMPILE, **environment).split())
    assert (hits, misses > 0) == (0, True)
    hits, misses = map(int, run_python(COMPILE, **environment).split())
    assert (hits > 0, misses) == (True, 0)


def test_import_initialises_no_backend() -> None:
    script = """
import jax, jax_flashmla
jax.config.update("jax_num_cpu_devices", 3)  # an error once there is a backend
print(len(jax.devices()))
"""
    assert run_python(script).split() == ["3"]


def test_symbolic_extents_are_refused_by_name() -> None:
    b, max_blocks = jax.export.symbolic_shape("b, m")
    for q_b, table_shape, name in ((b, (b, 3), "q"), (2, (2, max_blocks), "block_table")):
        arguments = (
            jax.ShapeDtypeStruct((q_b, 1, 4, 24), jnp.bfloat16),
            jax.ShapeDtypeStruct((5, 8, 1, 24), jnp.bfloat16),
            jax.ShapeDtypeStruct(table_shape, jnp.int32),
            jax.ShapeDtypeStruct((q_b,), jnp.int32),
        )
        decode = functools.partial(dense_decode, d_v=16)
        export = jax.export.export(jax.jit(decode), disabled_checks=export_checks())
        with pytest.raises(NotImplementedError, match=rf"{name} \[.*must have known extents"):
            export(*arguments)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        (
            CacheFormat(row_stride=580),
            r"takes rows \(row_stride\) of a multiple of 8 columns with h_kv = 1, got 580",
        ),
        (
            CacheFormat(h_kv=2, row_stride=600),
            r"takes rows \(row_stride\) of a multiple of 64 columns with h_kv = 2, got 600",
        ),
        (
            CacheFormat(name="v32", block_size=60),
            "takes d_v = 512 and a block_size that is a multiple of 8 over fp8 caches, "
            "got d_v = 512 and block_size = 60",
        ),
        (
            CacheFormat(name="fp8_row", dtype="float16"),
            "takes bfloat16 over fp8 caches, got float16",
        ),
    ],
    ids=["stride", "stride of heads", "blocks of v32", "dtype of fp8_row"],
)
def test_caches_that_the_hopper_kernel_does_not_take(format: CacheFormat, message: str) -> None:
    dispatch.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=message):
        assert "flashmla_dense_decode_v1" not in lowered_over(format, None)
    with pytest.raises(NotImplementedError, match=message):
        lowered_over(format, "kernel")


def lowered_over(format: CacheFormat, implementation: str | None) -> str:
    q = jax.ShapeDtypeStruct((2, 1, 16, 576), format.dtype)
    blocks = jax.ShapeDtypeStruct((4, *format.block_shape), format.storage_dtype)
    ids = jax.ShapeDtypeStruct((2, 2), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    step = functools.partial(dense_decode, format=format, implementation=implementation)
    return lowered(step, "cuda", q, blocks, *ids)


@pytest.mark.parametrize("name", ["v32", "fp8_row"])
def test_the_hopper_kernel_over_fp8_caches(name: str) -> None:
    assert "flashmla_dense_decode_v1" in lowered_over(CacheFormat(name=name), None)
