"""End to end: a FASTA file to an HDF5 file of embeddings, beside the script that one writes first."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch

from proteinbert_fast.benchmark import machine
from proteinbert_fast.benchmark.cases import Case, Check, Ready
from proteinbert_fast.benchmark.competitors import PaddedProteinBert, padded_batches, run_padded
from proteinbert_fast.benchmark.setup import OURS, PLAIN, Setup, States
from proteinbert_fast.embedding import embed
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.tokenizer import END, OTHER, START, VOCABULARY

Per = Literal["protein", "residue"]
_NUMBER_OF = {letter: number for number, letter in enumerate(VOCABULARY)}


def cases(setup: Setup) -> list[Case]:
    """Ours and the script, per protein (global state) and per residue, stored as float16."""
    found = []
    for dtype in setup.settings.dtypes:
        for per in ("protein", "residue"):
            for name, owner, what in (
                ("ours", OURS, "proteinbert_fast.embed"),
                ("script", PLAIN, "Python loops, padded eager batches sorted by length, h5py"),
            ):
                found.append(
                    Case(
                        table=f"per {per}",
                        name=name,
                        what=what,
                        owner=owner,
                        ours=owner == OURS,
                        work=setup.work(range(len(setup.proteins)), dtype),
                        unit="residues/s",
                        prepare=lambda name=name, per=per, dtype=dtype: _prepare(setup, name, per, dtype),  # type: ignore[misc]
                        dtype=dtype,
                    )
                )
    return found + machine.probes(setup.settings, "matrix", "copy")


def _prepare(setup: Setup, name: str, per: Per, dtype: str) -> Ready[Path]:
    output = setup.folder / f"{name}-{per}-{dtype}.h5"
    note = "model in memory"
    if name == "ours":
        model = setup.ours(dtype)

        def run() -> Path:
            return embed_ours(model, setup.fasta, output, per)
    else:
        padded = setup.padded(dtype)
        choice = setup.fastest_eager(dtype)
        note += f"; {choice}"

        def run() -> Path:
            return embed_script(padded, setup.fasta, output, per, choice.batch_tokens)

    def check(path: Path) -> Check:
        return setup.check(stored_states(path, per), dtype, stored=True)

    return Ready(run, check, note)


def embed_ours(model: ProteinBert, fasta: Path, output: Path, per: Per) -> Path:
    """The package's own way, in the model's dtype."""
    dtype: Any = str(model.token_embedding.weight.dtype).removeprefix("torch.")
    embed(str(fasta), str(output), model=model, per=per, dtype=dtype, overwrite=True, progress=False)
    return output


def embed_script(model: PaddedProteinBert, fasta: Path, output: Path, per: Per, batch_tokens: int) -> Path:
    """The script that one writes first; the same file layout."""
    ids, sequences = [], []
    for line in fasta.read_text().splitlines():
        if line.startswith(">"):
            ids.append(line[1:].split()[0])
            sequences.append("")
        else:
            sequences[-1] += line.strip()
    tokens = [torch.tensor([START, *[_NUMBER_OF.get(c, OTHER) for c in s], END]) for s in sequences]
    results: list[Any] = [None] * len(ids)
    for batch in padded_batches(tokens, batch_tokens):
        ((_, (local, global_state)),) = run_padded(model, [batch])
        for k, i in enumerate(batch.numbers):
            states = global_state[k] if per == "protein" else local[k, 1 : len(tokens[i]) - 1]
            results[i] = states.to(torch.float16).numpy()
    with h5py.File(output, "w") as file:
        file["ids"] = ids
        file["lengths"] = np.array([len(s) for s in sequences])
        file["embeddings"] = np.stack(results) if per == "protein" else np.concatenate(results)
    return output


def stored_states(path: Path, per: Per) -> Iterator[States]:
    """What a file of either kind holds; ids are the proteins' numbers. START and END are not in it."""
    with h5py.File(path) as file:
        embeddings = torch.from_numpy(file["embeddings"][:])
        numbers = [int(name) for name in file["ids"].asstr()[:]]
        ends = np.cumsum(file["lengths"][:])
    for k, i in enumerate(numbers):
        if per == "protein":
            yield States(i, None, embeddings[k])
        else:
            residues = embeddings[ends[k - 1] if k else 0 : ends[k]]
            yield States(i, residues, None)
