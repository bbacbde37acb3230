"""What every launch needs to know: PyTorch's settings, the device."""

import os
import subprocess
import sys

import pytest
import torch

from proteinbert_fast.ops.kernels import global_attention, global_attention_backward, launching, local_block_backward
from proteinbert_fast.ops.kernels.global_track import PROTEINS
from proteinbert_fast.ops.kernels.global_track import configuration as of_global_track
from proteinbert_fast.ops.kernels.launching import has_matrix_units, padded
from proteinbert_fast.ops.kernels.local_block import configuration as of_local_block
from proteinbert_fast.ops.precision import product_precision


def test_products_of_float32_follow_the_settings_of_torch():
    assert product_precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert product_precision(torch.float32) == "tf32"
    assert product_precision(torch.bfloat16) == "ieee"
    torch.set_float32_matmul_precision("highest")
    matmul = torch.backends.cuda.matmul
    try:
        matmul.fp32_precision = "tf32"
        assert product_precision(torch.float32) == "tf32"
        matmul.fp32_precision = "ieee"
        torch.backends.fp32_precision = "tf32"
        assert product_precision(torch.float32) == "ieee", "the nearer setting rules"
        matmul.fp32_precision = "none"
        assert product_precision(torch.float32) == "tf32"
    finally:
        torch.backends.fp32_precision = "none"
        matmul.fp32_precision = "ieee"


SPECIALISED = """
import importlib, pkgutil
from triton.runtime import JITFunction
from proteinbert_fast.ops import kernels
from proteinbert_fast.ops.kernels import launching
found = {}
for info in pkgutil.iter_modules(kernels.__path__):
    module = importlib.import_module(f"{kernels.__name__}.{info.name}")
    for name, function in vars(module).items():
        if isinstance(function, JITFunction) and name.endswith("_kernel"):
            sizes = [p for p in function.params if not p.is_constexpr and p.name.islower()]
            found[name] = {p.name for p in sizes if not p.do_not_specialize}
            assert any(p.do_not_specialize for p in sizes), name
            layouts = [p for p in function.params if p.name in launching.LAYOUTS_OF_BATCHES]
            assert all(p.do_not_specialize_on_alignment for p in layouts), name
assert len(found) > 15, sorted(found)
print(sorted(set().union(*found.values())))
"""


def test_no_kernel_is_compiled_again_for_another_batch():
    """What Triton compiles variants for are the sizes of a model, and not those of batches."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SPECIALISED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['first', 'n', 'n_classes', 'n_columns', 'n_inputs', 'stride']"


def test_matrix_units_take_no_exact_float32():
    assert has_matrix_units(80, torch.float32, "tf32")
    assert not has_matrix_units(90, torch.float32, "ieee")
    assert has_matrix_units(90, torch.float16, "ieee")
    assert not has_matrix_units(75, torch.float16, "ieee")


def test_padded_is_the_next_power_of_two():
    assert [padded(n) for n in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]
    assert padded(27, 32) == 32


def test_compile_asks_for_the_capability_without_a_warning(monkeypatch):
    """A warning of what users cannot change, and an error in a program that takes warnings for errors."""
    monkeypatch.setattr(launching, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    compiled = torch.compile(lambda x: x + launching.capability(1), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(2)).tolist() == [91, 91]


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120, 121])
@pytest.mark.parametrize("dtype", launching.DTYPES, ids=str)
@pytest.mark.parametrize("n_global", [512, 1024])
def test_tiles_of_the_global_track_fit_into_shared_memory(capability, dtype, n_global):
    """What is held of a chunk, as machine code shows it; the compile gate looks at the rest."""
    if (capability, dtype, n_global) == (75, torch.float32, 1024):
        return  # refused
    c = of_global_track(capability, n_global, dtype)
    held = (c.stages - 1) * (n_global + PROTEINS) * c.chunk * dtype.itemsize
    assert held <= launching.shared_memory(capability)
    assert c.stages == 3 or n_global == 1024 or capability == 75, "no fewer stages than needed"


@pytest.mark.parametrize("outputs", [192, 320, 384])
@pytest.mark.parametrize("channels", [128, 256])
def test_weights_of_a_head_are_taken_in_parts_where_they_do_not_fit(outputs, channels):
    for capability in (80, 86, 89, 90, 100, 120):
        c = global_attention.configuration(capability, channels, torch.bfloat16)
        found = global_attention.fitted(c, capability, outputs, channels, 2)
        whole = (outputs + c.rows * c.stages) * channels * 2
        if whole > launching.shared_memory(capability):
            assert found.chunk == 32
        elif outputs == 192 and channels == 128:
            assert found == c, "as the published sizes"


@pytest.mark.parametrize(("outputs", "channels"), [(192, 128), (320, 128), (384, 128), (192, 256), (384, 256)])
def test_gradients_of_wide_heads_fit_too(outputs, channels):
    of = global_attention_backward
    for capability in (80, 86, 90, 100, 120):
        shipped = of.configuration(capability, channels, torch.bfloat16)
        for c in (shipped, shipped._replace(chunk=0, stages=3)):
            found = of.fitted(c, capability, outputs, channels, 2)
            whole = (outputs * found.stages + found.rows) * channels * 2
            assert found.chunk or whole < launching.shared_memory(capability)
            assert found.rows <= c.rows
        assert of.fitted(shipped, capability, 192, channels, 2) == shipped, "as the published sizes"
    # What is tuned for the published sizes keeps the rows, and with them the bits, wherever the shipped one does.
    shipped = of.configuration(90, 128, torch.bfloat16)
    tuned = of.fitted(shipped._replace(stages=3), 90, 320, 128, 2)
    assert tuned == of.fitted(shipped, 90, 320, 128, 2) == shipped
    assert of.fitted(shipped, 90, 512, 128, 2).chunk == 64


def test_gaming_blackwell_has_the_tiles_of_ampere():
    for dtype in launching.DTYPES:
        for configuration in (of_local_block, local_block_backward.configuration, global_attention.configuration):
            for channels in (128, 256):
                assert configuration(120, channels, dtype) == configuration(86, channels, dtype)
