"""What the compiled CUDA module holds, read without a GPU: its machine code and resources."""

import collections
import concurrent.futures
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(importlib.util.find_spec("jax_flashmla").origin).parent
MODULES = sorted(PACKAGE.glob("_cuda.*.so"))
pytestmark = pytest.mark.skipif(not MODULES, reason="this build has no CUDA module")

DECODE_KERNELS = (
    "wide_decode_kernel",
    "narrow_decode_kernel",
    "fp8_decode_kernel",
    "fp8_wide_kernel",
)
SPARSE_KERNELS = ("sparse_decode_kernel", "sparse_decode_small_kernel")
KERNELS = (
    "make_schedule_kernel",
    *DECODE_KERNELS,
    *SPARSE_KERNELS,
    "sparse_prefill_kernel",
    "merge_kernel",
    "cache_append_kernel",
    "latent_append_kernel",
    "index_append_kernel",
    "project_kernel",
    "project_few_kernel",
    "index_scores_kernel",
    "index_topk_kernel",
    "all_reduce_sum_kernel",
    "exchange_kernel",
)


def tool(name: str) -> str:
    """From the nvidia-cuda-* packages, else from a CUDA toolkit on the PATH."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else []:
        path = pathlib.Path(folder) / "cu13" / "bin" / name
        if path.is_file():
            return str(path)
    found = shutil.which(name)
    assert found, f"{name} is neither installed (pip install nvidia-cuda-{name}) nor on the PATH"
    return found


def cuobjdump(*options: str) -> str:
    command = [tool("cuobjdump"), *options, str(MODULES[0])]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def instructions(tmp_path_factory) -> dict[str, collections.Counter[str]]:
    """Of each kernel, how often each opcode (HGMMA.64x64x16.F32.BF16: HGMMA) stands in it."""
    folder = tmp_path_factory.mktemp("cubins")
    subprocess.run(
        [tool("cuobjdump"), "-xelf", "all", str(MODULES[0])],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        check=True,
    )

    def disassemble(cubin: pathlib.Path) -> str:
        command = [tool("nvdisasm"), "-c", str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    # Labels ".text.NAME:" at the beginning of a line, then "        /*0090*/  @!P0 LDG.E R2, ... ;"
    line = re.compile(
        r"^\.text\.(\S+):$|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE
    )
    counts: dict[str, collections.Counter[str]] = {}
    cubins = [path for path in sorted(folder.iterdir()) if b".text." in path.read_bytes()]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # a process each, which takes seconds
        for text in pool.map(disassemble, cubins):
            name = ""
            for match in line.finditer(text):
                if match[1]:
                    name = match[1]
                    counts[name] = collections.Counter()
                else:
                    counts[name][match[2]] += 1
    return counts


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, int]]:
    """Of each kernel what it takes: REG a thread, STACK and LOCAL bytes a thread, and others."""
    lines = re.findall(r"Function (\S+):\n\s*(.*)", cuobjdump("--dump-resource-usage"))
    return {
        name: {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", usage)}
        for name, usage in lines
    }


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_there(instructions, kernel):
    found = {name: count for name, count in instructions.items() if kernel in name}
    assert found
    assert all(count["EXIT"] >= 1 for count in found.values())


def test_machine_code_is_for_hopper_alone():
    assert set(re.findall(r"sm_\w+", cuobjdump("-lelf"))) == {"sm_90a"}
    assert "sm_" not in cuobjdump("-lptx")


def test_no_kernel_uses_local_memory(instructions):
    local = {
        name: (count["LDL"], count["STL"])
        for name, count in instructions.items()
        if count["LDL"] or count["STL"]
    }
    assert not local


def test_dense_decode_uses_tensor_cores_and_bulk_copies(instructions):
    for name, count in instructions.items():
        if not any(kernel in name for kernel in DECODE_KERNELS):
            continue
        assert count["HGMMA"] > 0, name
        assert count["UTMALDG"] + count["UBLKCP"] > 0, name
        assert count["HMMA"] == 0, name


def test_sparse_decode_uses_tensor_cores_and_bulk_copies(instructions):
    found = {
        name: count
        for name, count in instructions.items()
        if any(kernel in name for kernel in SPARSE_KERNELS)
    }
    assert found
    for name, count in found.items():
        assert count["HGMMA"] > 0, name
        # The wide kernel loads its queries by tensor maps, and rows through registers.
        assert count["UTMALDG"] > 0 if "wide" in name else count["UBLKCP"] > 0, name
        assert count["HMMA"] == 0, name


def test_products_of_few_rows_load_weights_into_registers(instructions):
    found = [count for kernel, count in instructions.items() if "project_few_kernel" in kernel]
    assert len(found) == 4  # two types, weights as they are and transposed
    for count in found:
        assert count["LDG"] >= 2 * 16  # a ring's loads, before its loop and in it
        assert count["HMMA"] == 16  # of four quarters
        assert count["UTMALDG"] + count["HGMMA"] == 0
        assert count["STAS"] > 0  # sums go to another block
        assert count["ATOMG"] + count["RED"] == 0


@pytest.mark.parametrize("d_qk", [512, 576])
@pytest.mark.parametrize("element", ["__nv_bfloat16", "__half"])
def test_sparse_prefill_is_built_for_every_element_type_and_width(instructions, element, d_qk):
    name = rf"sparse_prefill_kernelI\d+{element}Li{d_qk}EE"
    (count,) = (count for kernel, count in instructions.items() if re.search(name, kernel))
    # A tile's score products of 64 rows by 64 tokens, where a query token's first one is started
    # and in the loop; and four of 256 value columns: nothing is repeated or serialised.
    assert count["HGMMA"] == 2 * d_qk // 16 + 4
    assert count["WARPGROUP"] < 20
    assert count["LDGSTS"] > 0  # rows are gathered by cp.async
    assert count["UTMALDG"] > 0  # queries are loaded by tensor maps


@pytest.mark.parametrize("heads", [32, 64])
@pytest.mark.parametrize("queries", [1, 2, 4, 8])
@pytest.mark.parametrize("product", ["QGMMA", "HGMMA"])
def test_index_scores_is_built_for_every_product(instructions, product, queries, heads):
    """Of up to 256 columns with e4m3 queries (QGMMA), 128 with bf16 ones (HGMMA)."""
    fp8 = product == "QGMMA"
    name = f"index_scores_kernelILb{int(fp8)}ELi{heads}ELi{queries}EE"
    found = [count for kernel, count in instructions.items() if name in kernel]
    assert len(found) == (heads * queries <= (256 if fp8 else 128))
    for count in found:
        # All 128 columns of a tile at once, then one wait; of the widest product's halves one each:
        # nothing is serialised.
        parts = 2 if heads * queries == 256 else 1
        assert count[product] == parts * (4 if fp8 else 8)
        assert count["QGMMA"] + count["HGMMA"] == count[product]
        assert count["WARPGROUP"] == 2 * parts
        # The queries, a tile's codes, and its scales.
        assert (count["UTMALDG"], count["UBLKCP"]) == (2, 1)


def test_index_topk_counts_in_shared_memory_and_shares_rows(instructions):
    (count,) = (count for kernel, count in instructions.items() if "index_topk_kernel" in kernel)
    assert count["ATOMS"] > 0
    assert count["ATOMG"] + count["RED"] == 0  # nothing depends on the order of blocks
    assert count["UCGABAR_ARV"] == count["UCGABAR_WAIT"] > 0
    assert count["STAS"] >= 3  # a count, and a candidate's score and token
    assert count["LDG"] > 8  # a round of scores is on its way at once


@pytest.mark.parametrize("element", ["__nv_bfloat16", "__half"])
@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("boxes", [1, 2, 4])
@pytest.mark.parametrize("given", [0, 1])  # what queries see
def test_dense_decode_is_built_for_every_element_type_and_tile(
    instructions, element, rows, boxes, given
):
    wide = rows == 64
    name = (
        rf"wide_decode_kernelI\d+{element}"
        if wide
        else rf"narrow_decode_kernelI\d+{element}Li{rows}E"
    )
    (loads,) = (
        count["UTMALDG"]
        for kernel, count in instructions.items()
        if re.search(rf"{name}Li{boxes}ELb{given}EE", kernel)
    )
    # The queries' three, then three boxes of a block, and three more for each further block of a
    # tile, wherever tiles are loaded.
    assert loads > 3
    assert (loads - 3) % (3 * boxes) == 0


@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("format", ["Fp8Row", "V32"])
def test_dense_decode_over_fp8_multiplies_codes_from_registers(instructions, format, rows):
    (count,) = (
        count
        for kernel, count in instructions.items()
        if re.search(rf"fp8_decode_kernel.*\d{format}ELi{rows}E", kernel)
    )
    # A key's 36 times 16 columns, and a value warpgroup's four tiles of 64 columns; of v32 these
    # stand there again, for scales that are large.
    assert count["HGMMA"] == 36 + 16 * (2 if format == "V32" else 1)
    assert count["UBLKCP"] > 0
    # f16 codes by conversion: of each product's 16 columns of a key, a lane has four pairs.
    assert count["F2FP"] >= 4 * (36 if format == "Fp8Row" else 32)


def test_wide_dense_decode_over_fp8_multiplies_what_it_converts_in_place(instructions):
    (count,) = (count for kernel, count in instructions.items() if "fp8_wide_kernel" in kernel)
    # 36 steps of 16 key columns, of a piece's first tile and of others; four of 16 tokens.
    assert count["HGMMA"] == 2 * 36 + 4
    assert count["UTMALDG"] > 0


def test_no_kernel_has_a_stack(instructions, resources):
    assert set(resources) == set(instructions)
    assert all(used["STACK"] == used["LOCAL"] == 0 for used in resources.values())


def test_the_build_fails_where_ptxas_made_a_slow_kernel(tmp_path):
    """By the launcher that CMake puts before nvcc, here before a script that prints as it does."""
    launcher = pathlib.Path(__file__).parents[1] / "cmake" / "check_ptxas.py"
    good = (
        "ptxas info    : Compiling entry function 'good' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    )
    wgmma = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async are serialized\n"
    spill = good.replace("good", "bad").replace("0 bytes spill stores", "16 bytes spill stores")
    for report, status, said in (
        (good, 0, ""),
        (good + wgmma, 1, "error: ptxas: good: ptxas info    : (C7510)"),
        (good + spill, 1, "error: ptxas: bad: 0 bytes stack frame, 16 bytes spill stores"),
    ):
        compiler = tmp_path / "nvcc.py"
        compiler.write_text(f"import sys; sys.stderr.write({report!r})")
        command = [sys.executable, str(launcher), sys.executable, str(compiler)]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert (ran.returncode, said in ran.stderr) == (status, True)
        command.insert(2, "--warn")
        ran = subprocess.run(command, capture_output=True, text=True)
        assert (ran.returncode, said.replace("error", "warning") in ran.stderr) == (0, True)


def test_the_merge_fits_beside_the_narrow_kernel(resources):
    """On one of a multiprocessor's four register files: 4 of 13 warps beside 2 of 8."""

    def allocated(kernel: str) -> int:  # to a warp
        most = max(used["REG"] for name, used in resources.items() if re.search(kernel, name))
        return 32 * -(-most // 8) * 8

    narrow = allocated(r"narrow_decode_kernelI\d+\w+?Li16E")
    assert 4 * narrow + 2 * allocated("merge_kernel") <= 16384


def test_what_goes_over_peers_needs_no_fence_and_no_atomics(instructions):
    found = [n for kernel, n in instructions.items() if "all_reduce_sum_kernel" in kernel]
    assert len(found) == 15  # 3 types, groups of up to 2, 4 and 8, two rounds in the larger ones
    exchanged = [n for kernel, n in instructions.items() if "exchange_kernel" in kernel]
    assert len(exchanged) == 3
    for count in found + exchanged:
        assert count["MEMBAR"] + count["ATOMG"] + count["RED"] + count["CALL"] == 0
