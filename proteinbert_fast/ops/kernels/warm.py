"""Compiles the kernels of a model before they are needed, in threads, into Triton's cache on disk.

One after the other, a first forward pass compiles its kernels in about 20 s, and gradients take 25 s more. Nothing is
launched: the model runs with kernels that only compile, so what is compiled is what its passes launch. That needs no
GPU. For a process of its own: Triton is patched meanwhile.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from triton.runtime._async_compile import AsyncCompileMode

from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.ops.kernels.launching import compiling_for
from proteinbert_fast.processors import usable_processors

# Of the proteins of the batch, with the two tokens at the ends: one is so long that its spans are added up in rounds.
_LENGTHS = (17_000, 40)
_MOST_THREADS = 16


def compile_for(
    device: torch.device,
    config: ProteinBertConfig,
    dtype: torch.dtype,
    parameters: torch.dtype,
    gradients: bool,
    say: Callable[[int, int], None],
    threads: int | None = None,
) -> int:
    """Compiles what forward passes, and where wanted training steps, launch on a device.

    Args:
        device: a CUDA GPU; or the CPU, within ``compiling_for``.
        config: sizes of the model.
        dtype: the dtype computed in.
        parameters: the dtype of the weights, another one under autocast.
        gradients: also compile what training launches.
        say: is told how many kernels are compiled, and how many there are so far; from other threads, one at a time.
        threads: that compile; as many as there are processors, up to 16, when None.

    Returns:
        How many kernels there are.
    """
    executor = _Executor(threads or min(usable_processors(), _MOST_THREADS), say)
    with executor, _only_compiling(), AsyncCompileMode(executor):
        _run_model(device, config, dtype, parameters, gradients)
    return executor.submitted


def compile_ahead(
    capability: int,
    config: ProteinBertConfig,
    dtype: torch.dtype,
    parameters: torch.dtype,
    gradients: bool,
    say: Callable[[int, int], None],
    threads: int | None = None,
) -> int:
    """As ``compile_for``, for a GPU that need not be here.

    Args:
        capability: of the GPU: 90 for 9.0.
        config: sizes of the model.
        dtype: the dtype computed in.
        parameters: the dtype of the weights.
        gradients: also compile what training launches.
        say: as for ``compile_for``.
        threads: as for ``compile_for``.

    Returns:
        How many kernels there are.
    """
    with _pretending(capability):
        return compile_for(torch.device("cpu"), config, dtype, parameters, gradients, say, threads)


def cache_folder() -> str:
    """Where Triton keeps what it has compiled."""
    return str(knobs.cache.dir)


class _Executor(ThreadPoolExecutor):
    """Counts what is submitted and done."""

    def __init__(self, threads: int, say: Callable[[int, int], None]) -> None:
        super().__init__(threads, thread_name_prefix="compile")
        self.submitted = self.done = 0
        self.say = say
        self._lock = threading.Lock()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        self.submitted += 1
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(self._count)
        return future

    def _count(self, _: "Future[Any]") -> None:
        with self._lock:
            self.done += 1
            self.say(self.done, self.submitted)


@contextmanager
def _only_compiling() -> Iterator[None]:
    """Kernels are compiled where they would be launched."""
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(kernel, *args, grid=grid, warmup=True, **kwargs)

    # Triton keeps its mode per thread: gradients must come from this one, too.
    with patch.object(JITFunction, "run", compile_only), torch.autograd.set_multithreading_enabled(False):
        yield


class _AbsentGpu:
    """What Triton asks its driver while it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def _pretending(capability: int) -> Iterator[None]:
    before = driver._active  # to ask for it would make one, which fails without a GPU
    with compiling_for(capability):
        driver.set_active(_AbsentGpu(capability))
        try:
            yield
        finally:
            driver._active = before


def _run_model(
    device: torch.device, config: ProteinBertConfig, dtype: torch.dtype, parameters: torch.dtype, gradients: bool
) -> None:
    """Forward passes as inference and training make them. Results are whatever lies in new memory."""
    from dataclasses import replace

    from proteinbert_fast.model import ProteinBert
    from proteinbert_fast.pretraining.losses import annotation_loss, token_loss
    from proteinbert_fast.tokenizer import Tokenizer

    # Block by block the same kernels, but for the first and the last.
    with torch.random.fork_rng(devices=[]):
        model = ProteinBert(replace(config, n_blocks=min(config.n_blocks, 3)), backend="triton").to(device, parameters)
    batch = Tokenizer(gap=max(config.reach, 20))(["M" * n for n in _LENGTHS]).to(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != parameters)
    with torch.inference_mode(), autocast:
        out = model(batch)
        for _ in (out.residue_mean(), out.go_logits, out.go_probabilities, out.token_logits, out.token_probabilities):
            pass
    if gradients:
        proteins = torch.arange(len(batch), device=device)
        with torch.enable_grad(), autocast:
            out = model(batch)
            loss = token_loss(out, batch) + annotation_loss(out, (proteins % config.n_annotations, proteins))
            loss.backward()
