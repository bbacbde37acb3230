"""What every launch needs to know: PyTorch's settings, the device."""

import sys

import pytest
import torch

from proteinbert_fast import ProteinBertConfig, self_check
from proteinbert_fast.ops.kernels import launching
from proteinbert_fast.ops.kernels.launching import has_matrix_units, padded, product_precision


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


def test_matrix_units_take_no_exact_float32():
    assert has_matrix_units(80, torch.float32, "tf32")
    assert not has_matrix_units(90, torch.float32, "ieee")
    assert has_matrix_units(90, torch.float16, "ieee")
    assert not has_matrix_units(75, torch.float16, "ieee")


def test_padded_is_the_next_power_of_two():
    assert [padded(n) for n in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]
    assert padded(27, 32) == 32


@pytest.mark.parametrize("portable_is_right", [True, False])
def test_a_wrong_kernel_for_hopper_gives_way_to_the_portable_one(monkeypatch, portable_is_right):
    """The self-check's way back, on a device that is not there."""
    module = sys.modules["proteinbert_fast.ops.kernels.local_block"]
    monkeypatch.setattr(module, "_distrusted", [])
    monkeypatch.setattr(launching, "capability", lambda index: 90)
    kind = self_check.Kind(torch.device("cuda", 0), ProteinBertConfig(), torch.bfloat16, True, False)
    if module.portable_because(90, 128, torch.bfloat16) is not None:
        pytest.skip("this version of Triton has no kernel for Hopper")

    def difference(*_):
        trusted = not module._distrusted
        return 2.0 if trusted or not portable_is_right else 0.0

    monkeypatch.setattr(self_check, "difference", difference)
    with pytest.warns(
        RuntimeWarning, match="local block for Hopper fails its self-check on cuda:0: results are off by 2"
    ):
        found = self_check._check(kind)
    assert (found is None) == portable_is_right
    assert module.portable_because(90, 128, torch.bfloat16).startswith("it failed a self-check: results are off")
