"""AMX without a CPU that has it: products over an emulated tile unit, its detection, the compiled code."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from proteinbert_fast import _cpu_kernels
from proteinbert_fast.ops import cpu
from tests.ops import test_cpu
from tests.tools import missing

CSRC = Path(__file__).parents[2] / "csrc"
CHECKS = Path(__file__).with_name("amx_checks.cpp")
AMX = "amx_bf16"
BF16 = torch.bfloat16
RIGHT = {"products": "right", "runs": "right", "weight gradients": "right"}


@pytest.fixture
def emulated():
    before = _cpu_kernels.instruction_set()
    try:
        _cpu_kernels.use_instruction_set("amx_bf16_emulated")
    except ValueError as error:
        pytest.skip(str(error))
    yield
    _cpu_kernels.use_instruction_set(before)


def compiled(sources: Path, output: Path, *options: str) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not (CSRC / "cpu").is_dir():
        pytest.skip("the installed package has no C++ sources")
    if compiler is None:
        missing("needs a C++ compiler")
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-fsanitize=address", "-Wno-psabi", f"-I{sources}", *options, str(CHECKS),
         "-o", str(output), "-pthread", "-ldl"],
        check=True,
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the emulated tile unit needs AVX2")
    return compiled(CSRC, tmp_path_factory.mktemp("amx") / "checks")


def run(checks: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([checks, *arguments], capture_output=True, text=True, timeout=300)


def said(checks: Path, *arguments: str) -> dict[str, str]:
    done = run(checks, *arguments)
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.usefixtures("poisoned_memory", "emulated")
@pytest.mark.parametrize("residues", [(0,), (13, 0, 7), (255, 256, 257), (300, 1, 509)], ids=str)
@pytest.mark.parametrize("size", test_cpu.SIZES)
def test_isa_amx_equals_the_reference(size, residues):
    """Sizes with inputs that are multiples of 32 and of 16 alone, and panels of both widths."""
    test_cpu.test_local_block_equals_the_reference(residues, size, BF16)
    test_cpu.test_global_attention_equals_the_reference(residues, size, BF16)
    test_cpu.test_first_block_from_tokens_equals_the_reference(size, residues, BF16)


@pytest.mark.usefixtures("poisoned_memory", "emulated")
@pytest.mark.parametrize("size", test_cpu.SIZES)
def test_isa_amx_gradients_are_those_of_the_reference(size):
    test_cpu.test_gradients_are_those_of_the_reference(size, (0, 5, 300), BF16, True)
    test_cpu.test_gradients_have_the_same_bits_whatever_is_saved(BF16)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("size", ["odd", "published"])
def test_isa_amx_is_batch_invariant(size):
    """Tiles of every height from 2 to 40 rows, and proteins of several units."""
    config = test_cpu.SIZES[size]
    block, batch, x, broadcast, query = test_cpu.make(config, [*range(39), 700])
    x, broadcast, query, block = x.to(BF16), broadcast.to(BF16), query.to(BF16), block.to(BF16)
    weights = (block.key.weight, block.value.weight)
    with torch.no_grad():
        _, local = cpu.local_block(x, broadcast, batch, block.local_weights(), 5)
        pooled = cpu.global_attention(local, query, batch, *weights, config.n_heads).pooled
        for i in range(len(batch)):
            rows = slice(int(batch.starts[i]) - batch.gap, int(batch.starts[i] + batch.lengths[i]) + batch.gap)
            _, alone = cpu.local_block(x[rows], broadcast[i : i + 1], batch[i], block.local_weights(), 5)
            assert torch.equal(alone, local[rows])
            attended = cpu.global_attention(alone, query[i : i + 1], batch[i], *weights, config.n_heads)
            assert torch.equal(attended.pooled[0], pooled[i])


@pytest.mark.usefixtures("emulated")
def test_isa_amx_has_the_same_bits_on_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        test_cpu.test_number_of_threads_leaves_no_trace(BF16, torch.set_num_threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", test_cpu.SIZES)
def test_isa_amx_keeps_nan_in_the_rows_that_see_it(size, value):
    """No tile reads into the next row, nor behind the last: exactly the rows under a tap are NaN."""
    block, batch, x, broadcast, _ = test_cpu.make(test_cpu.SIZES[size], (60,))
    first, n = int(batch.starts[0]), int(batch.lengths[0])
    for row in (0, 17, n - 1):
        poisoned = x.to(BF16)
        poisoned[first + row, :4] = value
        with torch.no_grad():
            _, local = cpu.local_block(poisoned, broadcast.to(BF16), batch, block.to(BF16).local_weights(), 5)
        away = torch.arange(n) - row
        seen = (away.abs() <= 4) | ((away.abs() <= 20) & (away % 5 == 0))
        assert torch.equal(local[first : first + n].isnan().any(1), seen)
        assert torch.equal(local[first : first + n].isfinite().all(1), ~seen)


def test_isa_amx_products_are_right_for_every_height(checks):
    """1 to 70 rows, memory that ends where products may read, NaN between the rows."""
    assert said(checks, "products") == RIGHT


def test_isa_amx_products_are_right_in_512_bits(checks):
    """All of amx_bf16 but its tile instructions."""
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX-512 with bfloat16")
    assert said(checks, "products of 512 bits") == RIGHT


def test_isa_amx_emulation_rounds_as_the_pseudocode(checks):
    assert said(checks, "arithmetic") == {"arithmetic": "right"}


def test_isa_amx_hardware_has_the_bits_of_the_emulator(checks):
    """Only where there is such hardware."""
    found = said(checks, "hardware")["hardware"]
    if found.startswith("unavailable"):
        pytest.skip(found)
    assert found == "right"


MISUSE = {
    "palette": "LDTILECFG: palette is 2, not 1",
    "start row": "LDTILECFG: start row is 1, not 0",
    "reserved": "LDTILECFG: reserved byte 7 is not 0",
    "too many rows": "LDTILECFG: tile 4 cannot have 17 rows of 64 bytes",
    "too wide": "LDTILECFG: tile 6 cannot have 16 rows of 68 bytes",
    "rows without bytes": "LDTILECFG: tile 0 cannot have 16 rows of 0 bytes",
    "ninth tile": "LDTILECFG: there is no tile 8",
    "sums too low": "TDPBF16PS: tiles 0, 4, 6 of 4x64, 16x64, 16x64 bytes do not fit",
    "weights too low": "TDPBF16PS: tiles 0, 4, 6 of 16x64, 16x64, 8x64 bytes do not fit",
    "unconfigured": "TILEZERO: no tiles are configured",
    "released": "TILEZERO: no tiles are configured",
    "no such tile": "TILEZERO: tile 2 has no rows",
    "not zeroed": "TDPBF16PS: tile 0 was neither loaded nor set to zeros",
    "not loaded": "TDPBF16PS: tile 4 was neither loaded nor set to zeros",
    "stored nothing": "TILESTORED: tile 1 holds nothing",
    "stored before": "TDPBF16PS: tile 0 was stored, and neither loaded nor set to zeros since",
}


@pytest.mark.parametrize("what", MISUSE)
def test_isa_amx_emulator_ends_on_misuse(checks, what):
    done = run(checks, what)
    assert done.returncode == -6
    assert done.stderr.splitlines()[0] == f"emulated tile unit: {MISUSE[what]}"


def test_isa_amx_emulator_takes_correct_use(checks):
    assert run(checks, "correct use").stdout == "not found\n"


# In the sources of the products: what stands there, and a mistake in its place.
MISTAKES = {
    "row stride": ("row_stride = 2 * row_values", "row_stride = 2 * p.columns"),
    "weight stride of a half panel": ("weight_stride = 4 * kTileColumns * WIDE", "weight_stride = 8 * kTileColumns"),
    "configured once": ("if (!(shape == now))", "if (!now.rows)"),
    "a missed zero": ("PBF_TILES::zero<0>();", ""),
    "a missed load": ("PBF_TILES::load<5>(at + next_rows, row_stride);", ""),
    "bias not in every row": ("PBF_TILES::load<2>(bias, 0)", "PBF_TILES::load<2>(bias, 4)"),
    "always 32 deep": ("depth = inputs % kDepth ? kDepth / 2 : kDepth, step", "depth = kDepth, step"),
    "rows behind the run": ("std::min(done, run.rows - rows)", "done"),
    "no release": ("if (now.rows) PBF_TILES::release();", ""),
    "no release of gradients": ("    PBF_TILES::release();\n}", "}"),
    "no shift of taps": ("x -= p.taps / 2 * tap_stride;", ""),
    "dilation": ("tap_stride = p.dilation * row_values", "tap_stride = row_values"),
    "weights of the other columns": ("dot<3, 5, 7>", "dot<3, 5, 6>"),
    "rows of the other tile": ("dot<1, 4, 7>", "dot<1, 5, 7>"),
    "the wrong rows": ("next_rows = kTileRows * row_values", "next_rows = 15 * row_values"),
    "a low tile too many": ("    if (rows > kTileRows)", "    if (rows >= kTileRows)"),
    "stored elsewhere": ("PBF_TILES::store<2>(below, out_stride)", "PBF_TILES::store<2>(out, out_stride)"),
    "next weights": ("w += step", "w += step / 2"),
    "taps of gradients": ("tap * a.dilation, stride", "tap, stride"),
    "inputs of gradients": ("block.x[0] + first * stride", "block.x[0] + first"),
    "last inputs of gradients": ("std::min(kInputs, a.inputs - first)", "kInputs"),
    "gradients not filled up": ("sizeof(bf16) * (rows - packed) * width", "0"),
    "x not filled up": ("whole_depths(rows + 2 * reach)", "whole_depths(n + 2 * reach)"),
    "only the last block": ("load(out + c) + load(sums", "load(sums"),
    "odd rows": ("numbers(row + 2 * i + 1, input) << 16", "numbers(row + 2 * i, input) << 16"),
    "transposed by half": ("if constexpr (2 * STEP < kLanes)", "if constexpr (4 * STEP < kLanes)"),
    "rows of another block": ("a.x + (row - reach) * a.inputs", "a.x + row * a.inputs"),
    "a panel too wide": ("std::min(kColumns, a.columns - column)", "kColumns"),
    "a row short": ("set(2 * i + j, rows,", "set(2 * i + j, rows - 1,"),
    "low tiles in a short run": ("run.rows >= two && run.rows", "run.rows"),
    "a short run's tiles too high": ("run.rows < kTileRows ? run.rows : two", "two"),
}  # fmt: skip


PLANTED_IN = ("tile_product.h", "tile_weight_gradient.h", "tile_unit.h")


def planted(source: str, mistake: str) -> str:
    right, wrong = MISTAKES.get(mistake, ("", ""))
    text = (CSRC / "cpu" / source).read_text()
    return text.replace(right, wrong) if right else text


def with_mistakes(folder: Path) -> Path:
    """The checks of every mistake in the products, in one program: most of a compilation is what they share."""
    (folder / "mistakes.h").write_text(
        "".join(
            f"""namespace mistake_{i} {{
#include "cpu/vector.h"

#include "cpu/product.h"
#include "{i}/tile_product.h"
#include "cpu/weight_gradient.h"

#include "{i}/tile_weight_gradient.h"
}}
"""
            for i in range(len(MISTAKES) + 1)  # and without any
        )
        + f"#define PBF_MISTAKES(use) {' '.join(f'use(mistake_{i})' for i in range(len(MISTAKES) + 1))}\n"
    )
    for i, mistake in enumerate([*MISTAKES, "none"]):
        (folder / str(i)).mkdir()
        for source in PLANTED_IN[:2]:
            (folder / str(i) / source).write_text(planted(source, mistake))
    return compiled(CSRC, folder / "checks", "-DPBF_EMULATED_ALONE", f"-I{folder}")


@pytest.fixture(scope="session")
def mistakes(tmp_path_factory) -> Path:
    """One for all processes of a run."""
    temporary = tmp_path_factory.getbasetemp()
    folder = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "amx_mistakes"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            making = tmp_path_factory.mktemp("making")
            with_mistakes(making)
            making.rename(folder)
    return folder / "checks"


def is_right(done: subprocess.CompletedProcess[str]) -> bool:
    return done.returncode == 0 and done.stdout == "".join(f"{name}: {found}\n" for name, found in RIGHT.items())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_isa_amx_mistakes_are_found(mistakes, tmp_path, mistake):
    sources = [s for s in PLANTED_IN if planted(s, mistake) != planted(s, "none")]
    assert sources
    if "tile_unit.h" not in sources:
        assert not is_right(run(mistakes, f"mistake_{[*MISTAKES].index(mistake)}"))
        return
    # The check itself includes that one.
    shutil.copytree(CSRC / "cpu", tmp_path / "cpu")
    (tmp_path / "cpu" / "tile_unit.h").write_text(planted("tile_unit.h", mistake))
    (tmp_path / "mistakes.h").write_text("#define PBF_MISTAKES(use)\n")
    assert not is_right(run(compiled(tmp_path, tmp_path / "checks", "-DPBF_EMULATED_ALONE"), "products"))


def test_isa_amx_without_a_mistake_none_is_found(mistakes):
    assert is_right(run(mistakes, f"mistake_{len(MISTAKES)}"))
    assert is_right(run(mistakes, "products"))


def test_isa_amx_self_check_finds_wrong_products(checks):
    """And lives through illegal instructions: tiles are, here and wherever Linux was not asked for them."""
    assert said(checks, "self-check") == {
        "wrong row": "a product is wrong",
        "slightly wrong": "a product is wrong",
        "writes beyond": "a product wrote beyond its rows",
        "by neighbors": "a row's bits depend on its neighbors",
        "illegal": "an illegal instruction",
        "faults": "a general protection fault",
        "forgetful": "tiles do not outlive a switch of threads",
        "hardware": "an illegal instruction",
        "hardware's products": "an illegal instruction",
        "guard": "right",
    }


def test_isa_amx_is_detected_from_what_cpu_and_linux_say(checks):
    told = said(checks, "facts")
    tiles, configuration, saved = (int(word, 16) for word in told.pop("here").split())
    assert told == {
        "all": "right",
        "no tiles": "this CPU has no AMX tiles",
        "no bfloat16": "this CPU's AMX has no bfloat16",
        "no AVX-512": "this CPU has AMX, but not AVX-512 with bfloat16",
        "no osxsave": "the operating system or hypervisor does not save AMX tiles",
        "no configuration saved": "the operating system or hypervisor does not save AMX tiles",
        "no data saved": "the operating system or hypervisor does not save AMX tiles",
        "errno 0": "right",
        "errno 1": "Linux refuses AMX: Operation not permitted",
        "errno 22": "Linux is older than 5.16, which introduced AMX",
        "errno 28": "Linux refuses AMX: a thread's alternate signal stack is too small for its registers",
    }
    flags = re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split()
    assert bool(tiles) == ("amx_tile" in flags)
    assert bool(configuration) == ("osxsave" in flags or "xsave" in flags)
    assert bool(saved >> 2 & 1) == ("avx" in flags)


def in_new_process(switch: str | None = None) -> subprocess.CompletedProcess[str]:
    code = "from proteinbert_fast import _cpu_kernels as k; print(k.instruction_set(), k.amx_failure(), sep='|')"
    environment = {k: v for k, v in os.environ.items() if k != "PROTEINBERT_FAST_AMX"}
    if switch is not None:
        environment["PROTEINBERT_FAST_AMX"] = switch
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_isa_amx_is_chosen_where_nothing_speaks_against_it():
    name, failure = in_new_process().stdout.strip().split("|")
    assert (name == AMX) == (failure == "")
    assert name != "amx_bf16_emulated"
    if failure:
        with pytest.raises(ValueError, match=re.escape(f"'{AMX}' is unavailable on this CPU ({failure}); the best is")):
            _cpu_kernels.use_instruction_set(AMX)


def test_isa_amx_can_be_turned_off():
    name, failure = in_new_process("0").stdout.strip().split("|")
    assert name != AMX
    assert failure == "PROTEINBERT_FAST_AMX is 0 in the environment"
    assert in_new_process("1").stdout == in_new_process().stdout
    refused = in_new_process("off")
    assert refused.returncode != 0
    assert "PROTEINBERT_FAST_AMX is 'off' in the environment: set 0 to turn AMX off, 1 for the" in refused.stderr


def loops_with_dots(disassembly: str) -> list[list[str]]:
    """Innermost loops that multiply tiles, as lists of instructions."""
    loops = []
    for function in disassembly.split("\n\n"):
        lines = re.findall(r"^\s*([0-9a-f]+):\s+(.+?)\s*$", function, re.MULTILINE)
        places = {address: i for i, (address, _) in enumerate(lines)}
        for i, (_, text) in enumerate(lines):
            jump = re.match(r"j\w+\s+([0-9a-f]+)", text)
            if not jump or places.get(jump[1], len(lines)) > i:
                continue
            body = [text for _, text in lines[places[jump[1]] : i]]
            if any("tdpbf16ps" in text for text in body) and not any(re.match("j", text) for text in body):
                loops.append(body)
    return loops


def test_isa_amx_inner_loops_are_tiles_alone():
    """All products of loaded tiles in four, and of tiles that stay in the measured peak; else addresses' arithmetic."""
    if shutil.which("objdump") is None:
        missing("needs objdump")
    disassembly = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", _cpu_kernels.__file__], check=True, capture_output=True, text=True
    ).stdout
    loops = loops_with_dots(disassembly)
    counts = sorted(tuple(sum(name in text for text in body) for name in ("tdpbf16ps", "tileloadd")) for body in loops)
    assert counts == [(1, 2), (2, 3), (2, 3), (4, 0), (4, 4)]
    for body in loops:
        for text in body:
            if not text.startswith(("tdpbf16ps", "tileloadd")):
                assert re.match(r"(lea|add|sub|cmp|mov)\w*\s", text), text
                assert text.startswith("lea") or "(" not in text, text


@pytest.mark.parametrize(
    ("rows", "inputs", "columns", "taps", "product", "gradient"),
    [
        (256, 128, 128, 9, "4608 4736 128 1", "4608 4608 576 36"),
        (256, 128, 128, 1, "512 640 128 1", "512 512 64 4"),
        (256, 128, 192, 1, "768 960 192 1", "768 768 96 6"),
        (256, 768, 128, 1, "3072 3200 128 1", "3072 3072 384 4"),
        (240, 128, 128, 9, "4320 4584 120 1", "4608 4608 576 36"),
    ],
)
def test_isa_amx_counts_of_the_published_model(checks, rows, inputs, columns, taps, product, gradient):
    """Dots, loads, stores and configurations behind the table in docs/kernels.md: no tile is computed twice."""
    assert run(checks, "count", *map(str, (rows, inputs, columns, taps))).stdout.splitlines() == [product, gradient]
    assert int(product.split()[0]) == rows // 16 * inputs // 32 * columns // 16 * taps
