"""Says, where it is so, that the tests of the GPU kernels are not among those that run."""

import importlib.util
import os

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in {"", "0"}


@pytest.mark.skipif(
    not (IS_INTERPRETED or torch.cuda.is_available()),
    reason="tests/ops/kernels needs a GPU, or TRITON_INTERPRET=1: make test-kernels runs it in the interpreter",
)
def test_gradients_and_golden_numbers_of_gpu_kernels_can_be_tested():
    assert importlib.util.find_spec("triton") is not None
