"""``proteinbert-fast embed``, end to end on real proteins."""

import gzip
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from proteinbert_fast import ProteinBert, embed
from proteinbert_fast.cli.main import main
from proteinbert_fast.data.fasta import read_fasta

RUN = "import sys; from proteinbert_fast.cli.main import main; sys.exit(main())"
# A shard for each few proteins, and time to interrupt between them.
SLOW = """
import sys, time
from proteinbert_fast.cli.main import main
from proteinbert_fast.embedding import partial, pipeline
partial.SHARD_SECONDS = 0.0
pipeline._BATCHES_PER_WINDOW = 1
rows = pipeline.Embedder.rows
def slow(self, window):
    time.sleep(0.2)
    return rows(self, window)
pipeline.Embedder.rows = slow
sys.exit(main())
"""


def arguments(fasta: Path | str, output: Path | str, weights: Path, *more: str) -> list[str]:
    return ["embed", str(fasta), "-o", str(output), "--model", str(weights), *more]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ([], {}),
        (["--per", "residue"], {"per": "residue"}),
        (["--pooling", "both", "--layers", "all"], {"pooling": "both", "layers": "all"}),
        (["--layers", "3,1", "--storage-dtype", "float32"], {"layers": [3, 1], "storage_dtype": "float32"}),
        (["--dtype", "bfloat16", "--tokens-per-batch", "900"], {"dtype": "bfloat16"}),
        (["--max-length", "100", "--lowercase", "upper"], {"max_length": 100}),
        (["--layers", "original", "--device", "cpu"], {"layers": "original"}),
    ],
)
def test_the_same_as_from_python(
    fasta: Path,
    weights: Path,
    tmp_path: Path,
    more: list[str],
    options: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out.h5"
    assert main(arguments(fasta, output, weights, *more)) == 0
    out = capsys.readouterr().out
    expected = embed(fasta, model=weights, **options)
    with h5py.File(output) as file:
        assert list(file["ids"].asstr()) == expected.ids == [record.id for record in read_fasta(fasta)]
        assert np.array_equal(file["embeddings"][:], expected.embeddings)
        assert file["embeddings"].dtype == expected.embeddings.dtype
        assert file.attrs["model_sha256"] == ProteinBert.from_pretrained(weights).checkpoint_sha256
        assert file.attrs["pretrained"]
        assert "warning" not in file.attrs
    for line in (
        r"output +\S*out.h5 \(",
        r"proteins +24\n",
        r"residues +\d+",
        r"model SHA-256 +[0-9a-f]{64}",
        r"residues/s",
    ):
        assert re.search(line, out)


def test_several_files_compressed_and_uniprot_layout(
    fasta: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = fasta.read_bytes()
    middle = whole.index(b">", len(whole) // 2)
    (tmp_path / "a.fasta").write_bytes(whole[:middle])
    (tmp_path / "b.fa.gz").write_bytes(gzip.compress(whole[middle:], mtime=0))
    output = tmp_path / "out.h5"
    more = ["--layout", "uniprot", "--per", "residue", "--quiet"]
    _, *rest = arguments(tmp_path / "b.fa.gz", output, weights, *more)
    assert main(["embed", str(tmp_path / "a.fasta"), *rest]) == 0
    assert capsys.readouterr() == ("", "")
    expected = embed(fasta, model=weights, per="residue")
    with h5py.File(output) as file:
        assert set(file) == set(expected.ids)
        for name in expected.ids:
            assert np.array_equal(file[name][:], expected[name])


@pytest.mark.slow
def test_standard_input(fasta: Path, weights: Path, tmp_path: Path) -> None:
    for i, content in enumerate((fasta.read_bytes(), gzip.compress(fasta.read_bytes(), mtime=0))):
        command = [sys.executable, "-c", RUN, *arguments("-", f"out{i}.h5", weights, "--quiet")]
        subprocess.run(command, input=content, cwd=tmp_path, check=True, timeout=120)
    assert sorted(os.listdir(tmp_path)) == ["out0.h5", "out1.h5"]
    expected = embed(fasta, model=weights)
    for name in ("out0.h5", "out1.h5"):
        with h5py.File(tmp_path / name) as file:
            assert np.array_equal(file["embeddings"][:], expected.embeddings)
    assert digest(tmp_path / "out0.h5") == digest(tmp_path / "out1.h5")


@pytest.mark.parametrize(
    ("content", "more", "says"),
    [
        (b"MKT\n", [], "in.fasta:1: no FASTA header"),
        (b">A\n>B\nMKT\n", [], "in.fasta:1: record A: the sequence is empty"),
        (b"", [], "in.fasta: is empty"),
        (b">A\nMKT\n>A\nMKT\n", [], "in.fasta:3: record A: A was already used at "),
        (b">A\nMK\0T\n", [], "in.fasta:2: record A: a NUL byte"),
        (b"\x7fELF\0\0\0\0\0", [], "in.fasta: is a binary file, not FASTA"),
        (gzip.compress(b">A\nMKT\n" * 99, mtime=0)[:-9], [], "the gzip file is truncated"),
        (b">A/B\nMKT\n", ["--layout", "uniprot"], "in.fasta:1: record A/B: the uniprot layout"),
        (b">A\nMKT\n", ["--layers", "9"], "there is no block 9"),
        (b">A\nMKT\n", ["--device", "gpu"], "device 'gpu' is unknown"),
        (b">A\nMKT\n", ["--tokens-per-batch", "0"], "tokens_per_batch must be a positive integer"),
        (b">A\nMKT\n", ["--per", "residue", "--pooling", "mean"], "is for embeddings per protein"),
    ],
)
def test_bad_input_is_one_line(
    weights: Path,
    tmp_path: Path,
    content: bytes,
    more: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "in.fasta").write_bytes(content)
    assert main(arguments(tmp_path / "in.fasta", tmp_path / "out.h5", weights, *more)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("proteinbert-fast: error: ")
    assert says in err
    assert os.listdir(tmp_path) == ["in.fasta"]


@pytest.mark.parametrize(
    ("name", "says"), [("none.fasta", "none.fasta: no such file"), (".", "is a directory; name the FASTA files")]
)
def test_missing_file_and_directory(
    weights: Path, tmp_path: Path, name: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / name, tmp_path / "out.h5", weights)) == 1
    assert says in capsys.readouterr().err


def test_warnings_about_records(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.fasta").write_bytes(
        b">A\nmkt\n>B\nMKT*\n>C\n" + b"ACGT" * 40 + b"\n>D\n" + b"ACGT" * 40 + b"\n>E\nGATTACA"
    )
    more = ["--max-length", "100", "--quiet"]
    assert main(arguments(tmp_path / "in.fasta", tmp_path / "out.h5", weights, *more)) == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("proteinbert-fast: warning: ") for line in lines)
    words = ["looks like DNA", "lower-case", "stop codon", "record C: 160 residues, cut to", "record D: 160 residues"]
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert word in line


def test_existing_output(fasta: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.h5"
    output.write_text("x")
    assert main(arguments(fasta, output, weights)) == 1
    assert "out.h5: exists; replace it with --overwrite" in capsys.readouterr().err
    assert main(arguments(fasta, output, weights, "--resume", "--overwrite")) == 2
    assert main(arguments(fasta, output, weights, "--overwrite")) == 0
    assert main(arguments(fasta, output, weights, "--resume")) == 0
    assert "24 proteins were done before" in capsys.readouterr().out


def test_no_network_names_the_way_out(
    fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROTEINBERT_FAST_OFFLINE", "1")
    monkeypatch.setenv("PROTEINBERT_FAST_CACHE", str(tmp_path / "cache"))
    command = ["embed", str(fasta), "-o", str(tmp_path / "out.h5"), "--model"]
    assert main([*command, "proteinbert"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("proteinbert-fast: error: proteinbert: not in the cache")
    assert line.endswith("Without --model, proteinbert-swissprot is used, which needs no network")
    assert not (tmp_path / "out.h5").exists()
    assert main([*command, "none.pkl"]) == 1
    assert "Without --model" not in capsys.readouterr().err


def test_untrained_is_loud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.fasta").write_bytes(b">A\nMKT\n")
    for seed in ("0", "0", "1"):
        more = ["--untrained", "--seed", seed, "--overwrite"]
        assert main(["embed", str(tmp_path / "in.fasta"), "-o", str(tmp_path / f"{seed}.h5"), *more]) == 0
        out, err = capsys.readouterr()
        assert "NOT TRAINED: the weights are random" in err
        assert f"untrained (seed {seed})" in out
    with h5py.File(tmp_path / "0.h5") as one, h5py.File(tmp_path / "1.h5") as other:
        assert one.attrs["model"] == "untrained (seed 0)"
        assert "numbers without meaning" in one.attrs["warning"]
        assert not np.array_equal(one["embeddings"][:], other["embeddings"][:])
    assert main(["embed", "x", "-o", "y", "--untrained", "--model", "z"]) == 2


def started(code: str, folder: Path, args: list[str]) -> "subprocess.Popen[str]":
    """A slow run that has completed its first shard."""
    # Where the tests run in a shell's background, SIGINT is ignored, and children would inherit that.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
    process = subprocess.Popen([sys.executable, "-c", code, *args], cwd=folder, stderr=subprocess.PIPE, text=True)
    shard = folder / "out.h5.partial" / "shard-000001.bin"
    deadline = time.monotonic() + 120
    while not shard.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_by_a_signal(fasta: Path, weights: Path, tmp_path: Path, number: int, code: int) -> None:
    args = arguments(fasta, "out.h5", weights, "--quiet", "--tokens-per-batch", "600")
    with started(SLOW, tmp_path, args) as process:
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    lines = err.splitlines()
    assert re.fullmatch(
        r"proteinbert-fast: warning: interrupted: \d+ records are safe in out.h5.partial; go on with --resume", lines[0]
    )
    assert lines[1:] == ["proteinbert-fast: interrupted"]
    resume_and_compare(args, tmp_path)


def resume_and_compare(args: list[str], folder: Path) -> None:
    subprocess.run([sys.executable, "-c", RUN, *args, "--resume"], cwd=folder, check=True, timeout=120)
    whole = ["whole.h5" if argument == "out.h5" else argument for argument in args]
    subprocess.run([sys.executable, "-c", RUN, *whole], cwd=folder, check=True, timeout=120)
    assert digest(folder / "out.h5") == digest(folder / "whole.h5")
    assert sorted(os.listdir(folder)) == ["out.h5", "whole.h5"]


@pytest.mark.slow
def test_killed_again_and_again(fasta: Path, weights: Path, tmp_path: Path) -> None:
    args = arguments(fasta, "out.h5", weights, "--quiet", "--per", "residue", "--tokens-per-batch", "600", "--resume")
    kills = 0
    for pause in (0.0, 0.13, 0.31):
        shards = {path.name for path in tmp_path.glob("out.h5.partial/shard-*.bin")}
        process = subprocess.Popen([sys.executable, "-c", SLOW, *args], cwd=tmp_path)
        while process.poll() is None and {path.name for path in tmp_path.glob("out.h5.partial/shard-*.bin")} <= shards:
            time.sleep(0.01)
        time.sleep(pause)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills == 3
    args.remove("--resume")
    resume_and_compare(args, tmp_path)
