"""The engines' call: golden steps, caches bit for bit, pages of any size, and in place."""

from __future__ import annotations

import functools
import pathlib
import re
import warnings
from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import tolerances
from jax_flashmla import export_checks
from jax_flashmla.ragged import mla_ragged_paged_attention

GOLDEN = sorted((pathlib.Path(__file__).parent / "golden" / "ragged").glob("*.npz"))
SM_SCALE = 0.11
NAN = -128


def values(codes: np.ndarray, dtype: str) -> np.ndarray:
    """Eighths, and NaN."""
    return np.where(codes == NAN, np.nan, codes / np.float32(8)).astype(jnp.dtype(dtype))


def bits(x: np.ndarray) -> np.ndarray:
    """NaN equals NaN, of whichever bits."""
    x = np.asarray(x)
    return np.where(np.isnan(x.astype(np.float32)), 1, x.view(f"u{x.dtype.itemsize}"))


def arguments(step: dict[str, np.ndarray], dtype: str, page_list: bool) -> tuple[dict, dict]:
    """The arrays of a golden step, by argument; and its options."""
    names = ("ql_nope", "q_pe", "new_kv_c", "new_k_pe")
    arrays = {name: values(step[name], dtype) for name in names}
    cache = values(step["cache"], dtype)
    pack = 1 if dtype == "float32" else 2
    arrays["cache_kv"] = jnp.array(cache.reshape(len(cache), -1, pack, 640))
    arrays["kv_lens"] = step["kv_lens"]
    pages = step["page_list"] if page_list else step["page_table"].reshape(-1)
    arrays["page_indices"] = pages
    arrays |= {name: step[name] for name in ("cu_q_lens", "distribution")}
    options = {"sm_scale": SM_SCALE}
    if page_list:
        options |= {"cu_kv_lens": step["cu_kv_lens"], "pages_per_seq": 4}
    return arrays, options


@pytest.mark.parametrize("page_list", [False, True], ids=["table", "page list"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_steps(path: pathlib.Path, page_list: bool, implementation: str) -> None:
    """Of a cache whose unused slots are NaN, with hostile numbers in what is not in use."""
    step = dict(np.load(path))
    arrays, options = arguments(step, "bfloat16", page_list)
    out, cache = mla_ragged_paged_attention(**arrays, **options, implementation=implementation)
    assert arrays["cache_kv"].is_deleted()
    # Of few tokens, as in sparse attention, whose averages are larger.
    tolerances.assert_close("out", out, step["out"], tolerances.SPARSE_OUT)
    expected = values(step["cache_after"], "bfloat16").reshape(cache.shape)
    np.testing.assert_array_equal(bits(cache), bits(expected))


@pytest.mark.usefixtures("on_cpu")
def test_golden_step_in_float32() -> None:
    step = dict(np.load(GOLDEN[0]))
    arrays, options = arguments(step, "float32", False)
    out, cache = mla_ragged_paged_attention(**arrays, **options)
    tolerances.assert_close("out", out, step["out"], tolerances.F32_DECODE["out"])
    np.testing.assert_array_equal(
        bits(cache), bits(values(step["cache_after"], "float32").reshape(cache.shape))
    )


def test_all_golden_steps_are_there() -> None:
    assert [path.stem for path in GOLDEN] == ["chunk_over_prefix", "decode", "mixed", "prefill"]


def engine_step(
    page_size: int, kv: list[int], new: list[int], n: int, dtype: str = "bfloat16"
) -> tuple[dict, np.ndarray]:
    """A random step, the same but for its pages whatever their size; and its pages [max_seqs, any].

    Slots of the cache that hold no token are 0, as engines leave them.
    """
    rng = np.random.default_rng(cases.SEED)
    tokens = sum(new)
    normal = functools.partial(cases.normal, rng, dtype=dtype)
    arrays = {
        "ql_nope": normal((tokens, n, 512), scale=cases.QUERY_SCALE),
        "q_pe": normal((tokens, n, 64), scale=cases.QUERY_SCALE),
        "new_kv_c": normal((tokens, 512), scale=cases.ROW_SCALE),
        "new_k_pe": normal((tokens, 64), scale=cases.ROW_SCALE),
    }
    prefixes = [normal((k, 576), scale=cases.ROW_SCALE) for k in kv]
    per_seq = -(-max(kv) // page_size)
    pages = np.random.default_rng(0).permutation(len(kv) * per_seq).reshape(-1, per_seq)
    cache = np.zeros((pages.size, page_size, 640), prefixes[0].dtype)
    for i, prefix in enumerate(prefixes):
        t = np.arange(kv[i] - new[i])
        cache[pages[i, t // page_size], t % page_size, :576] = prefix[t]
    arrays |= {
        "cache_kv": cache.reshape(pages.size, page_size // 2, 2, 640),
        "kv_lens": np.array(kv, np.int32),
        "page_indices": pages.reshape(-1).astype(np.int32),
        "cu_q_lens": np.cumsum([0, *new]).astype(np.int32),
        "distribution": np.array([0, len(kv), len(kv)], np.int32),
    }
    return arrays, pages


def test_pages_of_any_size_give_the_same_bits(kernel: str) -> None:
    """1024 and 512 are several blocks to the kernels."""
    results = []
    sizes = (64, 16, 1024)
    if jax.config.jax_default_device.platform == "gpu":
        sizes += (32, 128, 256, 512)
    for page_size in sizes:
        arrays, pages = engine_step(page_size, [300, 600], [3, 1], 16)
        out, cache = mla_ragged_paged_attention(**arrays, sm_scale=0.04, implementation=kernel)
        rows = np.asarray(cache).reshape(-1, page_size, 640)[pages].reshape(2, -1, 640)
        results.append((np.asarray(out), rows[0, :300], rows[1, :600]))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(bits(x), bits(y))


@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.usefixtures("on_cpu")
def test_equals_ejkernels(n: int) -> None:
    """Its pure-JAX implementation of the same signature, cache bit for bit."""
    engine = pytest.importorskip("ejkernel.kernels._xla.multi_latent_ragged_page_attention")
    for kv, new in (([1, 40, 17], [1, 1, 1]), ([50, 20, 9], [12, 1, 9])):
        arrays, _ = engine_step(16, kv, new, n)
        cache = jnp.array(arrays["cache_kv"])
        expected, expected_cache = engine.multi_latent_ragged_page_attention(
            *(jnp.array(arrays[name]) for name in list(arrays)[:4]),
            cache,
            *(jnp.array(arrays[name]) for name in list(arrays)[5:]),
            softmax_scale=0.04,
        )
        out, got_cache = mla_ragged_paged_attention(**arrays, sm_scale=0.04)
        tolerances.assert_close("out", out, np.asarray(expected, np.float32), tolerances.OUT)
        np.testing.assert_array_equal(bits(got_cache), bits(expected_cache))


def small_step() -> dict:
    arrays, _ = engine_step(16, [20, 9], [2, 1], 2)
    return arrays


call = functools.partial(mla_ragged_paged_attention, sm_scale=0.04)


@pytest.mark.usefixtures("on_cpu")
def test_scales_multiply() -> None:
    plain, _ = call(**small_step() | {"sm_scale": 0.06})
    scaled, _ = call(**small_step(), q_scale=0.5, k_scale=3, v_scale=2.0)
    expected = 2 * np.asarray(plain, np.float32)
    tolerances.assert_close("out", scaled, expected, tolerances.OUT)


@pytest.mark.usefixtures("on_cpu")
def test_layers_of_a_jitted_step_are_updated_in_place() -> None:
    """No array of a cache's size is made, and the step gives the donated buffers back."""
    arrays = small_step()
    cache = np.tile(arrays.pop("cache_kv"), (100, 1, 1, 1))
    caches = [jnp.array(cache) for _ in range(3)]

    def step(caches: list[jax.Array], arrays: dict) -> tuple:
        outs = []
        for i, cache in enumerate(caches):
            out, caches[i] = call(**arrays, cache_kv=cache)
            outs.append(out)
        return outs, caches

    compiled = jax.jit(step, donate_argnums=0).lower(caches, arrays).compile()
    pointers = [x.unsafe_buffer_pointer() for x in caches]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 3 * cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes
    outs, updated = compiled(caches, arrays)
    assert [x.unsafe_buffer_pointer() for x in updated] == pointers
    expected, expected_cache = call(**arrays, cache_kv=jnp.array(cache))
    for out, got in zip(outs, updated, strict=True):
        np.testing.assert_array_equal(bits(out), bits(expected))
        np.testing.assert_array_equal(bits(got), bits(expected_cache))


def test_export_and_lowering_for_hopper() -> None:
    """Rows of 640 columns run the kernels there: a refusal would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported = jax.export.export(
            jax.jit(lambda arrays: call(**arrays)),
            platforms=("cpu", "cuda"),
            disabled_checks=export_checks(),
        )(small_step())
    text = exported.mlir_module()
    for name in ("dense_decode", "cache_append", "make_schedule"):
        assert f"@flashmla_{name}_v1" in text
    restored = jax.export.deserialize(exported.serialize())
    with jax.default_device(jax.devices("cpu")[0]):
        for x, y in zip(restored.call(small_step()), call(**small_step()), strict=True):
            np.testing.assert_array_equal(bits(x), bits(y))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"soft_cap": 30.0}, NotImplementedError, "soft_cap must be None: there is no kernel"),
        ({"sliding_window": 4}, NotImplementedError, "sliding_window must be None"),
        ({"sm_scale": 0.0}, ValueError, "sm_scale must be finite and positive"),
        ({"k_scale": "1"}, TypeError, "k_scale must be a Python number"),
        ({"q_scale": -1.0}, ValueError, "q_scale must be finite and positive"),
        ({"num_pages": 3}, TypeError, "has no argument 'num_pages'"),
        ({"max_q_len": 0}, ValueError, "max_q_len must be between 1"),
        ({"implementation": "cuda"}, ValueError, "implementation must be"),
        ({"cache_kv": lambda x: x.astype(jnp.float8_e4m3fn)}, ValueError, "k_scale must be given"),
        (
            {"cache_kv": lambda x: x.astype(jnp.float8_e4m3fn), "k_scale": 1.0},
            NotImplementedError,
            "no kernel reads padded rows of 8 bits",
        ),
        (
            {"cache_kv": lambda x: x.reshape(4, 16, 640).swapaxes(1, 2).reshape(4, 320, 2, 16)},
            ValueError,
            "the transposed cache of tokamax's v3",
        ),
        ({"cache_kv": lambda x: x[..., :576]}, ValueError, r"pack, 640\] for 512 latent and 64"),
        ({"cache_kv": lambda x: x.reshape(4, 16, 640)}, ValueError, "cache_kv must have rank 4"),
        ({"ql_nope": lambda x: x[:, :, :500]}, ValueError, r"new_kv_c must have shape \(3, 500\)"),
        ({"q_pe": lambda x: x[:2]}, ValueError, r"q_pe must have shape \(3, 2, 64\)"),
        ({"new_k_pe": lambda x: x.astype(np.float16)}, TypeError, "must have cache_kv's dtype"),
        ({"kv_lens": lambda x: x[:1]}, ValueError, "cu_q_lens must have kv_lens' max_seqs"),
        ({"page_indices": lambda x: x[:3]}, ValueError, r"page_indices must be \[max_seqs \* pag"),
        ({"pages_per_seq": 3}, ValueError, r"page_indices must be \[max_seqs \* pages_per_seq\]"),
        ({"cu_kv_lens": np.zeros(2, np.int32)}, ValueError, "cu_kv_lens must have kv_lens'"),
        ({"distribution": np.zeros(2, np.int32)}, ValueError, r"distribution must have shape \(3"),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_wrong_arguments_are_named(
    wrong: dict[str, object | Callable], error: type, message: str
) -> None:
    arrays = small_step()
    for name, value in wrong.items():
        arrays[name] = value(arrays[name]) if callable(value) else value
    with pytest.raises(error, match=message):
        call(**arrays)


@pytest.mark.usefixtures("on_cpu")
def test_the_guides_code_runs_as_printed() -> None:
    page = pathlib.Path(__file__).parents[1] / "docs" / "integrations.md"
    section = page.read_text().partition("\n## Serving engines: ")[2].partition("\n## ")[0]
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        exec(compile(code, str(page), "exec"), names)
    out, cache = names["out"], names["cache_kv"]
    # Three sequences begin with zeros, which score 0, and their new rows are ones.
    assert np.asarray(out[2, 0, 0]) > 0.01
    assert not np.asarray(out[7], np.float32).any()
    np.testing.assert_array_equal(bits(names["parts_out"]), bits(out))
    np.testing.assert_array_equal(bits(names["blocks"]).reshape(cache.shape), bits(cache))


@pytest.mark.usefixtures("on_cpu")
def test_hostile_values_are_harmless() -> None:
    """Tokens attend, and are stored, as far as their sequences have room; the rest is untouched."""
    arrays = small_step()
    rng = np.random.default_rng(1)
    for name in ("kv_lens", "page_indices", "cu_q_lens", "distribution"):
        shape = arrays[name].shape
        arrays[name] = rng.choice([-(2**31), -1, 0, 1, 5, 2**31 - 1], shape).astype(np.int32)
    before = arrays["cache_kv"].copy()
    out, cache = call(**arrays)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert np.isfinite(np.asarray(cache, np.float32)).all()
    arrays["cache_kv"], arrays["distribution"] = before, np.array([0, 0, -5], np.int32)
    out, cache = call(**arrays)
    assert not np.asarray(out, np.float32).any()
    np.testing.assert_array_equal(bits(cache), bits(before))
