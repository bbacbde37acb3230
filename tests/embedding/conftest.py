from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from proteinbert_fast import ProteinBert, ProteinBertConfig


@pytest.fixture(scope="session")
def model() -> ProteinBert:
    """Small, and the same in every session."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = ProteinBertConfig(n_annotations=50, d_local=32, d_global=64, n_blocks=3, n_heads=2, d_key=16)
        return ProteinBert(config).eval()


@pytest.fixture(scope="session")
def fasta() -> Path:
    """24 real proteins of 19 to 440 residues."""
    return Path(__file__).parents[1] / "data" / "proteins.fasta"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder in which no test leaves anything but what it made: no shards, no locks."""
    yield tmp_path
    left = {path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")}
    assert not left or (tmp_path / "keeps_partial").exists(), left
