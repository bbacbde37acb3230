"""The gate itself: planted faults fail it, what is shipped passes. `make compile-gate` runs it over everything."""

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton

from . import compile_gate
from .compile_gate import (
    BACKWARD,
    FORWARD,
    LOSSES,
    SUMS,
    Target,
    cause,
    compile_apart,
    faults,
    hopper_targets,
    targets,
    unordered,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm").exists() and not shutil.which("nvdisasm"),
        reason="this triton came without a disassembler",
    ),
]
SHIPPED = Target("local_block", 90, "bfloat16", 128)
BAD = Target("local_block", 90, "no_dtype", 128)
# Changes to what is shipped, and what the gate says of them.
PLANTED = [
    ({"warps": 4}, "loads of spilled registers, 0 allowed"),
    ({"rows": 256, "stages": 6}, "bytes of shared memory, the chip has 232,448"),
    ({"rows": 32, "descriptors": False}, "wgmma was lost"),
]
PLANTED_FOR_HOPPER = [
    ("local_block_hopper", {"stages": 5}, "1 programs on a multiprocessor, 2 wanted"),
    ("local_block_hopper", {"registers": 96}, "loads of spilled registers, 8 allowed"),
    ("local_block_hopper", {"rows": 256, "stages": 7}, "bytes of shared memory, the chip has 232,448"),
    ("convolution_gradient_hopper", {"stages": 5}, "1 programs on a multiprocessor, 2 wanted"),
]


def planted(changes: dict[str, Any], kernel: str = "local_block") -> Target:
    return Target(kernel, 90, "bfloat16", 128, changes=changes)


@cache
def compiled() -> dict[str, dict[str, Any]]:
    """Everything, compiled once for all tests: a process takes as long to start as two targets take."""
    wanted = [SHIPPED, BAD, *(planted(changes) for changes, _ in PLANTED)]
    if hopper_targets():
        wanted += [planted(changes, kernel) for kernel, changes, _ in PLANTED_FOR_HOPPER]
    return {repr(target): found for target, found in zip(wanted, compile_apart(*wanted), strict=True)}


def shipped() -> dict[str, Any]:
    return compiled()[repr(SHIPPED)]


def test_what_is_shipped_passes():
    found = shipped()
    assert faults(SHIPPED, found) == []
    assert found["wgmma"] >= 8


@pytest.mark.parametrize(("changes", "says"), PLANTED)
def test_a_planted_regression_fails(changes, says):
    target = planted(changes)
    assert any(says in line for line in faults(target, compiled()[repr(target)]))


def test_serialised_products_fail():
    found = shipped() | {"warpgroup": 32}
    assert faults(SHIPPED, found) == ["wgmma is serialised: 32 fences for 16 products"]


def test_a_crash_of_the_compiler_is_told():
    """It costs one target: the others are compiled before it or after."""
    found = dict(compiled())
    assert found.pop(repr(BAD)) == {"crashed": "AttributeError: module 'torch' has no attribute 'no_dtype'"}
    assert not any("crashed" in counts for counts in found.values())


def test_every_kernel_is_in_the_gate():
    assert {t.kernel for t in targets()} == {
        *FORWARD, *BACKWARD, *LOSSES, *SUMS, "token_head",
    } | {t.kernel for t in hopper_targets()}  # fmt: skip


@pytest.mark.skipif(not hopper_targets(), reason="this version of Triton cannot compile the kernel")
@pytest.mark.parametrize(("kernel", "changes", "says"), PLANTED_FOR_HOPPER)
def test_a_planted_regression_of_the_kernels_for_hopper_fails(kernel, changes, says):
    target = planted(changes, kernel)
    assert any(says in line for line in faults(target, compiled()[repr(target)]))


def test_kernels_for_hopper_are_compiled_with_the_releases_that_run_them():
    assert bool(hopper_targets()) == bool(re.match(r"3\.[67]\.", triton.__version__))


def test_a_gate_for_hopper_that_compiles_nothing_fails(monkeypatch, capsys):
    """Gluon under another name again would otherwise pass, since the portable kernels run then."""
    portable = sys.modules["proteinbert_fast.ops.kernels.local_block"]
    monkeypatch.setattr(portable, "portable_because", lambda *_: "triton 3.7.9 has another Gluon")
    assert compile_gate.main(["--hopper"]) == 1
    assert capsys.readouterr().out == "FAIL nothing to compile: triton 3.7.9 has another Gluon\n"


@pytest.mark.skipif(not hopper_targets(), reason="this version of Triton cannot compile the kernel")
def test_a_name_that_gluon_lacks_fails(tmp_path):
    code = """
from proteinbert_fast.ops.kernels.local_block_hopper import load_tile
from tests.ops.kernels.compile_gate import Target, compile_here
source = load_tile.src.replace("    thread_barrier()", "    gl.barrier_of_threads()")
assert source != load_tile.src
load_tile._unsafe_update_src(source)
compile_here(Target("convolution_gradient_hopper", 90, "bfloat16", 128))
"""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0
    assert "has no attribute 'barrier_of_threads'" in cause(done.stderr)


def test_what_ended_a_process_is_told_in_a_line():
    picture = "lib.CompilationError: at 7:4:\ndef f(): ...\n    ^\n"
    for error in ("AttributeError: no x", "AttributeError('no x')"):
        for said in (f"{error}\n\nThe above\n{picture}", f"{picture}{error}\n\nThe above\n{picture}"):
            assert cause(f"a warning\nTraceback\n  File ...\n{said}") == error
    assert cause("python: layout.cpp:77: Assertion `false' failed.\nAborted\n") == "Aborted"
    assert cause("") == ""


def test_a_missing_barrier_fails():
    copy, wait = "cp.async.bulk.tensor.2d", "wgmma.wait_group.sync.aligned 1;"
    products, barrier, fence = "wgmma.mma_async", "bar.sync 0;", "fence.proxy.async"
    for right, wrong in (
        (["mbarrier.init", fence, barrier, copy], ["mbarrier.init", barrier, copy]),
        ([products, wait, barrier, copy], [products, wait, copy]),
        (["st.shared", fence, barrier, products], ["st.shared", barrier, fence, products]),
        (["cp.async.cg.shared", "cp.async.wait_group", fence, barrier, products],
         ["cp.async.cg.shared", fence, barrier, products]),
        ([products, wait, barrier, "st.shared"], [products, barrier, wait, "st.shared"]),
    ):  # fmt: skip
        assert unordered("\n".join(right)) == 0
        assert unordered("\n".join(wrong)) == 1
    found = shipped() | {"unordered": 1}
    assert faults(SHIPPED, found) == ["1 accesses to shared memory that no barrier keeps apart"]
