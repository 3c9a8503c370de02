"""What holds for every test: 8 CPU devices, strict promotion, checked shapes, GPU tests skipped."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import typing
from collections.abc import Iterator
from unittest import mock

# Processes of pytest-xdist, which start after this, share the cores: naive attention would spend
# its time in their BLAS threads' waiting for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# References are compiled for hundreds of shapes, most of which run once.
if os.path.exists("/dev/nvidiactl"):  # do not time GEMM variants for each
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")
else:  # leave out most of LLVM's passes, in the processes that tests start too
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones abort on this flag
        # Half of the compile time of a reference goes to the emitters of fused loops.
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import beartype  # noqa: F401 (before the patch below)
import hypothesis
import jax
import jaxtyping
import pytest

import cases

# The same examples on every run; a first one is compiled for.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Shapes in signatures are checked where users do not pass: their own errors stay as we word them.
# The annotations are imported for type checkers only, hence the patch.
REFERENCE = [
    f"jax_flashmla.reference.{name}"
    for name in (
        "append",
        "attention",
        "gather",
        "indexer",
        "latent",
        "prefill",
        "project",
        "rows",
        "schedule",
        "sparse",
    )
]
with (
    mock.patch.object(typing, "TYPE_CHECKING", True),
    jaxtyping.install_import_hook(REFERENCE, "beartype.beartype"),
):
    import jax_flashmla


def pytest_report_header() -> str:
    return f"jax_flashmla {jax_flashmla.__version__}, jax {jax.__version__}, seed {cases.SEED}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    try:
        jax.local_devices(backend="cuda")
        reason = jax_flashmla.kernel_refusal("cuda")
    except RuntimeError:
        reason = "no CUDA device"
    if reason:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


CPU_KERNEL = pytest.param("kernel", id="cpu")
GPU_KERNEL = pytest.param("kernel", id="gpu", marks=pytest.mark.gpu)


@pytest.fixture(params=[pytest.param("xla", id="reference"), CPU_KERNEL, GPU_KERNEL])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation in turn, on the device that it is tested on."""
    with jax.default_device(_tested_device(request)):
        yield request.param


@pytest.fixture(params=[CPU_KERNEL, GPU_KERNEL])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation but the reference."""
    with jax.default_device(_tested_device(request)):
        yield request.param


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """The CPU is the default device, also where there is a GPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def _tested_device(request: pytest.FixtureRequest) -> jax.Device:
    is_gpu = request.node.get_closest_marker("gpu") is not None
    return jax.devices("cuda" if is_gpu else "cpu")[0]


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One folder for all tests, for what is slow to make."""
    return tmp_path_factory.mktemp("scratch")
