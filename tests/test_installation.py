"""What an installation that lacks something, or does not fit its jaxlib or GPU, says."""

from __future__ import annotations

import pathlib
import re
import types

import jax
import numpy as np
import pytest

import jax_flashmla
from jax_flashmla import kernel_refusal, make_schedule
from jax_flashmla._xla import modules


def test_modules_were_built_for_an_ffi_that_this_jaxlib_has() -> None:
    installed = modules._installed_ffi_version()
    assert installed is not None
    assert modules._cpu.ffi_api_version() <= installed


def test_jaxlib_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "_installed_ffi_version", lambda: (0, 0))
    built = ".".join(map(str, modules._cpu.ffi_api_version()))
    message = f"jax_flashmla._cpu was built for XLA FFI {built}, but jaxlib .* has 0.0: install a"
    with pytest.raises(ImportError, match=message):
        modules._load("_cpu", "cpu")


def test_cpu_module_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "_cpu", None)
    monkeypatch.setattr(modules, "_cpu_missing", "No module named 'jax_flashmla._cpu'")
    assert "cannot be imported (No module named" in kernel_refusal("cpu")
    with jax.default_device(jax.devices("cpu")[0]):
        message = r"make_schedule cannot run: the CPU module .*; reinstall jax_flashmla"
        with pytest.raises(ImportError, match=message):
            make_schedule(np.zeros(3, np.int32), h_q=1, num_parts=17)
        make_schedule(np.zeros(3, np.int32), h_q=1, num_parts=17, implementation="xla")


@pytest.mark.parametrize(
    ("capability", "has_module", "expected"),
    [
        ("9.0", True, None),
        ("8.0", True, r"need compute capability 9.0 \(Hopper\), got 8.0 \(Some GPU\)"),
        ("9.0", False, r"the CUDA module cannot be imported \(not built\)"),
    ],
)
def test_kernels_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: str, has_module: bool, expected: str | None
) -> None:
    device = types.SimpleNamespace(compute_capability=capability, device_kind="Some GPU")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device])
    monkeypatch.setattr(modules, "_cuda", types.ModuleType("_cuda") if has_module else None)
    monkeypatch.setattr(modules, "_cuda_missing", "not built")
    refusal = kernel_refusal("cuda")
    if expected is None:
        assert refusal is None
    else:
        assert re.search(expected, refusal)


def test_every_public_name_is_told_of() -> None:
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    for name in jax_flashmla.__all__:
        assert hasattr(jax_flashmla, name)
        assert re.search(rf"\b{name}\b", readme), name
    assert re.fullmatch(r"\d+\.\d+\.\d+", jax_flashmla.__version__)


def test_gpu_means_cuda_and_other_platforms_are_named() -> None:
    assert kernel_refusal("gpu", d_qk=32) == kernel_refusal("cuda", d_qk=32)
    assert "got d_qk = 32" in kernel_refusal("gpu", d_qk=32)
    assert kernel_refusal("tpu") == "there are kernels for cpu and cuda, not for tpu"
