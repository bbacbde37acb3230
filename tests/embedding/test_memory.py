"""Memory grows with the longest protein alone, and in a straight line."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from proteinbert_fast import ProteinBert, ProteinBertConfig, embed

# Blocks run one after another in the same memory, so one block of the published sizes shows what six need.
PEAKS = """
import resource, sys, torch
from proteinbert_fast import ProteinBert, ProteinBertConfig, embed

per, folder = sys.argv[1:]
model = ProteinBert(ProteinBertConfig(n_blocks=1))


def peak(*proteins):
    with open(f"{folder}/in.fasta", "w") as file:
        for i, (residues, copies) in enumerate(proteins):
            file.writelines(f">{i}_{copy}\\n{'MKTAYIAKQR' * (residues // 10)}\\n" for copy in range(copies))
    embed(f"{folder}/in.fasta", f"{folder}/out.h5", model=model, per=per, overwrite=True)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


print(peak((1000, 10)), peak((30_000, 1)), peak((80_000, 1)), peak((180_000, 1)), peak((300, 1200)))
"""


@pytest.mark.parametrize("per", ["protein", "residue"])
def test_peak_memory_per_residue(tmp_path: Path, per: str) -> None:
    command = [sys.executable, "-c", PEAKS, per, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.stderr == ""
    base, *peaks, corpus = [int(word) for word in done.stdout.split()]
    # A line: the same slope over the first and the last stretch, and below 2.5 KB of float32 per residue.
    slopes = [(peaks[1] - peaks[0]) / 50_000, (peaks[2] - peaks[1]) / 100_000]
    assert max(slopes) < 2500, (base, peaks)
    assert abs(slopes[1] - slopes[0]) < 300, (base, peaks)
    # Twice as many residues in short proteins need no more.
    assert corpus == peaks[2]


def test_titin_and_a_million_residues(tmp_path: Path) -> None:
    model = ProteinBert(ProteinBertConfig(n_annotations=9, d_local=32, d_global=64, n_blocks=1, n_heads=2, d_key=16))
    lengths = [34_350, 12, 1_000_000, 77]
    proteins = {str(n): ("MKTAYIAKQRWYVFDE" * (n // 16 + 1))[:n] for n in lengths}
    summary = embed(proteins, tmp_path / "out.h5", model=model, per="residue")
    assert summary.shape == (sum(lengths), 32)
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["lengths"][:].tolist() == lengths
        first = file["offsets"][2]
        alone = embed([proteins["1000000"]], model=model, per="residue")
        assert np.array_equal(file["embeddings"][first : first + 1_000_000], alone.embeddings)
