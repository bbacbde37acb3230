"""What `make pretrain-demo` does, in fewer steps: a corpus of real proteins, a model trained on it, its curves."""

from pathlib import Path

import pytest

from proteinbert_fast.cli.main import main

from .runs import log

DATA = Path(__file__).parents[1] / "data" / "pretraining"


@pytest.mark.slow
def test_the_demonstration(tmp_path, capsys):
    pytest.importorskip("fastobo")
    pytest.importorskip("matplotlib")
    corpus, run, picture = tmp_path / "corpus.h5", tmp_path / "run", tmp_path / "curves.png"
    files = ["--annotations", str(DATA / "go_terms.tsv.gz"), "--ontology", str(DATA / "go.obo.gz")]
    more = ["--min-count", "20", "--validation", "0.1", "--resume", "--quiet"]
    assert main(["build-corpus", str(DATA / "proteins.fasta.gz"), "-o", str(corpus), *files, *more]) == 0
    shorter = ["--steps", "60", "--warmup-steps", "10", "--validate-every", "20", "--tokens-per-batch", "4096"]
    config = ["--config", str(DATA / "demo.toml"), "--resume"]
    assert main(["pretrain", str(corpus), "-o", str(run), *config, *shorter, "--device", "cpu"]) == 0
    assert f"model: {run / 'model'}" in capsys.readouterr().out
    rows = [row for row in log(run) if row["kind"] == "validation"]
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert rows[0]["token_loss"] > rows[1]["token_loss"] > rows[2]["token_loss"]
    assert rows[0]["annotation_loss"] > rows[2]["annotation_loss"]
    assert rows[2]["token_loss"] < 1.5
    assert main(["plot-pretraining", str(run), "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
