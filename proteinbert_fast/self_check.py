"""A short check of the GPU kernels on the device at hand, before ``backend="auto"`` relies on them.

Compilers and drivers differ from machine to machine. The first forward pass of a kind on a GPU runs a small model of
the same sizes, in the same dtype, against the plain definition in float64. Its kernels are compiled for the passes
that follow too, so that little time is lost.
"""

import random
import warnings
from dataclasses import replace
from typing import NamedTuple

import torch

from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.errors import ProteinBertError
from proteinbert_fast.ops.backends import Backend
from proteinbert_fast.tokenizer import Tokenizer

# Largest error of any state against the float64 definition; states after a norm are about 1 in size.
TOLERANCES = {torch.float32: 2e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
TF32_TOLERANCE = 0.05
LENGTHS = (1, 7, 131, 700, 40)


class Kind(NamedTuple):
    """What a check holds for."""

    device: torch.device
    config: ProteinBertConfig
    dtype: torch.dtype
    is_exact: bool  # products of float32 states are not rounded to TF32


_complaints: dict[Kind, str | None] = {}


def complaint(device: torch.device, config: ProteinBertConfig, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels here, or None; checked the first time, and said in a warning then.

    Nothing is checked while torch.compile traces or a CUDA graph is captured: then the kernels count as good.

    Args:
        device: where they run.
        config: sizes of the model.
        dtype: the dtype computed in.
    """
    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    kind = Kind(device, config, dtype, torch.get_float32_matmul_precision() == "highest")
    if kind not in _complaints:
        _complaints[kind] = found = _check(kind)
        if found:
            warnings.warn(
                f"proteinbert-fast: the Triton kernels fail their self-check on {device}: {found}; the plain "
                f"operations run instead, slower. Please report this with the output of 'proteinbert-fast doctor'.",
                RuntimeWarning,
                stacklevel=3,
            )
    return _complaints[kind]


def _check(kind: Kind) -> str | None:
    try:
        error = difference(kind.device, kind.config, kind.dtype)
    except Exception as failure:  # whatever the compiler or the driver raises
        if isinstance(failure, torch.cuda.OutOfMemoryError):
            raise
        return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    limit = TOLERANCES[kind.dtype] if kind.is_exact or kind.dtype != torch.float32 else TF32_TOLERANCE
    # A NaN is not below anything.
    return None if error <= limit else f"results are off by {error:.1e}, allowed {limit:g}"


def difference(
    device: torch.device, config: ProteinBertConfig, dtype: torch.dtype, backend: Backend = "triton"
) -> float:
    """Largest difference of any state between a back end and the float64 definition, on proteins of odd lengths.

    Args:
        device: where both run.
        config: sizes; two blocks and few annotations are enough.
        dtype: the back end's.
        backend: the one checked.

    Raises:
        ProteinBertError: a protein has other numbers alone than in a batch.
    """
    from proteinbert_fast.model import ProteinBert

    config = replace(config, n_blocks=min(config.n_blocks, 2), n_annotations=min(config.n_annotations, 64))
    generator = random.Random(0)
    sequences = ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=n)) for n in LENGTHS]
    # Drawn on the CPU, so that neither the weights nor a GPU's generator depend on the device.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        plain = ProteinBert(config, backend="reference")
    model = ProteinBert(config, backend=backend)
    model.load_state_dict(plain.state_dict())
    batch = Tokenizer(gap=max(config.reach, 20))(sequences).to(device)
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        model = model.to(device, dtype).eval()
        right = plain.to(device, dtype).double().eval()(batch)
        found = model(batch)
        errors = [
            (ours.double() - exact).abs().max()
            for ours, exact in (
                (found.local_rows, right.local_rows),
                (found.global_state, right.global_state),
                (found.go_probabilities, right.go_probabilities),
                (found.residue_mean(), right.residue_mean()),
            )
        ]
        alone = model(batch[2])
        if not torch.equal(alone.local[0], found.local[2]) or not torch.equal(
            alone.global_state[0], found.global_state[2]
        ):
            raise ProteinBertError("a protein has other numbers alone than in a batch")
    # stack().max() keeps a NaN.
    return float(torch.stack(errors).max())
