"""``proteinbert-fast doctor``: what is installed, what will run and why, and whether it works."""

import argparse
import importlib.util
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from proteinbert_fast.model import ProteinBert
    from proteinbert_fast.ops.backends import Backend
    from proteinbert_fast.packing import PackedBatch

# Small in everything but the sizes that decide which back end runs.
CHECK_SIZES = {"n_annotations": 65, "n_blocks": 2}
# Odd lengths, and one residue.
CHECK_LENGTHS = (1, 7, 131, 700, 40)
TOLERANCES = {"float32": 2e-4, "bfloat16": 0.15}
RATE_SECONDS = 0.2


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the command to the program's parser."""
    return subparsers.add_parser(
        "doctor",
        help="show versions, devices and back ends, and run a self-check",
        description="Show versions, devices, back ends and cached weights, and run a short self-check.",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; returns 0 if all checks pass, else 1."""
    sections = {"versions": _versions, "machine": _machine, "back ends": _backends, "weights": _weights}
    for title, lines in sections.items():
        print(title)
        for name, value in lines():
            print(f"  {name:<21} {value}")
    print("checks")
    started = time.perf_counter()
    checks = _checks()
    failed = 0
    for name, check in checks:
        try:
            result = f"pass  {name}: {check()}"
        except Exception as error:  # a doctor reports every illness
            failed += 1
            result = f"FAIL  {name}: {type(error).__name__}: {' '.join(str(error).split())}"
        print(f"  {result}", flush=True)
    seconds = time.perf_counter() - started
    print(f"{failed} of {len(checks)} checks failed" if failed else f"all checks passed in {seconds:.1f} s")
    return 1 if failed else 0


def _versions() -> Iterator[tuple[str, str]]:
    from proteinbert_fast import __version__

    yield "proteinbert_fast", f"{__version__} in {Path(__file__).parents[1]}"
    yield "Python", f"{platform.python_version()} at {sys.executable}"
    for package in ("torch", "triton", "numpy", "h5py", "safetensors", "huggingface_hub", "zstandard"):
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    from proteinbert_fast.embedding.api import cpu_abilities, has_fast_bfloat16
    from proteinbert_fast.ops.instruction_sets import describe_instruction_sets, measure_rates
    from proteinbert_fast.processors import cpu_limit, usable_processors

    cpu = cpu_abilities()
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    limit = cpu_limit()
    limited = "" if limit is None else f", {limit:g} granted by control groups"
    yield "CPU", f"{cpu.get('cpu_name') or platform.processor() or 'unknown'}, {os.cpu_count()} processors{limited}"
    bfloat16 = "in hardware" if has_fast_bfloat16() else "not in hardware"
    yield "CPU features", f"{torch.backends.cpu.get_cpu_capability()}, bfloat16 {bfloat16}"
    yield "instruction set", describe_instruction_sets()
    threads, processors = torch.get_num_threads(), usable_processors()
    more = f", more than the {processors} that can run at once: set OMP_NUM_THREADS={processors}"
    yield "threads", f"{threads}{more if threads > processors else ''}"
    for dtype, rates in measure_rates(RATE_SECONDS, min(threads, processors)).items():
        yield f"peak, {dtype}", str(rates)
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield "CUDA", f"no device (torch is built {built})"
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{i}", f"{device.name}, {memory}, compute capability {device.major}.{device.minor}"


def _backends() -> Iterator[tuple[str, str]]:
    for device in _devices():
        for dtype in ("float32", "bfloat16"):
            model = _model(device)
            with _autocast(device, dtype):
                report = model.backend_report()
            chosen = dtype == ("bfloat16" if device == "cuda" else "float32")
            yield (
                f"{device}, {dtype}",
                report + (", the default" if chosen and device == _devices()[-1] else ""),
            )
    if importlib.util.find_spec("triton") is not None:
        from proteinbert_fast.ops.kernels import tuning

        yield "kernel tuning", tuning.report()
    yield from _local_block_kernels()
    yield from _self_checks()


def _self_checks() -> Iterator[tuple[str, str]]:
    """What the self-checks above found, and what turns kernels off."""
    import torch

    from proteinbert_fast.ops.switches import HOPPER_SWITCH, KERNELS_SWITCH

    for name in (KERNELS_SWITCH, HOPPER_SWITCH):
        if value := os.environ.get(name):
            yield "environment", f"{name}={value}"
    if not torch.cuda.is_available():
        return
    from proteinbert_fast import self_check
    from proteinbert_fast.self_check import verdicts

    for dtype in (torch.float32, torch.bfloat16):
        kind = self_check.kind_of(torch.device("cuda", 0), _model("cpu").config, dtype, torch.float32)
        verdict = verdicts.read(kind)
        if verdict is not None:
            found = verdict.failure or "passed"
            if verdict.hopper_failure:
                found += f"; the kernels for Hopper failed: {verdict.hopper_failure}"
            name = str(dtype).removeprefix("torch.")
            yield "self-check, cuda:0", f"{name}: {found} ({verdict.date}, {verdict.path})"


def _local_block_kernels() -> Iterator[tuple[str, str]]:
    """Which of the Triton back end's kernels runs a local block of the default sizes, on each kind of GPU."""
    import torch

    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return
    from proteinbert_fast.config import ProteinBertConfig
    from proteinbert_fast.ops.kernels.local_block import implementation

    channels = ProteinBertConfig().d_local
    for major, minor in sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}):
        kernel = implementation(10 * major + minor, channels, torch.bfloat16)
        yield "triton local block", f"bfloat16 on compute capability {major}.{minor}: {kernel}"


def _weights() -> Iterator[tuple[str, str]]:
    from proteinbert_fast.cache import cache_directory
    from proteinbert_fast.checkpoints import PUBLISHED, is_offline
    from proteinbert_fast.weights import SHIPPED

    for name, folder in SHIPPED.items():
        is_there = (folder / "model.safetensors").is_file()
        yield name, f"{'comes with the package' if is_there else 'missing: install the package anew'} ({folder})"
    for name, published in PUBLISHED.items():
        path = cache_directory() / published.file_name
        if path.is_file() and path.stat().st_size == published.size:
            yield name, f"in the cache: {path}"
        else:
            later = "offline: it cannot be fetched" if is_offline() else "fetched when it is first used"
            yield name, f"not in the cache ({path.parent}); {later}"


def _checks() -> list[tuple[str, Callable[[], str]]]:
    checks = [("tokenizer", _check_tokenizer)]
    for device in _devices():
        checks += [(f"model on {device} in {dtype}", partial(_check_model, device, dtype)) for dtype in TOLERANCES]
        checks.append((f"same bits on {device}", partial(_check_same_bits, device)))
    return [*checks, ("HDF5 file", _check_file)]


def _check_tokenizer() -> str:
    from proteinbert_fast.tokenizer import VOCABULARY, Tokenizer

    tokenizer = Tokenizer()
    text = VOCABULARY * 50
    _require(tokenizer.tokenize(text).tolist() == [23, *list(range(22)) * 50, 24], "wrong tokens")
    _require(text in tokenizer.decode(tokenizer.tokenize(text)), "decoding gives another text")
    return f"{len(VOCABULARY)} residues there and back"


def _check_model(device: str, dtype: str) -> str:
    """The model, as it would run here, against the plain definition in float64."""
    import torch

    batch = _batch()
    with torch.inference_mode():
        expected = _model("cpu", "reference").double()(batch)
        with _autocast(device, dtype):
            found = _model(device)(batch.to(device))
        worst = 0.0
        for i in range(len(batch)):
            difference = found.local[i].double().cpu() - expected.local[i]
            worst = max(worst, difference.abs().max().item())
        worst = max(worst, (found.global_state.double().cpu() - expected.global_state).abs().max().item())
    _require(worst < TOLERANCES[dtype], f"differs from the definition by {worst:.1e}, allowed {TOLERANCES[dtype]}")
    return f"largest difference from the definition {worst:.1e}"


def _check_same_bits(device: str) -> str:
    """Each protein alone and in a batch."""
    import torch

    batch = _batch()
    model = _model(device)
    with torch.inference_mode():
        together = model(batch.to(device))
        for i in range(len(batch)):
            alone = model(batch[i].to(device))
            same = torch.equal(alone.local[0], together.local[i])
            same = same and torch.equal(alone.global_state[0], together.global_state[i])
            _require(same, f"a protein of {CHECK_LENGTHS[i]} residues differs alone and in a batch")
    return "each protein alone and in a batch"


def _check_file() -> str:
    import h5py
    import numpy as np

    from proteinbert_fast.embedding import embed

    proteins = {f"protein {i}": sequence for i, sequence in enumerate(_sequences())}
    model = _model("cpu")
    expected = embed(proteins, model=model, per="residue", dtype="float32", progress=False)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "check.h5")
        embed(proteins, path, model=model, per="residue", dtype="float32", progress=False)
        with h5py.File(path) as file:
            same = list(file["ids"].asstr()) == expected.ids
            same = same and np.array_equal(file["embeddings"][:], expected.embeddings)
            _require(same, "reads back other values than were written")
    return "reads back what was written"


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise AssertionError(complaint)


def _sequences() -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=n)) for n in CHECK_LENGTHS]


def _batch() -> "PackedBatch":
    from proteinbert_fast.tokenizer import Tokenizer

    return Tokenizer()(_sequences())


def _model(device: str, backend: "Backend" = "auto") -> "ProteinBert":
    """Always the same random weights."""
    import torch

    from proteinbert_fast.config import ProteinBertConfig
    from proteinbert_fast.model import ProteinBert

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ProteinBert(ProteinBertConfig(**CHECK_SIZES), backend=backend).to(device).eval()


def _autocast(device: str, dtype: str) -> "torch.autocast":
    import torch

    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")


def _devices() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
