"""The one set-up that tests, timing and the memory measurement share: proteins, weights, right answers."""

import copy
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from proteinbert_fast._version import __version__
from proteinbert_fast.benchmark import competitors, inputs
from proteinbert_fast.benchmark.cases import Check, Work, flops_per_token, state_bytes_per_token
from proteinbert_fast.benchmark.competitors import Choice, PaddedProteinBert
from proteinbert_fast.benchmark.settings import Settings
from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.data.fasta import FastaRecord
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.tokenizer import Tokenizer

OURS = f"proteinbert_fast {__version__}"
PLAIN = f"plain torch {torch.__version__}"

# Largest error of any state against the float64 reference. States after a norm are about 1 in size. float32 keeps 1e-5;
# in bfloat16 each of six blocks rounds weights and states to 8 bits. float16, and the operands of TF32 products, have
# three bits more: an eighth of that.
TOLERANCE = {"float32": 2e-4, "tf32": 0.25 / 8, "float16": 0.25 / 8, "bfloat16": 0.25}


class States(NamedTuple):
    """One protein's result.

    Attributes:
        number: of the protein.
        local: (length, D), or None where only the global state is kept.
        global_state: (G,), or None where only the local states are kept.
    """

    number: int
    local: Tensor | None
    global_state: Tensor | None


class Setup:
    """Everything that cases of a run have in common; each part is made when first needed.

    Args:
        settings: how much to do.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ours = cache(self._ours)
        self.padded = cache(self._padded)
        self.compiled = cache(self._compiled)
        self.fastest_eager = cache(self._fastest_eager)

    @cached_property
    def proteins(self) -> list[FastaRecord]:
        """The sample.

        Raises:
            InputError: the file cannot be used.
        """
        return inputs.sample(self.settings.proteins, self.settings.fasta)

    @cached_property
    def tokens(self) -> list[Tensor]:
        """uint8 (length,) of each protein."""
        tokenizer = Tokenizer()
        return [torch.from_numpy(tokenizer.tokenize(bytes(protein.sequence))) for protein in self.proteins]

    @cached_property
    def typical(self) -> int:
        """Number of the protein whose length is nearest to 350 residues."""
        return min(range(len(self.proteins)), key=lambda i: abs(len(self.proteins[i].sequence) - 350))

    @cached_property
    def folder(self) -> Path:
        """For files; removed with this object."""
        folder = tempfile.mkdtemp(prefix="proteinbert-fast-bench-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    @cached_property
    def fasta(self) -> Path:
        """The sample as a FASTA file. Ids are numbers: the user's own may repeat."""
        path = self.folder / "proteins.fasta"
        path.write_text("".join(f">{i}\n{p.sequence.decode()}\n" for i, p in enumerate(self.proteins)))
        return path

    @cached_property
    def typical_fasta(self) -> Path:
        """The typical protein alone, under its number in the sample."""
        path = self.folder / "typical.fasta"
        path.write_text(f">{self.typical}\n{self.proteins[self.typical].sequence.decode()}\n")
        return path

    @cached_property
    def model(self) -> ProteinBert:
        """Ours, float32."""
        return random_model(self.settings.config)

    def _ours(self, dtype: str) -> ProteinBert:
        """Ours in a dtype."""
        return copy.deepcopy(self.model).to(getattr(torch, dtype))

    def _padded(self, dtype: str, channels_last: bool = False) -> PaddedProteinBert:
        """The straightforward implementation in a dtype, with the same weights."""
        return PaddedProteinBert(self.ours(dtype), channels_last)

    def _compiled(self, dtype: str) -> tuple[PaddedProteinBert, float]:
        """The straightforward implementation in its faster layout under torch.compile; seconds of compiling.

        Raises:
            Unavailable: it cannot be compiled here.
        """
        layouts = {self.fastest_eager(dtype, last).seconds: last for last in (False, True)}
        model = PaddedProteinBert(self.ours(dtype), layouts[min(layouts)])
        sizes = {1, *self.settings.batch_tokens}
        shapes = [batch for size in sizes for batch in competitors.padded_batches(self.tokens, size)]
        return model, competitors.compile_blocks(model, shapes)

    def _fastest_eager(self, dtype: str, channels_last: bool = False) -> Choice:
        """The straightforward implementation's best batches."""
        model = self.padded(dtype, channels_last)
        return competitors.fastest_batches(model, self.tokens, self.settings.batch_tokens)

    @cached_property
    def answers(self) -> dict[int, States]:
        """States of a few proteins from the float64 reference: the longest, the shortest, the typical, and others."""
        order = sorted(range(len(self.proteins)), key=lambda i: len(self.proteins[i].sequence))
        n = min(self.settings.checked, len(order))
        spread = [order[i * (len(order) - 1) // max(n - 1, 1)] for i in range(n)]
        numbers = sorted({*spread, self.typical})
        reference = ProteinBert(self.settings.config, backend="reference").double().eval()
        reference.load_state_dict(self.model.state_dict())
        with torch.inference_mode():
            out = reference(Tokenizer()([self.proteins[i].sequence for i in numbers]))
        return {i: States(i, out.local[k], out.global_state[k]) for k, i in enumerate(numbers)}

    def check(
        self, states: Iterable[States], dtype: str, *, expected: int | None = None, stored: bool = False
    ) -> Check:
        """Compares results with the float64 reference.

        Args:
            states: results; those of proteins without a reference answer are passed over.
            dtype: they were computed in.
            expected: how many proteins must be there; all that have an answer when None.
            stored: results are from a file: local states without START and END, everything rounded to float16.
        """
        limit, error, seen = TOLERANCE[dtype], 0.0, 0
        for result in states:
            answer = self.answers.get(result.number)
            if answer is None:
                continue
            seen += 1
            assert answer.local is not None
            local = answer.local[1:-1] if stored else answer.local
            for right, got in ((local, result.local), (answer.global_state, result.global_state)):
                if right is None or got is None:
                    continue
                if got.shape != right.shape:
                    return Check(False, f"shape {tuple(got.shape)} where {tuple(right.shape)} is right")
                rounding = right.abs() * 2**-11 if stored else 0.0
                difference = float(((got.double() - right).abs() - rounding).max())
                # max() would drop a NaN.
                error = difference if not difference <= error else error
        if seen != (len(self.answers) if expected is None else expected):
            return Check(False, f"results for {seen} of {len(self.answers)} proteins")
        return Check(error <= limit, f"largest error {error:.1e}, allowed {limit:.2g}")

    def work(self, numbers: Iterable[int], dtype: str) -> Work:
        """Of a forward pass over some proteins; real tokens only, whatever an implementation pads."""
        lengths = [len(self.proteins[i].sequence) for i in numbers]
        tokens = sum(lengths) + 2 * len(lengths)
        itemsize = getattr(torch, dtype).itemsize
        return Work(
            proteins=len(lengths),
            residues=sum(lengths),
            tokens=tokens,
            flops=tokens * flops_per_token(self.settings.config),
            bytes=tokens * state_bytes_per_token(self.settings.config, itemsize),
        )


def random_model(config: ProteinBertConfig) -> ProteinBert:
    """Random weights, always the same; biases and norms too, so that a check sees whether they are used."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = ProteinBert(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
