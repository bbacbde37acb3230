"""The proteins that come with the package, and the user's own."""

from pathlib import Path

import pytest

from proteinbert_fast.benchmark import inputs
from proteinbert_fast.errors import InputError
from proteinbert_fast.tokenizer import VOCABULARY


def test_real_proteins_come_with_the_package():
    proteins = inputs.sample(1000)
    lengths = [len(p.sequence) for p in proteins]
    assert len(proteins) == len({p.id for p in proteins}) == 400
    assert 330 < sum(lengths) / len(lengths) < 380
    assert max(lengths) > 1400
    assert set(b"".join(p.sequence for p in proteins).decode()) <= set(VOCABULARY + "BZX")


def test_a_sample_is_always_the_same():
    first, again = inputs.sample(20), inputs.sample(20)
    assert [p.id for p in first] == [p.id for p in again]


def test_a_sample_of_the_users_own(tmp_path: Path):
    path = tmp_path / "mine.fasta"
    path.write_text("".join(f">p{i}\n{'MKV' * (i + 1)}\n" for i in range(30)))
    assert len(inputs.sample(100, str(path))) == 30
    chosen = inputs.sample(10, str(path))
    assert len({p.id for p in chosen}) == 10


def test_a_bad_file_is_named(tmp_path: Path):
    (tmp_path / "bad.fasta").write_text("MKV\n")
    with pytest.raises(InputError, match=r"bad\.fasta"):
        inputs.sample(3, str(tmp_path / "bad.fasta"))


@pytest.mark.parametrize("n", [1, 34_350, 100_000])
def test_long_proteins_are_titin(n: int):
    sequence = inputs.of_length(n)
    assert len(sequence) == n
    assert sequence.startswith(b"MTTQAPTFTQPLQSVVVLEGSTATFEAHISGFPVPEVSWFRDGQVI"[:n])
