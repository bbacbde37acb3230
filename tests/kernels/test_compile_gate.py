"""The gate itself: planted faults fail it, what is shipped passes. `make compile-gate` runs it over everything."""

import shutil
from pathlib import Path

import pytest
import triton

from .compile_gate import Target, compile_apart, faults, targets

pytestmark = pytest.mark.skipif(
    not (Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm").exists() and not shutil.which("nvdisasm"),
    reason="this triton came without a disassembler",
)
SHIPPED = Target("local_block", 90, "bfloat16", 128)


def test_what_is_shipped_passes():
    found = compile_apart(SHIPPED)
    assert faults(SHIPPED, found) == []
    assert found["wgmma"] >= 8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"warps": 4}, "loads of spilled registers, 0 allowed"),
        ({"rows": 256, "stages": 6}, "bytes of shared memory, the chip has 232,448"),
        ({"rows": 32, "descriptors": False}, "wgmma was lost"),
    ],
)
def test_a_planted_regression_fails(changes, says):
    planted = Target("local_block", 90, "bfloat16", 128, changes)
    assert any(says in line for line in faults(planted, compile_apart(planted)))


def test_serialised_products_fail():
    found = compile_apart(SHIPPED) | {"warpgroup": 32}
    assert faults(SHIPPED, found) == ["wgmma is serialised: 32 fences for 16 products"]


def test_a_crash_of_the_compiler_is_told():
    found = compile_apart(Target("local_block", 90, "no_dtype", 128))
    assert found == {"crashed": "AttributeError: module 'torch' has no attribute 'no_dtype'"}


def test_every_kernel_is_in_the_gate():
    assert {t.kernel for t in targets()} == {
        "local_block", "first_block", "global_attention", "weights", "add_spans", "residue_mean", "global_track",
        "linear", "token_head",
    }  # fmt: skip
