"""Names, paths and files of other programs: what each is, or one line that says so."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch

from proteinbert_fast.checkpoints import load_pretrained, write_directory, write_single_file
from proteinbert_fast.errors import CheckpointError

from .conftest import NANO, environment, same_tensors

# Names and shapes (for its default sizes) of protein-bert-pytorch 0.1.0.
PORT_TENSORS = {
    "token_emb.weight": (26, 512),
    "to_global_emb.weight": (256, 8943),
    "to_global_emb.bias": (256,),
    "layers.0.narrow_conv.0.weight": (512, 512, 9),
    "layers.0.global_attend_local.null_key": (64,),
    "to_token_logits.weight": (26, 512),
    "to_annotation_logits.1.weight": (8943, 256),
}


def refusal(path: object, **options: object) -> str:
    with pytest.raises(CheckpointError) as error:
        load_pretrained(path, **options)
    line = str(error.value)
    assert line.isprintable()
    return line.removeprefix(f"{path}: ")


def port_state_dict(prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: torch.zeros([min(size, 4) for size in shape]) for name, shape in PORT_TENSORS.items()}


def test_all_forms_give_the_same_weights(tmp_path, nano):
    write_directory(tmp_path / "directory", nano)
    write_single_file(tmp_path / "file.safetensors", nano)
    (tmp_path / "renamed").write_bytes(NANO.read_bytes())
    (tmp_path / "weights.bin").write_bytes((tmp_path / "file.safetensors").read_bytes())
    for source in [
        str(NANO),
        NANO,
        "renamed",
        "directory",
        "directory/model.safetensors",
        "file.safetensors",
        "weights.bin",
    ]:
        checkpoint = load_pretrained(source if source == NANO else tmp_path / source)
        assert checkpoint.config == nano.config
        assert same_tensors(checkpoint.state_dict, nano.state_dict)
        assert Path(checkpoint.source).is_absolute()


def test_home_directories_are_found(tmp_path, nano, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_directory(tmp_path / "m", nano)
    assert load_pretrained("~/m").config == nano.config


@pytest.mark.parametrize(
    "name", ["proteinbertt", "no/such/path", "./owner/name", "/owner/name", "owner/name.pkl", "owner/na me"]
)
def test_neither_name_nor_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert refusal(name) == (
        "no such file or directory, no hub name (owner/name), and not a known name (proteinbert-swissprot, proteinbert)"
    )


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_no_name_at_all(name):
    assert refusal(name).endswith("not a path or name of a checkpoint")


def test_an_existing_path_goes_before_a_hub_name(tmp_path, nano, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_directory(tmp_path / "owner" / "name", nano)
    assert load_pretrained("owner/name").config == nano.config


class TestFilesOfOtherPrograms:
    def test_torch_archive(self, tmp_path):
        path = tmp_path / "model.pt"
        torch.save({"a": torch.zeros(2)}, path)
        assert refusal(path) == (
            "this is a torch.save file, a pickle that could run code; save its state_dict with safetensors instead"
        )

    def test_old_torch_file(self, tmp_path):
        path = tmp_path / "model.pth"
        torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
        assert refusal(path).startswith("this is an old torch.save file, a pickle that could run code")

    @pytest.mark.parametrize("prefix", ["", "model.", "module."])
    def test_the_pytorch_port(self, tmp_path, prefix):
        torch.save(port_state_dict(prefix), tmp_path / "port.pt")
        assert "; and protein-bert-pytorch is another model" in refusal(tmp_path / "port.pt")
        safetensors.torch.save_file(port_state_dict(prefix), tmp_path / "port.safetensors")
        assert refusal(tmp_path / "port.safetensors").startswith("protein-bert-pytorch is another model (null key")

    def test_the_pytorch_port_in_a_directory(self, tmp_path, nano):
        write_directory(tmp_path / "m", nano)
        safetensors.torch.save_file(port_state_dict(), tmp_path / "m" / "model.safetensors")
        assert "protein-bert-pytorch is another model" in refusal(tmp_path / "m")

    def test_protbert(self, tmp_path):
        path = tmp_path / "model.safetensors"
        safetensors.torch.save_file({"bert.embeddings.word_embeddings.weight": torch.zeros(2, 2)}, path)
        assert refusal(path) == "this is a BERT of transformers (such as ProtBert), not ProteinBERT"

    def test_keras_h5(self, tmp_path):
        path = tmp_path / "model.h5"
        with h5py.File(path, "w") as file:
            file["weights"] = np.zeros(3)
        assert refusal(path) == "this is an HDF5 file (Keras .h5); only the original's .pkl and .safetensors are read"

    @pytest.mark.parametrize(
        ("names", "what"),
        [
            (["config.json", "model.weights.h5"], "this is a Keras .keras file"),
            (["a.npy"], "this is a numpy .npz file"),
            (["notes.txt"], "this is a zip archive, not a checkpoint"),
        ],
    )
    def test_zip_files(self, tmp_path, names, what):
        path = tmp_path / "archive"
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")
        assert refusal(path).startswith(what)

    @pytest.mark.parametrize(
        ("content", "what"),
        [
            (b"", "the file is empty"),
            (b"PK\x03\x04" + b"x" * 100, "this is a damaged zip archive"),
            (gzip.compress(NANO.read_bytes(), mtime=0), "this is a gzip file; unpack it first"),
            (lzma.compress(NANO.read_bytes()), "this is an xz file; unpack it first"),
            (bz2.compress(NANO.read_bytes()), "this is a bzip2 file; unpack it first"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "this is a git-lfs pointer, not the weights"),
            (b"\n<!DOCTYPE html><html>", "this is a web page, not the weights"),
            (b">sp|P12345\nMKTAYI\n", "not a readable safetensors file"),
            (b"x", "not a readable safetensors file"),
        ],
    )
    @pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
    def test_other_files(self, tmp_path, content, what, suffix):
        path = tmp_path / f"file{suffix}"
        path.write_bytes(content)
        line = refusal(path)
        if suffix == ".pkl" and what.startswith("not a readable"):
            what = "not an official ProteinBERT pickle, and nothing in it was run: it is no pickle of protocol 3 or 4"
        assert line.startswith(what)

    def test_a_zip_bomb_is_not_unpacked(self, tmp_path):
        path = tmp_path / "bomb.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(200 * 2**20))
        assert refusal(path).startswith("this is a torch.save file")

    def test_a_pickle_named_safetensors(self, tmp_path, nano):
        path = tmp_path / "model.safetensors"
        path.write_bytes(NANO.read_bytes())
        assert load_pretrained(path).config == nano.config


def test_hub_names(tmp_path, nano):
    digests = write_directory(tmp_path / "served", nano)
    script = Path(__file__).with_name("hub_session.py")
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "served")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=environment(),
    )
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    offline, lean, full, cached, missing, gated, empty, other_cache, unreachable = lines
    loaded = {"sha256": digests["model.safetensors"], "source": "owner/model"}
    assert offline["error"] == "owner/model: no such path, and not in the hub's cache (offline)"
    assert offline["requests"] == 0
    assert lean.items() >= (loaded | {"optimizer": False, "fetched": ["config.json", "model.safetensors"]}).items()
    assert full.items() >= (loaded | {"optimizer": True, "fetched": ["optimizer.safetensors"]}).items()
    assert cached.items() >= (loaded | {"optimizer": True, "requests": 0}).items()
    assert missing["error"] == "owner/missing: no such path, and no such public repository on the hub"
    assert gated["error"] == "gated/model: this hub repository asks for a login: run `hf auth login`"
    assert empty["error"].startswith("owner/empty: this hub repository has no config.json and model.safetensors")
    assert len(other_cache["fetched"]) == 3
    assert unreachable["error"].startswith("owner/other: cannot be fetched from the hub: Server disconnected")
