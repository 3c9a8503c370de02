"""What a wheel must be to load anywhere: checks of `scripts/build_wheel.py`, on these modules."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import zipfile

import pytest

import jax_flashmla

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = pathlib.Path(jax_flashmla.__file__).parent
MODULES = sorted(PACKAGE.glob("_c*.so"))

spec = importlib.util.spec_from_file_location("build_wheel", ROOT / "scripts" / "build_wheel.py")
build_wheel = importlib.util.module_from_spec(spec)
sys.modules["build_wheel"] = build_wheel
spec.loader.exec_module(build_wheel)


@pytest.fixture
def wheel(tmp_path):
    """Of the installed modules, as if they were built here; packed without its metadata."""
    path = tmp_path / "jax_flashmla-0-cp311-cp311-manylinux_2_99_x86_64.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as files:
        for file in [*MODULES, *(PACKAGE / n for n in ("__init__.py", "py.typed", "_cpu.pyi"))]:
            files.write(file, f"jax_flashmla/{file.name}")
    return path


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name.partition(".")[0])
def test_module_loads_without_libraries_that_users_may_lack(module):
    assert list(build_wheel.module_problems(module.name, module.read_bytes())) == []
    assert (2, 2) < build_wheel.glibc_of(module.read_bytes()) < (2, 99)


def test_modules_make_a_small_wheel_without_fault(wheel):
    assert MODULES
    assert list(build_wheel.wheel_problems(wheel)) == []
    assert list(build_wheel.wheel_problems(wheel, "manylinux_2_99")) == []


def test_faults_of_a_wheel_are_told(wheel, monkeypatch):
    def told(path: pathlib.Path = wheel, platform: str | None = None) -> str:
        return " ".join(build_wheel.wheel_problems(path, platform))

    assert "must be of manylinux_2_28" in told(platform="manylinux_2_28")
    older = wheel.rename(wheel.with_name(wheel.name.replace("2_99", "2_5")))
    assert "manylinux_2_5_x86_64 does not have it" in told(older)
    plain = older.rename(older.with_name(older.name.replace("manylinux_2_5", "linux")))
    assert "is of no manylinux platform" in told(plain)
    monkeypatch.setattr(build_wheel, "MAX_BYTES", 1000)
    assert "more than 0" in told(plain)


def test_faults_of_a_module_are_told(monkeypatch):
    module = MODULES[0]
    monkeypatch.setattr(build_wheel, "LIBRARIES", build_wheel.re.compile(r"libc\.so\.6"))
    told = " ".join(build_wheel.module_problems("_other.so", module.read_bytes()))
    assert "needs the library libstdc++.so.6" in told
    assert "lacks PyInit__other" in told
    with pytest.raises(ValueError, match=r"no section \.dynamic"):
        list(build_wheel.module_problems("python", _without_sections(module.read_bytes())))


def _without_sections(elf: bytes) -> bytes:
    """A 64-bit ELF file whose header says that it has none."""
    return elf[:0x28] + bytes(8) + elf[0x30:0x3A] + bytes(6) + elf[0x40:]
