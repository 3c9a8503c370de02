"""The walls between the parts: which module imports which, and which header includes which."""

import ast
import graphlib
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "jax_flashmla"
CSRC = ROOT / "csrc"

EXTRAS = ("layers", "serve", "cli", "bench")
CORE = sorted(
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in EXTRAS
)
CORE_DEPENDENCIES = {"jax", "jaxlib", "numpy", "jaxtyping", "jax_flashmla"}


def module_name(path: pathlib.Path, root: pathlib.Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Absolute names of all that a module imports, anywhere in it, import_module(...) included."""
    package = module if is_package else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.update(arg.value for arg in node.args if isinstance(arg, ast.Constant))
    return found


def python_files() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports_of(path: pathlib.Path) -> set[str]:
    name = module_name(path)
    return imports(path.read_text(), name, is_package=path.name == "__init__.py")


def importers_of(*targets: str) -> set[str]:
    """The modules of the package that import a target or anything inside it."""
    return {
        module_name(path).removeprefix("jax_flashmla.")
        for path in python_files()
        for name in imports_of(path)
        if any(name == target or name.startswith(target + ".") for target in targets)
    }


def includes(path: pathlib.Path) -> set[str]:
    """What a file includes; project headers as paths from csrc/, however they are written."""
    written = re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)
    beside = {name: (path.parent / name).resolve() for name in written}
    return {
        beside[name].relative_to(CSRC).as_posix()
        if beside[name].is_relative_to(CSRC) and beside[name].is_file()
        else name
        for name in written
    }


def sources(*folders: str) -> list[pathlib.Path]:
    return sorted(
        path
        for folder in folders
        for path in (CSRC / folder).rglob("*")
        if path.suffix in {".h", ".cuh", ".cc", ".cu", ".inc"}
    )


def test_walker_sees_every_kind_of_import():
    source = (
        "import a.b\nfrom c import d\n"
        "def f():\n    from ..e import g\n    from . import h\n"
        "    importlib.import_module('i.j')\n"
    )
    found = imports(source, "top.sub.module")
    assert {"a.b", "c", "c.d", "top.e", "top.e.g", "top.sub.h", "i.j"} <= found
    assert "top.sub.module.x" in imports("from .x import y", "top.sub.module", is_package=True)


def test_walker_sees_both_kinds_of_include(tmp_path):
    header = tmp_path / "x.h"
    header.write_text('#include <a/b.h>\n  # include "c.h"\n// #include "no.h"\n')
    assert includes(header) == {"a/b.h", "c.h"}
    assert "status.h" in includes(CSRC / "ffi" / "error.h")


def test_only_modules_imports_the_extension_modules():
    assert importers_of("jax_flashmla._cpu", "jax_flashmla._cuda") <= {"_xla.modules"}
    # A name put together at run time would escape the walker.
    dynamic = {path.name for path in CORE if "import_module(f" in path.read_text()}
    assert dynamic <= {"modules.py"}


def test_only_operations_describe_operations():
    """And nothing below ops/ knows one by name."""
    importers = importers_of("jax_flashmla._xla.operation") - {
        "export",
        "_xla.chain",
        "_xla.chain_call",
    }
    names = ("make_schedule", "dense_decode", "sparse_decode", "cache_append")
    names += ("sparse_prefill", "index_scores", "index_topk", "all_reduce_sum", "exchange")
    names += ("latent_append", "index_append", "project", "project_twice")
    assert importers == {f"ops.{name}" for name in names}
    for path in sorted((PACKAGE / "_xla").glob("*.py")):
        assert not [name for name in names if name in path.read_text()], path.name


def test_operations_are_listed_once_in_cpp():
    for path in sources("ffi"):
        included = {
            x for x in includes(path) if (PACKAGE / "ops" / x[4:-2]).with_suffix(".py").is_file()
        }
        assert not included or path.name == "operations.h"


def test_modules_import_each_other_in_no_circle():
    """Leaving aside that a module in a package imports the package."""
    modules = {module_name(path): path for path in python_files()}
    graph = {
        name: {
            found
            for found in imports_of(path)
            if found in modules and not f"{name}.".startswith(f"{found}.")
        }
        for name, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names one


@pytest.mark.parametrize("name", ["allocator", "context_allocator", "prefix", "scheduler"])
def test_the_hosts_bookkeeping_needs_numpy_at_most(name):
    """And its own modules."""
    found = imports_of(PACKAGE / "cache" / f"{name}.py")
    ours = {x for x in found if x.startswith("jax_flashmla.cache.")}
    assert {x.split(".")[2] for x in ours} <= {"allocator", "prefix"}
    roots = {x.partition(".")[0] for x in found - ours} - set(sys.stdlib_module_names)
    assert roots <= {"numpy"}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_core_depends_on_jax_and_numpy_alone(path):
    found = imports_of(path)
    roots = {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names)
    assert roots <= CORE_DEPENDENCIES
    for extra in EXTRAS:
        assert not {name for name in found if name.startswith(f"jax_flashmla.{extra}")}


def test_nnx_and_linen_layers_do_not_know_each_other():
    assert "layers.linen" not in importers_of("jax_flashmla.layers.nnx", "flax.nnx")
    assert "layers.nnx" not in importers_of("jax_flashmla.layers.linen", "flax.linen")


def test_layers_need_flax_in_the_modules_alone():
    """And of the core they take public names, and the checks of integers."""
    assert importers_of("flax") == {"layers.nnx", "layers.linen"}
    assert importers_of("safetensors") == {"layers.hf.tensor_reader"}
    # jaxlib brings ml_dtypes; rich is for the progress bar, where there is one.
    optional = {"flax", "safetensors", "ml_dtypes", "rich"}
    private = {"jax_flashmla._xla.operation", "jax_flashmla._cpu", "jax_flashmla._cuda"}
    for path in sorted((PACKAGE / "layers").rglob("*.py")):
        found = imports_of(path)
        assert not {name for name in found if name in private or name.startswith("jax._src")}
        roots = {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names)
        assert roots <= CORE_DEPENDENCIES | optional


def test_serve_knows_no_model_and_nobody_knows_serve():
    """It takes the core's public names, and a model as two functions."""
    assert all(n.partition(".")[0] == "serve" for n in importers_of("jax_flashmla.serve"))
    private = {"jax_flashmla._xla.operation", "jax_flashmla._cpu", "jax_flashmla._cuda"}
    for path in sorted((PACKAGE / "serve").glob("*.py")):
        found = imports_of(path)
        assert not {name for name in found if name in private or name.startswith("jax._src")}
        roots = {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names)
        assert roots <= CORE_DEPENDENCIES


def test_nothing_imports_cli_bench_tests_or_benchmarks():
    """But cli, which may import bench; bench does not import cli."""

    def outside(*targets: str, allowed: tuple[str, ...]) -> set[str]:
        return {n for n in importers_of(*targets) if n.partition(".")[0] not in allowed}

    assert not outside("jax_flashmla.cli", allowed=("cli",))
    assert not outside("jax_flashmla.bench", allowed=("cli", "bench"))
    assert not importers_of("tests", "benchmarks", "cases", "naive", "tolerances")


def test_the_machinery_of_the_bench_knows_no_operation():
    """A new one is a folder, and a line in `operations`."""
    folders = {path.parent.name for path in (PACKAGE / "bench").glob("*/__init__.py")}
    assert "dense_decode" in folders
    for folder in folders:
        target = f"jax_flashmla.bench.{folder}"
        outside = {n for n in importers_of(target) if not n.startswith(f"bench.{folder}")}
        assert outside == {"bench.operations"}


@pytest.mark.parametrize(
    "name",
    [
        *("options", "operation", "operations", "shape", "limits", "summary", "document", "units"),
        "compare",
        *(f"dense_decode/{name}" for name in ("__init__", "grids", "shapes", "peers")),
    ],
)
def test_what_the_bench_says_without_measuring_needs_numpy_at_most(name):
    """So that its options answer, and saved results are read, without JAX or matplotlib."""
    roots = {name.partition(".")[0] for name in imports_of(PACKAGE / "bench" / f"{name}.py")}
    assert roots - set(sys.stdlib_module_names) <= {"numpy", "jax_flashmla"}


def test_only_the_plots_import_matplotlib():
    plots = {"plots", "time_plot", "roofline_plot"}
    assert importers_of("matplotlib") == {f"bench.{name}" for name in plots}


@pytest.mark.parametrize(
    "path",
    [*CSRC.glob("*.h"), *sources("params", "schedule")],
    ids=lambda path: path.name,
)
def test_shared_headers_are_plain_cpp(path):
    plain = re.compile(
        r"[a-z]+|(params/(cache_append|dtype|index_scores|peers|project|rope)|schedule/pieces|formats|host_device|elements)\.h"
    )  # standard ones, or our own
    assert not {header for header in includes(path) if not plain.fullmatch(header)}


@pytest.mark.parametrize(
    "path", sources("cpu", "ffi", "params", "schedule", "sm90"), ids=lambda path: path.name
)
def test_includes_start_at_csrc(path):
    written = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
    assert not {
        name for name in written if not name.startswith("xla/") and not (CSRC / name).is_file()
    }


@pytest.mark.parametrize("path", sources("cpu", "sm90"), ids=lambda path: path.name)
def test_operations_do_not_know_xla_or_python(path):
    assert not {
        header for header in includes(path) if header.startswith(("xla/", "nanobind/", "ffi/"))
    }


@pytest.mark.parametrize("path", sources("cpu"), ids=lambda path: path.name)
def test_cpu_operations_do_not_know_cuda(path):
    assert not {header for header in includes(path) if header.startswith(("sm90/", "cuda"))}


@pytest.mark.parametrize("path", sources("ffi"), ids=lambda path: path.name)
def test_ffi_takes_only_the_entry_points(path):
    """No PTX wrapper and no kernel: `sm90/<op>/launch.h`, what opens groups, `cpu/<op>.h`."""
    entry_points = re.compile(r"sm90/[a-z_]+/launch\.h|sm90/peers/workspace\.h|cpu/[a-z_]+\.h")
    inside = {header for header in includes(path) if header.startswith(("cpu/", "sm90/"))}
    assert all(entry_points.fullmatch(header) for header in inside)
