"""`embed` gives what the model gives, in input order, whatever the batches, the layout or the way in."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from proteinbert_fast import ProteinBert, Tokenizer, embed
from proteinbert_fast.data.fasta import FastaRecord, read_fasta
from proteinbert_fast.embedding import Embeddings, pipeline
from proteinbert_fast.errors import InputError, ProteinBertError
from proteinbert_fast.outputs import ProteinBertOutput


@pytest.fixture(scope="session")
def alone(model: ProteinBert, fasta: Path) -> dict[str, ProteinBertOutput]:
    """What the model says of each protein by itself."""
    with torch.inference_mode():
        return {record.id: model(Tokenizer()([record.sequence]), hidden_states=True) for record in read_fasta(fasta)}


def globals_of(out: ProteinBertOutput, blocks: Iterable[int]) -> torch.Tensor:
    assert out.hidden_global is not None
    return torch.cat([out.hidden_global[2 * b][0] for b in blocks])


def means_of(out: ProteinBertOutput, blocks: Iterable[int]) -> torch.Tensor:
    assert out.hidden_local is not None
    return torch.cat([out.residue_mean(out.hidden_local[2 * b - 1])[0] for b in blocks])


def residues_of(out: ProteinBertOutput, blocks: Iterable[int]) -> torch.Tensor:
    assert out.hidden_local is not None
    layers = [out.hidden_local[2 * b - 1] for b in blocks]
    return torch.cat([out.batch.unpack(layer)[0][1:-1] for layer in layers], dim=-1)


PER_PROTEIN = {
    ("global", "last"): lambda out: out.global_state[0],
    ("global", "all"): lambda out: globals_of(out, (1, 2, 3)),
    ("global", (3, 1)): lambda out: globals_of(out, (3, 1)),
    ("global", "original"): lambda out: out.original_global()[0],
    ("mean", "last"): lambda out: out.residue_mean()[0],
    ("mean", "all"): lambda out: means_of(out, (1, 2, 3)),
    ("mean", "original"): lambda out: out.original_local(0)[1:-1].mean(0),
    ("both", "last"): lambda out: torch.cat([out.global_state[0], out.residue_mean()[0]]),
    ("both", (2,)): lambda out: torch.cat([globals_of(out, [2]), means_of(out, [2])]),
}
PER_RESIDUE = {
    "last": lambda out: out.residues(0),
    "all": lambda out: residues_of(out, (1, 2, 3)),
    (2,): lambda out: residues_of(out, [2]),
    "original": lambda out: out.original_local(0)[1:-1],
}


@pytest.mark.parametrize("storage", ["float16", "float32"])
@pytest.mark.parametrize(("pooling", "layers"), PER_PROTEIN)
def test_per_protein(
    model: ProteinBert, fasta: Path, alone: dict[str, Any], pooling: Any, layers: Any, storage: Any
) -> None:
    result = embed(fasta, model=model, pooling=pooling, layers=layers, storage_dtype=storage, tokens_per_batch=2000)
    records = list(read_fasta(fasta))
    assert result.ids == [record.id for record in records]
    assert result.lengths.tolist() == [len(record.sequence) for record in records]
    assert result.embeddings.dtype == storage
    with torch.inference_mode():
        expected = torch.stack([PER_PROTEIN[pooling, layers](alone[record.id]) for record in records])
    found = torch.from_numpy(result.embeddings)
    if (pooling, layers) == ("mean", "original"):
        torch.testing.assert_close(found, expected.to(found.dtype), atol=2e-3, rtol=2e-3)  # two ways to take a mean
    else:
        assert torch.equal(found, expected.to(found.dtype))


@pytest.mark.parametrize("storage", ["float16", "float32"])
@pytest.mark.parametrize("layers", PER_RESIDUE)
def test_per_residue(model: ProteinBert, fasta: Path, alone: dict[str, Any], layers: Any, storage: Any) -> None:
    result = embed(fasta, model=model, per="residue", layers=layers, storage_dtype=storage, tokens_per_batch=2000)
    assert result.offsets is not None
    assert result.offsets.tolist() == [0, *np.cumsum(result.lengths)]
    for i, record in enumerate(read_fasta(fasta)):
        with torch.inference_mode():
            expected = PER_RESIDUE[layers](alone[record.id])
        assert np.array_equal(result[i], expected.to(getattr(torch, storage)).numpy())
        assert np.array_equal(result[record.id], result[i])


@pytest.mark.slow
@pytest.mark.parametrize("per", ["protein", "residue"])
@pytest.mark.parametrize("tokens_per_batch", [1, 60, 1000, 100_000])
def test_same_bits_for_every_batch_size_and_order(
    model: ProteinBert, fasta: Path, per: Any, tokens_per_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = embed(fasta, model=model, per=per, pooling=None if per == "residue" else "both")
    monkeypatch.setattr(pipeline, "_BATCHES_PER_WINDOW", 2)
    monkeypatch.setattr(pipeline, "_PIECE_ROWS", 101)
    backwards = list(read_fasta(fasta))[::-1]
    found = embed(
        backwards,
        model=model,
        per=per,
        pooling=None if per == "residue" else "both",
        tokens_per_batch=tokens_per_batch,
    )
    for name in expected.ids:
        assert np.array_equal(found[name], expected[name])


def test_columns_say_what_is_where(model: ProteinBert, fasta: Path) -> None:
    both = embed(fasta, model=model, pooling="both", layers=[1, 3])
    columns = {name: slice(first, stop) for name, first, stop in json.loads(both.attributes["columns"])}
    last_mean = embed(fasta, model=model, pooling="mean")
    assert np.array_equal(both.embeddings[:, columns["mean of residues, block 3"]], last_mean.embeddings)
    for kind in ({}, {"pooling": "mean"}, {"per": "residue"}):
        everything = embed([b"MKT"], model=model, layers="original", **kind)  # type: ignore[call-overload]
        assert json.loads(everything.attributes["columns"])[-1][2] == everything.embeddings.shape[1]


def test_published_widths() -> None:
    published = ProteinBert()
    assert embed(["MKTAY"], model=published, layers="original").embeddings.shape == (1, 15_599)
    assert embed(["MKTAY"], model=published, layers="original", per="residue").embeddings.shape == (5, 1562)
    assert embed(["MKTAY"], model=published).embeddings.shape == (1, 512)


def test_every_way_to_give_sequences(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    expected = embed(fasta, model=model)
    records = list(read_fasta(fasta))
    texts = {record.id: record.sequence.decode() for record in records}
    half = tmp_path / "half.fasta"
    half.write_bytes(b"".join(b">%s\n%s\n" % (r.id.encode(), r.sequence) for r in records[:10]))
    rest = tmp_path / "rest.fasta"
    rest.write_bytes(b"".join(b">%s\n%s\n" % (r.id.encode(), r.sequence) for r in records[10:]))
    for sequences in (str(fasta), [fasta], [half, rest], records, iter(records), texts):
        found = embed(sequences, model=model)
        assert found.ids == expected.ids
        assert np.array_equal(found.embeddings, expected.embeddings)
    bare: list[Any] = [r.sequence for r in records]
    bare[1], bare[2] = bytearray(bare[1]), np.frombuffer(bare[2], np.uint8)
    bare[3], bare[4] = memoryview(bare[3]), bare[4].decode()
    found = embed(bare, model=model)
    assert found.ids == [str(i) for i in range(len(records))]
    assert np.array_equal(found.embeddings, expected.embeddings)


def test_sequences_of_python_are_taken_literally(model: ProteinBert) -> None:
    found = embed(["MKT*", "mKT", "MÄT", "MßT"], model=model, per="residue")
    assert found.lengths.tolist() == [4, 3, 3, 3]
    upper = embed(["mkt", "mßt"], model=model, per="residue", lowercase="upper")
    assert np.array_equal(upper[0], embed(["MKT"], model=model, per="residue")[0])
    assert np.array_equal(upper[1], embed(["MßT"], model=model, per="residue")[0])


def test_duplicates_of_python(model: ProteinBert) -> None:
    records = [FastaRecord("A", "", b"MKT", "", 1), FastaRecord("A", "", b"MKTA", "", 2)]
    with pytest.raises(InputError, match=r"sequence 1 \(A\): the id A was already used"):
        embed(records, model=model)
    assert embed(records, model=model, duplicates="first").lengths.tolist() == [3]
    assert embed(records, model=model, duplicates="keep").lengths.tolist() == [3, 4]


def test_results_by_number_and_id(model: ProteinBert) -> None:
    records = [FastaRecord("A", "", b"MKT", "", 1), FastaRecord("A", "", b"MKTA", "", 2)]
    found = embed(records, model=model, duplicates="keep")
    assert isinstance(found, Embeddings)
    assert len(found) == 2
    assert np.array_equal(found["A"], found[0])
    assert np.array_equal(found[-1], found[1])
    with pytest.raises(IndexError):
        found[2]
    with pytest.raises(KeyError):
        found["B"]


@pytest.mark.parametrize(
    ("sequences", "says"),
    [
        ([], "no sequence given"),
        (["MKT", ""], "sequence 1: the sequence is empty"),
        ([b"MK\xff"], "sequence 0: is not UTF-8 text"),
        (["MK\ud800"], "sequence 0: a character that is not Unicode text"),
        ({"a\nb": "MKT"}, r"'a\\nb' cannot be an id"),
        ("MKTAYIAKQR", "MKTAYIAKQR: no such file or directory; to embed a sequence, give a list"),
        ("none.fasta", "none.fasta: no such file or directory$"),
        ([Path("none.fasta")], "none.fasta: no such file"),
        (["MKT", Path("none.fasta")], "sequence 1: is a path; give a path, or a list of nothing but paths"),
    ],
)
def test_refused_sequences(model: ProteinBert, sequences: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        embed(sequences, model=model)


@pytest.mark.parametrize("sequences", [b"MKT", 7, [7], ["MKT", None], [np.zeros(3)]])
def test_what_is_no_sequence_is_a_type_error(model: ProteinBert, sequences: Any) -> None:
    with pytest.raises(TypeError):
        embed(sequences, model=model)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"per": "atom"}, "per must be one of protein, residue, got 'atom'"),
        ({"pooling": "max"}, "pooling must be one of global, mean, both"),
        ({"per": "residue", "pooling": "mean"}, "is for embeddings per protein"),
        ({"layers": "first"}, "layers must be one of last, all, original"),
        ({"layers": [0]}, "there is no block 0; this model has blocks 1 to 3"),
        ({"layers": [4]}, "there is no block 4"),
        ({"layers": [1, 1]}, "a block is named twice"),
        ({"layers": []}, "no block number"),
        ({"dtype": "float16"}, "dtype must be one of auto, float32, bfloat16"),
        ({"storage_dtype": "bfloat16"}, "storage_dtype must be one of float16, float32"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be a positive integer, got 0"),
        ({"max_length": -1}, "max_length must be a positive integer"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"device": "meta"}, "only cpu and cuda are supported"),
        ({"device": "cuda:99"}, "there is no such GPU here"),
        ({"lowercase": "lower"}, "lowercase must be one of other, upper"),
        ({"duplicates": "last"}, "duplicates must be one of refuse, keep, first"),
        ({"resume": True}, "are for an output file"),
        ({"layout": "uniprot"}, "are for an output file"),
    ],
)
def test_refused_options(model: ProteinBert, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        embed(["MKT"], model=model, **options)


def test_bfloat16_is_near(model: ProteinBert, fasta: Path) -> None:
    exact = embed(fasta, model=model, pooling="both", storage_dtype="float32")
    near = embed(fasta, model=model, pooling="both", storage_dtype="float32", dtype="bfloat16")
    assert near.attributes["dtype"] == "bfloat16"
    assert 0 < np.abs(near.embeddings - exact.embeddings).max() < 0.15


def test_model_of_another_dtype(fasta: Path) -> None:
    double = ProteinBert().double()
    assert embed(["MKT"], model=double).attributes["dtype"] == "float64"
    with pytest.raises(InputError, match=r"the model's weights are torch.float64"):
        embed(["MKT"], model=double, dtype="float32")


def test_outer_autocast_and_grad_mode_do_not_matter(model: ProteinBert) -> None:
    expected = embed(["MKTAY"], model=model, layers="original", storage_dtype="float32")
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        found = embed(["MKTAY"], model=model, layers="original", storage_dtype="float32")
        assert torch.is_grad_enabled()
    assert np.array_equal(found.embeddings, expected.embeddings)


@pytest.mark.parametrize("per", ["protein", "residue"])
def test_max_length_cuts_and_says_so(
    model: ProteinBert, fasta: Path, per: Any, caplog: pytest.LogCaptureFixture
) -> None:
    records = list(read_fasta(fasta))
    found = embed(fasta, model=model, per=per, max_length=100)
    cut = {record.id: record.sequence[:100] for record in records}
    expected = embed(cut, model=model, per=per)
    assert np.array_equal(found.embeddings, expected.embeddings)
    assert found.lengths.tolist() == [len(sequence) for sequence in cut.values()]
    long = [record for record in records if len(record.sequence) > 100]
    assert found.attributes["n_truncated"] == len(long) > 3
    said = [message for message in caplog.messages if "cut to" in message]
    assert said == [f"{r.place}: {len(r.sequence):,} residues, cut to the first 100" for r in long]


def test_max_length_counts_characters_not_bytes(model: ProteinBert) -> None:
    found = embed(["MÄTÄ"], model=model, per="residue", max_length=3)
    assert np.array_equal(found.embeddings, embed(["MÄT"], model=model, per="residue").embeddings)


def scaled(model: ProteinBert, factor: float) -> ProteinBert:
    """A model whose last states are ``factor`` times as large."""
    copy = ProteinBert(model.config).eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for norm in (copy.blocks[-1].local_norm2, copy.blocks[-1].global_norm2):
            norm.weight.mul_(factor)
    return copy


@pytest.mark.parametrize("per", ["protein", "residue"])
@pytest.mark.parametrize("piece", [1 << 16, 7])
def test_float16_overflow_is_said(
    model: ProteinBert, per: Any, piece: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_PIECE_ROWS", piece)
    large = scaled(model, 1e5)
    for proteins in (["MKTAY", "ACD"], ["MKTAYIAKQR"]):
        caplog.clear()
        found = embed(proteins, model=large, per=per)
        assert np.isinf(found.embeddings).any()
        said = [message for message in caplog.messages if "float16 stores as infinite" in message]
        assert len(said) == len(proteins)
        assert said[0].startswith("sequence 0: has values over 65,504")
        exact = embed(proteins, model=large, per=per, storage_dtype="float32")
        assert np.isfinite(exact.embeddings).all()


@pytest.mark.parametrize("per", ["protein", "residue"])
@pytest.mark.parametrize("proteins", [["MKTAY"], ["MKTAY", "ACD"]])
def test_output_that_is_not_finite_is_an_error(model: ProteinBert, per: Any, proteins: list[str]) -> None:
    for factor in (float("nan"), float("inf")):
        broken = scaled(model, factor)
        with pytest.raises(ProteinBertError, match="sequence 0: the model's output is not finite"):
            embed(proteins, model=broken, per=per, storage_dtype="float32")


def test_notes_are_said_once(model: ProteinBert, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "in.fasta"
    path.write_bytes(b">A\nmkt\n>B\nMKT*\n>C\nmktA\n")
    embed(path, model=model)
    assert sum("lower-case" in message for message in caplog.messages) == 1
    assert sum("stop codon" in message for message in caplog.messages) == 1


def test_an_error_in_the_background_ends_the_run(
    model: ProteinBert, fasta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise InputError("the tokenizer says no")

    monkeypatch.setattr(pipeline, "_window", broken)
    with pytest.raises(InputError, match="the tokenizer says no"):
        embed(fasta, model=model)


def test_out_of_memory_is_one_clear_line(
    model: ProteinBert, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ProteinBert, "forward", full)
    with pytest.raises(ProteinBertError, match=r"of 11 tokens, 0 the first: use fewer tokens per batch \(now 99\)"):
        embed(["MKTA", "ACD"], model=model, tokens_per_batch=99)
    with pytest.raises(ProteinBertError, match="1 proteins of 6 tokens, 0 the first: cut it with a max length"):
        embed(["MKTA"], model=model)


def test_progress_goes_to_stderr_when_asked(
    model: ProteinBert, fasta: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(fasta, model=model)
    assert capsys.readouterr() == ("", "")
    embed(fasta, model=model, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "residues/s" in err


def test_an_hdf5_file_says_how_it_was_made(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    summary = embed(fasta, path, model=model, pooling="both")
    with h5py.File(path) as file:
        attributes = dict(file.attrs)
    assert attributes["schema_version"] == 1
    assert attributes["pooling"] == "both"
    assert attributes["layers"] == "[3]"
    assert attributes["dtype"] == "float32"
    assert attributes["storage_dtype"] == "float16"
    assert not attributes["pretrained"]
    assert "no checkpoint" in attributes["warning"]
    assert len(attributes["weights_sha256"]) == 64
    assert json.loads(attributes["run"])["input"][0]["name"] == "proteins.fasta"
    assert "24 x 96 float16" in str(summary)
    assert logging.getLogger("proteinbert_fast").level == logging.NOTSET
