"""What every launch needs to know: PyTorch's settings, the device."""

import torch

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
