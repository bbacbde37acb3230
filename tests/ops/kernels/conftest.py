"""Kernels run on a GPU where there is one, else, with TRITON_INTERPRET=1 set, in Triton's interpreter."""

import importlib.util
import os

import numpy as np
import pytest
import torch

# References are computed in deterministic mode too, in which cuBLAS asks for this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in {"", "0"}
if importlib.util.find_spec("triton") is None or not (IS_INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]
elif IS_INTERPRETED:
    from . import interpreter

    interpreter.mend()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def quiet_numpy():
    """The interpreter computes in NumPy, which warns of infinities and NaN where a GPU does not."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def exact_float32():
    """TF32 off, as in PyTorch by default."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
