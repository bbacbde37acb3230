"""Real proteins to measure with: those that come with the package, or a sample of the user's own."""

import random
from importlib.resources import as_file, files

from proteinbert_fast.data.fasta import FastaRecord, read_fasta

PROTEINS = "swissprot_400.fasta.gz"
TITIN = "titin.fasta.gz"


def sample(n: int, fasta: str | None = None) -> list[FastaRecord]:
    """At most ``n`` proteins in random order, always the same.

    Args:
        n: how many.
        fasta: file to draw them from; the 400 that come with the package when None.

    Raises:
        InputError: the file cannot be used.
    """
    records = _bundled(PROTEINS) if fasta is None else list(read_fasta(fasta))
    return random.Random(0).sample(records, min(n, len(records)))


def of_length(n: int) -> bytes:
    """A protein of ``n`` residues: human titin (34,350), repeated or cut."""
    (titin,) = _bundled(TITIN)
    return (titin.sequence * (n // len(titin.sequence) + 1))[:n]


def _bundled(name: str) -> list[FastaRecord]:
    with as_file(files(__package__) / "data" / name) as path:
        return list(read_fasta(path))
