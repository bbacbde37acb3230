"""The weights that come with the package: whole, as their card says, and trained."""

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from proteinbert_fast import CheckpointError, ProteinBert, ProteinBertConfig, Tokenizer, embed
from proteinbert_fast.checkpoints import load_pretrained
from proteinbert_fast.checkpoints.files import sha256_of
from proteinbert_fast.cli.main import main
from proteinbert_fast.pretraining.config import read_config
from proteinbert_fast.pretraining.corruption import corrupt_tokens
from proteinbert_fast.weights import DEFAULT_MODEL, SHIPPED

from ..conftest import DATA

NAME = "proteinbert-swissprot"
FOLDER = SHIPPED[NAME]


@pytest.fixture(scope="module")
def model() -> ProteinBert:
    return ProteinBert.from_pretrained(NAME, offline=True)


@pytest.fixture(scope="module")
def proteins() -> list[list[str]]:
    """Accession, GO terms of three aspects, sequence, of 200 proteins."""
    return [line.split("\t") for line in (DATA / "swissprot_200.tsv").read_text().splitlines()[1:]]


def test_the_folder_holds_all_that_the_card_promises():
    assert {path.name for path in FOLDER.iterdir()} == {
        "README.md", "config.json", "evaluation.json", "go_terms.tsv", "log.jsonl", "model.safetensors", "pretrain.toml"
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 32_000_000


def test_weights_are_in_16_bits_and_of_the_published_architecture():
    checkpoint = load_pretrained(NAME)
    assert {tensor.dtype for tensor in checkpoint.state_dict.values()} <= {torch.float16, torch.bfloat16}
    assert checkpoint.config == ProteinBertConfig(n_annotations=checkpoint.config.n_annotations)
    assert checkpoint.source == NAME
    accessions = [term.accession for term in checkpoint.go_terms]
    assert accessions == sorted(set(accessions))
    assert len(accessions) == checkpoint.config.n_annotations
    assert all(term.name for term in checkpoint.go_terms)


def test_the_card_is_about_these_weights():
    card = (FOLDER / "README.md").read_text()
    evaluation = json.loads((FOLDER / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (FOLDER / "log.jsonl").read_text().splitlines()]
    digest = sha256_of(FOLDER / "model.safetensors")
    assert evaluation["model"]["sha256"] == digest
    assert evaluation["corpus"]["split"] == "test"
    assert card.count(digest) == 1
    assert evaluation["corpus"]["fingerprint"] in card
    assert read_config(FOLDER / "pretrain.toml").steps == rows[-1]["step"]
    assert f"{rows[-1]['step']:,} steps" in card
    assert f"{rows[-1]['residues']:,} tokens" in card
    options = (FOLDER / "pretrain.toml").read_bytes()
    assert options == (Path(__file__).parents[2] / "examples" / "swissprot" / "pretrain.toml").read_bytes()
    assert evaluation["sequence"]["noise"] == read_config(FOLDER / "pretrain.toml").replace_probability
    assert (rows[-1]["kind"], rows[-1]["is_best"]) == ("validation", True)
    for name, losses in evaluation["sequence"]["losses"].items():
        assert re.search(rf"^\| {re.escape(name)} \| {losses['corrupted']['all']:.4f} ", card, re.MULTILINE), name
    for name, found in evaluation["go"]["rows"].items():
        assert f"| {name} | " + " | ".join(f"{value:.3f}" for value in found["fmax"].values()) in card
    for row in evaluation["probes"]:
        scores = [row["scores"][name] for name in ("this model", "untrained model", "letters")]
        assert f"| {row['task']} | {row['metric']} | " + " | ".join(f"{score:.3f}" for score in scores) in card


def test_it_is_the_default_and_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert DEFAULT_MODEL == NAME
    monkeypatch.setenv("PROTEINBERT_FAST_OFFLINE", "1")
    monkeypatch.setenv("PROTEINBERT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("proteins.fasta").write_text(">a\nMKTAYIAKQR\n>b\nMSILVTRPSPAGEEL\n")
    Path(NAME).mkdir()  # the name goes before a directory of that name
    assert main(["embed", "proteins.fasta", "-o", "out.h5", "--storage-dtype", "float32", "--quiet"]) == 0
    with h5py.File("out.h5") as file:
        assert file.attrs["model"] == NAME
        assert file.attrs["model_sha256"] == sha256_of(FOLDER / "model.safetensors")
        assert "warning" not in file.attrs
        np.testing.assert_array_equal(
            file["embeddings"][:], embed("proteins.fasta", storage_dtype="float32").embeddings
        )
    assert not (tmp_path / "cache").exists()
    with pytest.raises(CheckpointError, match=r"no config\.json in this directory"):
        load_pretrained(f"./{NAME}")


def test_an_installation_without_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(SHIPPED, NAME, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=rf"^{NAME}: comes with proteinbert_fast, .*nowhere: install .* anew$"):
        load_pretrained(NAME)


def test_it_knows_what_stands_between_neighbours(model, proteins):
    """Of corrupted residues of 200 real proteins, better than the residues' frequencies in these very proteins do.

    A token that is shown is trusted as far as it was right in training; by Bayes's rule that is divided out.
    """
    noise = read_config(FOLDER / "pretrain.toml").replace_probability
    torch.manual_seed(0)
    untrained = ProteinBert(model.config).eval()
    clean = Tokenizer()([row[4][:1022] for row in proteins])
    noisy = corrupt_tokens(clean, range(len(clean)), seed=1, step=0, probability=noise)
    changed = (noisy.tokens != clean.tokens).nonzero().squeeze(1)
    target, shown = clean.tokens[changed].long(), noisy.tokens[changed].long()
    likelihood = torch.full((26, 26), noise / 26) + (1 - noise) * torch.eye(26)
    counts = torch.bincount(clean.tokens[clean.segments >= 0].long(), minlength=26).float()
    by_frequency = -(counts / counts.sum()).log()[target].mean().item()
    loss, plain = {}, {}
    for name, of in {"trained": model, "untrained": untrained}.items():
        with torch.inference_mode():
            told = of(noisy).token_logits[changed].log_softmax(-1)
        plain[name] = torch.nn.functional.cross_entropy(told, target).item()
        loss[name] = torch.nn.functional.cross_entropy(told - likelihood.log()[shown], target).item()
    assert plain["trained"] < plain["untrained"] - 0.15, "of what it was not shown, without any correction"
    assert loss["trained"] < by_frequency - 0.08
    assert loss["untrained"] > by_frequency + 0.3


def test_it_foretells_go_terms(model, proteins):
    """From sequences alone: a protein that has a term mostly gets a higher probability of it than one that has not."""
    number = {term.accession: i for i, term in enumerate(model.go_terms)}
    truth = np.zeros((len(proteins), len(number)), bool)
    for i, row in enumerate(proteins):
        for term in ";".join(row[1:4]).split(";"):
            if term in number:
                truth[i, number[term]] = True
    with torch.inference_mode():
        scores = model(Tokenizer()([row[4][:1022] for row in proteins])).go_probabilities.numpy()
    areas = []
    for term in np.flatnonzero(truth.sum(0) >= 5):
        has = truth[:, term]
        areas.append((scores[has, term][:, None] > scores[~has, term]).mean())
    assert len(areas) > 50
    assert np.mean(areas) > 0.8
