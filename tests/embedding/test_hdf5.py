"""The HDF5 file: both layouts, what is refused, the same bytes every time, and disks that cannot be written
to.
"""

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from proteinbert_fast import ProteinBert, embed
from proteinbert_fast.data.fasta import read_fasta
from proteinbert_fast.embedding import EmbedSummary, hdf5, partial, pipeline, sources
from proteinbert_fast.errors import InputError, ProteinBertError

PER = ["protein", "residue"]
LAYOUTS = ["flat", "uniprot"]


def write_fasta(path: Path, *records: tuple[str, str]) -> Path:
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records), encoding="utf-8")
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def many_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of a few proteins, and a shard for each."""
    monkeypatch.setattr(partial, "SHARD_SECONDS", 0.0)
    monkeypatch.setattr(pipeline, "_BATCHES_PER_WINDOW", 1)


@pytest.mark.parametrize("per", PER)
def test_flat_layout(model: ProteinBert, fasta: Path, tmp_path: Path, per: Any) -> None:
    expected = embed(fasta, model=model, per=per)
    summary = embed(fasta, tmp_path / "out.h5", model=model, per=per)
    assert isinstance(summary, EmbedSummary)
    with h5py.File(tmp_path / "out.h5") as file:
        assert set(file) == {"ids", "lengths", "embeddings"} | ({"offsets"} if per == "residue" else set())
        assert list(file["ids"].asstr()) == expected.ids
        assert file["lengths"].dtype == np.int64
        assert file["lengths"][:].tolist() == expected.lengths.tolist()
        assert file["embeddings"].dtype == np.float16
        assert np.array_equal(file["embeddings"][:], expected.embeddings)
        assert file["embeddings"].shape == summary.shape
        if expected.offsets is not None:
            assert file["offsets"][:].tolist() == expected.offsets.tolist()
    assert os.listdir(tmp_path) == ["out.h5"]
    assert summary.bytes == (tmp_path / "out.h5").stat().st_size
    assert (summary.records, summary.residues) == (24, int(expected.lengths.sum()))


@pytest.mark.parametrize("per", PER)
def test_uniprot_layout(model: ProteinBert, tmp_path: Path, per: Any) -> None:
    fasta = write_fasta(
        tmp_path / "in.fasta",
        ("sp|P12345|AATM_RABIT", "MKTAY"),
        ("tr|A0A022YWF9-2|A0A022YWF9_9MICO", "ACD"),
        ("UniRef50_Q9Y6K9", "MKTAYIAKQR"),
        ("蛋白", "MK"),
    )
    expected = embed(fasta, model=model, per=per)
    embed(fasta, tmp_path / "out.h5", model=model, per=per, layout="uniprot", max_length=8)
    names = ["P12345", "A0A022YWF9-2", "UniRef50_Q9Y6K9", "蛋白"]
    with h5py.File(tmp_path / "out.h5") as file:
        assert set(file) == set(names)
        for i in (0, 1, 3):
            assert np.array_equal(file[names[i]][:], expected[i])
        assert file["P12345"].dtype == np.float16
        assert file["UniRef50_Q9Y6K9"].attrs["full_length"] == 10
        assert "full_length" not in file["P12345"].attrs
        assert file.attrs["layout"] == "uniprot"


def test_uniprot_layout_refuses_names_that_hdf5_cannot_hold(model: ProteinBert, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", ("A", "MKT"), ("PF0001/1-20", "MKT"))
    with pytest.raises(InputError) as error:
        embed(fasta, tmp_path / "out.h5", model=model, layout="uniprot")
    assert str(error.value) == (
        f"{fasta}:3: record PF0001/1-20: the uniprot layout names datasets by id, and HDF5 takes '/' for a folder: "
        "use layout flat"
    )
    assert os.listdir(tmp_path) == ["in.fasta"]
    embed(fasta, tmp_path / "out.h5", model=model)
    with h5py.File(tmp_path / "out.h5") as file:
        assert list(file["ids"].asstr()) == ["A", "PF0001/1-20"]


def test_uniprot_layout_compares_accessions(model: ProteinBert, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", ("sp|P12345|A", "MKT"), ("tr|P12345|B", "MKTA"))
    with pytest.raises(InputError, match=r"P12345 was already used at .*in\.fasta:1"):
        embed(fasta, tmp_path / "out.h5", model=model, layout="uniprot")
    summary = embed(fasta, tmp_path / "out.h5", model=model, layout="uniprot", duplicates="first")
    assert (summary.records, summary.dropped) == (1, 1)
    with pytest.raises(InputError, match="the uniprot layout cannot keep duplicates"):
        embed(fasta, tmp_path / "other.h5", model=model, layout="uniprot", duplicates="keep")


def test_duplicates_and_odd_ids_in_the_flat_layout(model: ProteinBert, tmp_path: Path) -> None:
    names = ["A/B", "protéine", "A", "A"]
    fasta = write_fasta(tmp_path / "in.fasta", *((name, "MKT" + "A" * i) for i, name in enumerate(names)))
    with pytest.raises(InputError, match="record A: A was already used"):
        embed(fasta, tmp_path / "out.h5", model=model)
    summary = embed(fasta, tmp_path / "out.h5", model=model, duplicates="keep")
    with h5py.File(tmp_path / "out.h5") as file:
        assert list(file["ids"].asstr()) == names
    assert summary.dropped == 0
    first = embed(fasta, tmp_path / "first.h5", model=model, duplicates="first")
    assert (first.records, first.dropped) == (3, 1)
    assert "1 proteins whose id came before" in str(first)


def test_full_lengths_of_what_was_cut(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    summary = embed(fasta, tmp_path / "out.h5", model=model, max_length=100)
    full = [len(record.sequence) for record in read_fasta(fasta)]
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["full_lengths"][:].tolist() == full
        assert file["lengths"][:].tolist() == [min(n, 100) for n in full]
        assert file.attrs["n_truncated"] == summary.truncated == sum(n > 100 for n in full)
        assert file.attrs["max_length"] == 100


@pytest.mark.usefixtures("many_shards")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per", PER)
def test_the_same_bytes_whatever_the_shards(
    model: ProteinBert, fasta: Path, tmp_path: Path, per: Any, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5, "_IDS", 5)
    for name, tokens in (("a.h5", 500), ("b.h5", 2000), ("c.h5", 100_000)):
        embed(fasta, tmp_path / name, model=model, per=per, layout=layout, tokens_per_batch=tokens)
    assert digest(tmp_path / "a.h5") == digest(tmp_path / "b.h5") == digest(tmp_path / "c.h5")


def test_existing_output_is_refused(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    output.write_text("something dear")
    with pytest.raises(InputError, match=r"out\.h5: exists; replace it with --overwrite"):
        embed(fasta, output, model=model)
    with pytest.raises(InputError, match="cannot resume: it is no embeddings file of this version"):
        embed(fasta, output, model=model, resume=True)
    with pytest.raises(InputError, match="resume and overwrite exclude each other"):
        embed(fasta, output, model=model, resume=True, overwrite=True)
    with pytest.raises(InputError, match="no such file"):
        embed(tmp_path / "none.fasta", output, model=model, overwrite=True)
    assert output.read_text() == "something dear"
    assert os.listdir(tmp_path) == ["out.h5"]
    embed(fasta, output, model=model, overwrite=True)
    assert h5py.is_hdf5(output)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none/out.h5", "there is no folder .*none"),
        (".", "is a directory; name a file in it"),
        ("/dev/full", "is not a regular file"),
    ],
)
def test_outputs_that_cannot_be(model: ProteinBert, fasta: Path, tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        embed(fasta, tmp_path / name, model=model, overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ProteinBertError, match=r"out\.h5: cannot be written: Permission denied"):
        embed(fasta, tmp_path / "out.h5", model=model)


def test_folder_that_is_read_only(
    model: ProteinBert, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(ProteinBertError) as error:
        embed(fasta, tmp_path / "out.h5", model=model)
    assert str(error.value) == f"{tmp_path}/out.h5: cannot be written: Read-only file system"


class FullDisk:
    """Lets a number of bytes be written, then fails as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        for name in ("write", "pwrite"):
            monkeypatch.setattr(os, name, self.limited(getattr(os, name)))

    def limited(self, write: Any) -> Any:
        def limited_write(file: int, data: Any, *rest: int) -> int:
            if self.room <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written: int = write(file, memoryview(data)[: self.room], *rest)
            self.room -= written
            return written

        return limited_write


@pytest.mark.slow
@pytest.mark.usefixtures("many_shards")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per", PER)
def test_full_disk(
    model: ProteinBert, fasta: Path, tmp_path: Path, per: Any, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"model": model, "per": per, "layout": layout, "tokens_per_batch": 600}
    embed(fasta, tmp_path / "whole.h5", **options)
    size = (tmp_path / "whole.h5").stat().st_size
    output = tmp_path / "out.h5"
    # First while the shards are written, then while they are merged, which takes the whole size.
    for part in (0.0, 0.1, 0.2, 0.9, 0.95, 0.9, 0.5, 0.99):
        room = max(1, int(part * size))
        with monkeypatch.context() as patch:
            FullDisk(patch, room)
            with pytest.raises(ProteinBertError) as error:
                embed(fasta, output, resume=True, **options)
        message = str(error.value)
        assert message.startswith(f"{output}: cannot be written: No space left on device")
        assert not output.exists()
        folder = Path(f"{output}.partial")
        if folder.exists():
            assert "records are safe" in message
            assert not any(path.name.endswith(".tmp") for path in folder.iterdir())
    embed(fasta, output, resume=True, **options)
    assert digest(output) == digest(tmp_path / "whole.h5")
    assert sorted(os.listdir(tmp_path)) == ["out.h5", "whole.h5"]


def test_real_write_errors_do_not_crash_the_process(fasta: Path, tmp_path: Path) -> None:
    """A limit on the size of files makes the system itself refuse: to the shards first, then to HDF5."""
    code = f"""
import os, resource, signal, torch
from proteinbert_fast import ProteinBert, ProteinBertConfig, embed
from proteinbert_fast.errors import ProteinBertError
torch.manual_seed(0)
model = ProteinBert(ProteinBertConfig(n_annotations=9, d_local=32, d_global=64, n_blocks=1, n_heads=2, d_key=16))
os.chdir({str(tmp_path)!r})
size = embed({str(fasta)!r}, "whole.h5", model=model, per="residue").bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (100, 5_000, size // 2, size - 500):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        embed({str(fasta)!r}, "out.h5", model=model, per="residue", overwrite=True)
    except ProteinBertError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    assert done.returncode == 0
    *shards, merge = done.stdout.splitlines()
    assert shards == ["out.h5: cannot be written: File too large"] * 3
    assert merge == f"{shards[0]}; 24 records are safe in out.h5.partial, go on with --resume"


def test_damaged_shard_is_found(
    model: ProteinBert, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.h5"
    with monkeypatch.context() as patch:
        patch.setattr(hdf5, "_write_attributes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(fasta, output, model=model)
    shard = tmp_path / "out.h5.partial" / "shard-000000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ProteinBertError, match=r"shard-000000\.bin: is damaged on the disk; start again"):
        embed(fasta, output, model=model, resume=True)
    shard.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"shard-000000\.bin: is missing or damaged; start again"):
        embed(fasta, output, model=model, resume=True)
    manifest = tmp_path / "out.h5.partial" / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: cannot be read; start again with --overwrite"):
        embed(fasta, output, model=model, resume=True)
    embed(fasta, output, model=model, overwrite=True)
    assert os.listdir(tmp_path) == ["out.h5"]


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_interrupt_inside_hdf5(
    model: ProteinBert, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come while HDF5 calls back into Python to write."""
    embed(fasta, tmp_path / "whole.h5", model=model, per="residue")
    for call in range(0, 12, 3):
        calls = iter(range(1000))

        def write(
            file: int, data: Any, *rest: int, calls: Any = calls, call: int = call, pwrite: Any = os.pwrite
        ) -> int:
            if next(calls) == call:
                raise KeyboardInterrupt
            written: int = pwrite(file, data, *rest)
            return written

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", write)
            with pytest.raises(KeyboardInterrupt):
                embed(fasta, tmp_path / "out.h5", model=model, per="residue", resume=True)
    embed(fasta, tmp_path / "out.h5", model=model, per="residue", resume=True)
    assert digest(tmp_path / "out.h5") == digest(tmp_path / "whole.h5")


def test_run_attribute_names_the_input(model: ProteinBert, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "in.fasta", ("A", "MKT"))
    embed([fasta], tmp_path / "out.h5", model=model)
    with h5py.File(tmp_path / "out.h5") as file:
        run = json.loads(file.attrs["run"])
    assert run["input"] == [{"name": "in.fasta", "bytes": 7, "sha256": hashlib.sha256(b">A\nMKT\n").hexdigest()}]


def test_pipes_and_standard_input(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    expected = embed(fasta, model=model)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for output in (None, tmp_path / "out.h5"):
        with subprocess.Popen(["cp", str(fasta), str(pipe)]):
            result = embed(pipe, output, model=model)
    assert isinstance(result, EmbedSummary)
    with h5py.File(tmp_path / "out.h5") as file:
        assert np.array_equal(file["embeddings"][:], expected.embeddings)
    assert sorted(os.listdir(tmp_path)) == ["out.h5", "pipe"]
    with pytest.raises(InputError, match=r"standard input \(-\) is named twice"):
        embed([Path("-"), Path("-")], model=model)


def test_full_disk_while_a_pipe_is_copied(model: ProteinBert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: sources.FastaSource, folder: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sources.FastaSource, "copy_pipes", full)
    with pytest.raises(ProteinBertError, match=r"out\.h5: cannot be written: No space left on device$"):
        embed("-", tmp_path / "out.h5", model=model)
    assert os.listdir(tmp_path) == []


def test_a_pipe_that_cannot_be_read(model: ProteinBert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Broken()))
    with pytest.raises(InputError, match="standard input: cannot be read: Input/output error"):
        embed("-", tmp_path / "out.h5", model=model)
    assert os.listdir(tmp_path) == []
