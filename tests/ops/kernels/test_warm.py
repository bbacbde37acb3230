"""Kernels compiled ahead are those that passes launch later, whatever the batch; nothing is compiled twice."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from proteinbert_fast.ops.kernels.launching import capability, compiling_for, is_compiling_ahead

REPOSITORY = Path(__file__).parents[3]
# A process in which kernels are compiled for a GPU that is not here, and none is run.
PREAMBLE = """
import glob, os, sys, torch
from proteinbert_fast import PackedBatch, ProteinBert, ProteinBertConfig, Tokenizer
from proteinbert_fast.ops.kernels import warm
CONFIG = ProteinBertConfig(n_annotations=5, d_local=64, d_global=64, n_blocks=4, n_heads=2, d_key=32)
said = []
def ahead(gradients=False, threads=2, dtype=torch.bfloat16):
    return warm.compile_ahead(90, CONFIG, dtype, torch.float32, gradients, lambda *n: said.append(n), threads)
def compiled():
    return len(glob.glob(os.environ["TRITON_CACHE_DIR"] + "/*/*.cubin"))
"""


def run(code: str, cache: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", PREAMBLE + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """What forward passes need is compiled."""
    folder = tmp_path_factory.mktemp("triton")
    code = "n = ahead(); print(n, compiled(), said[-1] == (n, n), [done for done, _ in said] == [*range(1, n + 1)])"
    out = run(code, folder)
    n, files, *told = out.split()
    assert int(n) == int(files) > 8
    assert told == ["True", "True"]
    return folder


def test_nothing_is_compiled_again(cache):
    assert run("before = compiled(); n = ahead(threads=1); print(before == compiled() == n)", cache) == "True\n"


# Batches that begin anywhere: a protein of another batch, a slice, places of which no pointer is a multiple of 16.
PASSES = """
model = ProteinBert(CONFIG, backend="triton")
batch = Tokenizer(gap=20)(["M" * n for n in (3, 18, 350, 1, 700)])
places = torch.zeros(2, 3, dtype=torch.int64)
places[0], places[1] = torch.tensor([20, 60, 512]), torch.tensor([20, 300, 0])
tokens = torch.full((513,), 26, dtype=torch.uint8)[1:]
placed = PackedBatch.on_device(tokens, places[0], places[1], 20, longest=512)
assert batch[1].tokens.data_ptr() % 16 and places[1].data_ptr() % 16 and tokens.data_ptr() % 16
before = compiled()
with warm._pretending(90), warm._only_compiling(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
    for one in (batch, batch[0], batch[1], batch[2], batch[1:4], batch[[0, 3]], placed):
        out = model(one)
        out.go_probabilities, out.token_probabilities, out.residue_mean(), out.go_logits, out.token_logits
print(compiled() - before)
"""


def test_no_batch_needs_kernels_of_its_own(cache):
    assert run(PASSES, cache) == "0\n"


def test_alignment_would_make_others(tmp_path):
    """The test above can fail: with pointers that Triton looks at, some kernels are compiled twice."""
    patched = """
from triton.runtime import JITFunction
for module in list(sys.modules.values()):
    for function in list(vars(module).values()) if "ops.kernels" in module.__name__ else ():
        if isinstance(function, JITFunction):
            for p in function.params:
                p.do_not_specialize_on_alignment = False
"""
    assert int(run(patched + "ahead()" + PASSES, tmp_path)) > 0


@pytest.mark.slow
def test_training_is_compiled_too(cache):
    code = "first = compiled(); n = ahead(True); print(compiled() == n, n > first + 15, ahead(True))"
    assert run(code, cache) == "True True 0\n"


def test_kernels_travel_to_another_folder(cache, tmp_path):
    """As benchmarks/gpu_first.py --prepare makes them: without what only people read, and by another path."""
    from benchmarks.first.cache import relocate, slim

    there = tmp_path / "another" / "folder"
    shutil.copytree(cache, there)
    size = sum(path.stat().st_size for path in there.rglob("*"))
    slim(there)
    assert sum(path.stat().st_size for path in there.rglob("*")) < size / 2
    kernels = len(list(there.glob("*/*.cubin")))
    # Triton would look where they were made, and compile them again.
    hidden = cache.with_name("hidden")
    cache.rename(hidden)
    try:
        assert relocate(there) == kernels
        assert relocate(there) == kernels, "and again"
        out = run("files = set(glob.glob(os.environ['TRITON_CACHE_DIR'] + '/*/*')); n = ahead(); "
                  "print(n, set(glob.glob(os.environ['TRITON_CACHE_DIR'] + '/*/*')) == files)", there)  # fmt: skip
    finally:
        hidden.rename(cache)
    submitted, same_files = out.split()
    assert same_files == "True", "nothing was compiled"
    assert 8 < int(submitted) <= kernels, "all kernels of a forward pass; the cache may hold those of training too"


def test_what_does_not_compile_is_said(tmp_path):
    code = """
from unittest.mock import patch
from triton.runtime import JITFunction
try:
    with patch.object(warm, "_run_model", lambda *_: warm.JITFunction.broken()):
        ahead()
except AttributeError as error:
    from triton.runtime import driver
    print("raised", JITFunction.run.__name__, driver._active)
"""
    assert run(code, tmp_path) == "raised run None\n", "and all is as before"


def test_the_command(cache, tmp_path):
    main = "from proteinbert_fast.cli.main import main; sys.exit(main({!r}))"
    model = tmp_path / "model"
    run(f"ProteinBert(CONFIG).save_pretrained({str(model)!r})", cache)
    out = run(main.format(["compile-kernels", "--capability", "9.0", "--model", str(model)]), cache)
    assert out.startswith("14 kernels for compute capability 9.0 in bfloat16 are in the cache (")
    assert out.rstrip().endswith(str(cache))


def test_capabilities_are_pretended_for_a_while():
    before = is_compiling_ahead()
    with compiling_for(90):
        assert capability(0) == 90
        with compiling_for(80):
            assert capability(0) == 80
        assert is_compiling_ahead()
    assert is_compiling_ahead() == before
    assert torch.cuda.is_available() or not before
