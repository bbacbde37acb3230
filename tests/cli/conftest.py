from pathlib import Path

import pytest
import torch

from proteinbert_fast import ProteinBert, ProteinBertConfig

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def fasta() -> Path:
    """24 real proteins."""
    return DATA / "proteins.fasta"


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model on the disk."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = ProteinBertConfig(n_annotations=50, d_local=32, d_global=64, n_blocks=3, n_heads=2, d_key=16)
        model = ProteinBert(config)
    folder = tmp_path_factory.mktemp("weights")
    model.save_pretrained(folder)
    return folder
