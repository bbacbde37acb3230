"""Fixtures of the operations' tests."""

import pytest

from proteinbert_fast import _cpu_kernels
from proteinbert_fast.ops import cpu


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16", "amx_bf16_emulated", "neon_bf16"])
def instruction_set(request):
    """Each in use in turn; those that this CPU lacks are skipped."""
    best = _cpu_kernels.instruction_set()
    try:
        _cpu_kernels.use_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _cpu_kernels.use_instruction_set(best)


@pytest.fixture(autouse=True)
def threads_as_asked(monkeypatch):
    """Kernels run on as many threads as a test asks for, more than there are processors among them."""
    monkeypatch.setattr(cpu, "usable_processors", lambda: 1000)
