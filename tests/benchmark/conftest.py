"""A set-up of sizes that run in milliseconds."""

import pytest

from proteinbert_fast import ProteinBertConfig
from proteinbert_fast.benchmark.settings import Settings
from proteinbert_fast.benchmark.setup import Setup

TINY = Settings(
    rounds=2,
    proteins=5,
    config=ProteinBertConfig(n_annotations=30, d_local=32, d_global=64, n_blocks=2, n_heads=4, d_key=16),
    checked=3,
    batch_tokens=(1, 1024),
    compile=False,
    tokenizer_bytes=20_000,
    memory_lengths=(200, 400),
    corpus_entries=60,
    matrix_sizes=(64,),
    copied_bytes=10_000,
    rate_seconds=0.05,
)


@pytest.fixture(scope="session")
def setup() -> Setup:
    return Setup(TINY)
