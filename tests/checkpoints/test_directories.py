"""config.json with model.safetensors: written, read back strictly, and refused where something does not fit."""

import copy
import hashlib
import json
import struct

import pytest
import safetensors.torch
import torch

from proteinbert_fast import ProteinBert, Tokenizer
from proteinbert_fast._version import __version__
from proteinbert_fast.checkpoints import (
    GoTerm,
    LoadedCheckpoint,
    load_pretrained,
    save_pretrained,
    write_directory,
    write_single_file,
)
from proteinbert_fast.errors import CheckpointError

from .conftest import ODD_SIZES, random_state_dict, same_tensors

TERMS = tuple(GoTerm(f"GO:{index:07d}", f"process {index}, 5'-3' \"odd\"") for index in range(7))


@pytest.fixture
def directory(tmp_path, odd_checkpoint):
    """A directory with all four files."""
    target = tmp_path / "odd"
    write_directory(
        target, LoadedCheckpoint(ODD_SIZES, odd_checkpoint.state_dict, None, "", odd_checkpoint.optimizer_state, TERMS)
    )
    return target


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_pretrained(path)
    line = str(error.value)
    assert line.isprintable()
    assert line.startswith(str(path))
    return line.removeprefix(str(path)).lstrip("/")


def change_config(directory, **changes):
    content = json.loads((directory / "config.json").read_text())
    content |= changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def replace_weights(directory, tensors, metadata=None):
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata=metadata)


def test_everything_comes_back(directory, odd_checkpoint):
    checkpoint = load_pretrained(directory)
    assert checkpoint.config == ODD_SIZES
    assert same_tensors(checkpoint.state_dict, odd_checkpoint.state_dict)
    assert checkpoint.optimizer_state.iteration == 11
    assert same_tensors(checkpoint.optimizer_state.first_moments, odd_checkpoint.optimizer_state.first_moments)
    assert same_tensors(checkpoint.optimizer_state.second_moments, odd_checkpoint.optimizer_state.second_moments)
    assert checkpoint.go_terms == TERMS
    assert checkpoint.source == str(directory.resolve())
    assert checkpoint.sha256 == hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert load_pretrained(directory, optimizer=False).optimizer_state is None


def test_config_is_readable_by_the_hub(directory):
    content = json.loads((directory / "config.json").read_text())
    assert content["model_type"] == "proteinbert"
    assert content["architectures"] == ["ProteinBert"]
    assert content["library_version"] == __version__
    assert content["d_global"] == 12
    with safetensors.safe_open(directory / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_the_same_weights_give_the_same_bytes(tmp_path, directory):
    checkpoint = load_pretrained(directory)
    for attempt in range(5):
        digests = write_directory(tmp_path / f"again{attempt}", checkpoint)
        assert digests["model.safetensors"] == checkpoint.sha256
    assert write_single_file(tmp_path / "one.safetensors", checkpoint) == checkpoint.sha256


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_models_keep_their_type(tmp_path, small_model, dtype):
    model = small_model.to(dtype)
    model.save_pretrained(tmp_path / "model")
    checkpoint = load_pretrained(tmp_path / "model")
    assert same_tensors(checkpoint.state_dict, dict(model.state_dict()))
    assert {tensor.dtype for tensor in checkpoint.state_dict.values()} == {dtype}


def test_model_saved_and_loaded_gives_the_same_bits(tmp_path, small_model):
    small_model.save_pretrained(tmp_path / "model")
    again = ProteinBert.from_pretrained(tmp_path / "model")
    assert again.is_pretrained
    assert again.checkpoint_source == str((tmp_path / "model").resolve())
    batch = Tokenizer()(["MKTAYIAKQR", "", "M" * 50])
    with torch.no_grad():
        ours, theirs = small_model(batch), again(batch)
        assert torch.equal(ours.local_rows, theirs.local_rows)
        assert torch.equal(ours.go_logits, theirs.go_logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when torch.compile is first used
def test_wrapped_models_are_saved_as_themselves(tmp_path, small_model):
    class Wrapper(torch.nn.Module):  # as DistributedDataParallel holds its model
        def __init__(self, module):
            super().__init__()
            self.module = module

    save_pretrained(small_model, tmp_path / "plain")
    save_pretrained(Wrapper(small_model), tmp_path / "ddp")
    save_pretrained(torch.compile(small_model), tmp_path / "compiled")
    digests = {load_pretrained(tmp_path / name).sha256 for name in ("plain", "ddp", "compiled")}
    assert len(digests) == 1


def test_other_modules_are_not_saved(tmp_path):
    with pytest.raises(TypeError, match="save_pretrained takes a ProteinBert, not Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_save_with_go_terms_and_optimizer_state(tmp_path, odd_checkpoint):
    model = ProteinBert(ODD_SIZES, backend="reference")
    save_pretrained(model, tmp_path / "m", go_terms=TERMS, optimizer_state=odd_checkpoint.optimizer_state)
    checkpoint = load_pretrained(tmp_path / "m")
    assert checkpoint.go_terms == TERMS
    assert checkpoint.optimizer_state.iteration == 11


def test_views_and_shared_memory_are_saved(tmp_path):
    state = random_state_dict(ODD_SIZES)
    state["blocks.0.global_dense1.weight"] = state["blocks.0.global_dense2.weight"].T
    write_directory(tmp_path / "m", LoadedCheckpoint(ODD_SIZES, state, None, ""))
    assert same_tensors(load_pretrained(tmp_path / "m").state_dict, state)


class TestWriting:
    def test_existing_files_are_replaced_and_others_left(self, directory, small_model):
        (directory / "notes.txt").write_text("mine")
        small_model.save_pretrained(directory)
        assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
        assert load_pretrained(directory).config == small_model.config

    def test_an_empty_directory_is_filled(self, tmp_path, odd_checkpoint):
        (tmp_path / "empty").mkdir()
        write_directory(tmp_path / "empty", odd_checkpoint)
        assert load_pretrained(tmp_path / "empty").config == ODD_SIZES

    def test_parents_are_made(self, tmp_path, odd_checkpoint):
        write_directory(tmp_path / "a" / "b" / "c", odd_checkpoint)
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c"]

    def test_a_file_is_in_the_way(self, tmp_path, odd_checkpoint):
        (tmp_path / "taken").write_text("")
        with pytest.raises(CheckpointError, match="taken: a file is in the way"):
            write_directory(tmp_path / "taken", odd_checkpoint)

    def test_a_full_disk_leaves_nothing(self, tmp_path, odd_checkpoint, monkeypatch):
        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        target = tmp_path / "m"
        with pytest.raises(CheckpointError) as error:
            write_directory(target, odd_checkpoint)
        assert str(error.value) == f"{target / 'model.safetensors'}: cannot be written: No space left on device"
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s["token_head.bias"].fill_(torch.nan), "token_head.bias holds 26 NaN or infinite values"),
            (
                lambda s: s.update({"token_head.bias": s["token_head.bias"].double()}),
                "token_head.bias is torch.float64",
            ),
            (lambda s: s.update({"token_head.bias": torch.zeros(3)}), "token_head.bias has shape (3,), expected (26,)"),
            (lambda s: s.pop("token_head.bias"), "1 of 53 tensors are missing"),
        ],
    )
    def test_wrong_weights_are_not_written(self, tmp_path, odd_checkpoint, change, message):
        change(odd_checkpoint.state_dict)
        with pytest.raises(CheckpointError) as error:
            write_directory(tmp_path / "m", odd_checkpoint)
        assert str(error.value).startswith(f"{tmp_path / 'm'}: {message}")
        assert list(tmp_path.iterdir()) == []

    def test_wrong_moments_are_not_written(self, tmp_path, odd_checkpoint):
        odd_checkpoint.optimizer_state.first_moments["token_head.bias"][3] = torch.inf
        with pytest.raises(CheckpointError, match=r"first\.token_head\.bias holds 1 NaN"):
            write_directory(tmp_path / "m", odd_checkpoint)
        assert list(tmp_path.iterdir()) == []


class TestSingleFile:
    def test_it_is_complete_by_itself(self, tmp_path, odd_checkpoint):
        write_single_file(tmp_path / "odd.safetensors", odd_checkpoint)
        checkpoint = load_pretrained(tmp_path / "odd.safetensors")
        assert checkpoint.config == ODD_SIZES
        assert same_tensors(checkpoint.state_dict, odd_checkpoint.state_dict)

    def test_config_beside_it(self, directory, odd_checkpoint):
        replace_weights(directory, odd_checkpoint.state_dict)
        assert load_pretrained(directory / "model.safetensors").config == ODD_SIZES
        (directory / "config.json").unlink()
        assert refusal(directory / "model.safetensors") == ": no sizes in its metadata and no config.json beside it"

    def test_wrong_sizes_inside(self, tmp_path, odd_checkpoint):
        path = tmp_path / "x.safetensors"
        for config, message in [
            ("{", "not valid JSON"),
            ("[" * 100_000, "not valid JSON"),
            ("[]", "holds no JSON object"),
            ("{}", "config: missing d_global"),
            (
                json.dumps(ODD_SIZES.to_dict() | {"d_local": 6}),
                "token_embedding.weight has shape (26, 5), expected (26, 6)",
            ),
            (json.dumps(ODD_SIZES.to_dict() | {"n_blocks": 10**12}), "53 tensors, expected 23,000,000,000,007"),
        ]:
            safetensors.torch.save_file(odd_checkpoint.state_dict, path, metadata={"config": config})
            assert message in refusal(path)


class TestDamagedDirectories:
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_missing_file(self, directory, name):
        (directory / name).unlink()
        assert refusal(directory) == f": no {name} in this directory"

    def test_a_pickle_in_it(self, directory):
        (directory / "model.safetensors").rename(directory / "weights.pkl")
        assert refusal(directory).endswith(f"to read the pickle in it, give its own path: {directory / 'weights.pkl'}")

    @pytest.mark.parametrize(
        ("name", "what"),
        [("saved_model.pb", "a Keras SavedModel"), ("pytorch_model.bin", "a PyTorch pickle, which could run code")],
    )
    def test_directories_of_other_programs(self, tmp_path, name, what):
        (tmp_path / name).write_bytes(b"x")
        assert refusal(tmp_path).startswith(f": holds {what} ({name}); only config.json with model.safetensors")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"d_local": None}, "config: missing d_local"),
            ({"dropout": 0.1}, "config: unknown dropout"),
            ({"n_heads": "3"}, "config: n_heads must be a positive integer, got '3'"),
            ({"n_heads": True}, "config: n_heads must be a positive integer, got True"),
            ({"n_blocks": 0}, "config: n_blocks must be a positive integer, got 0"),
            ({"kernel_size": 4}, "config: kernel_size must be odd, got 4"),
            ({"model_type": "bert"}, "model_type is bert, this is another model than ProteinBERT"),
            ({"model_type": ["bert"]}, "model_type is no text, this is another model than ProteinBERT"),
        ],
    )
    def test_wrong_configs(self, directory, changes, message):
        change_config(directory, **changes)
        assert refusal(directory).startswith(f"config.json: {message}")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "the file is empty"),
            (b"{", "not valid JSON"),
            (b"\xff\xfe", "not UTF-8 text"),
            (b"3", "holds no JSON object"),
            (b"[" * 200_000, "not valid JSON"),
            (b"1" * 10_000, "not valid JSON"),
            (b" " * 2_000_000, "over 1,048,576 bytes"),
        ],
    )  # fmt: skip
    def test_broken_configs(self, directory, content, message):
        (directory / "config.json").write_bytes(content)
        assert refusal(directory).startswith(f"config.json: {message}")

    def test_config_and_weights_of_different_models(self, directory):
        change_config(directory, wide_dilation=3)
        assert refusal(directory) == "model.safetensors: its sizes are not those of the config.json beside it"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda s: s.pop("blocks.1.query.weight"),
                "1 of 53 tensors are missing, the first is blocks.1.query.weight",
            ),
            (lambda s: s.update(more=torch.zeros(1)), "54 tensors, expected 53 for 2 blocks"),
            (
                lambda s: s.update({"blocks.1.query.weight": s["blocks.1.query.weight"].T.contiguous()}),
                "blocks.1.query.weight has shape (12, 6), expected (6, 12)",
            ),
            (
                lambda s: s.update({"token_head.bias": torch.zeros(26, dtype=torch.float64)}),
                "token_head.bias is F64, expected F32 or F16 or BF16",
            ),
            (
                lambda s: s.update({"token_head.bias": torch.zeros(26, dtype=torch.float8_e4m3fn)}),
                "token_head.bias is F8_E4M3, expected F32 or F16 or BF16",
            ),
            (
                lambda s: s["token_head.bias"].fill_(-torch.inf),
                "token_head.bias holds 26 NaN or infinite values, expected numbers",
            ),
        ],
    )
    def test_wrong_tensors(self, directory, odd_checkpoint, change, message):
        state = copy.deepcopy(odd_checkpoint.state_dict)
        change(state)
        replace_weights(directory, state)
        assert refusal(directory) == f"model.safetensors: {message}"

    def test_cut_and_lying_safetensors(self, directory):
        path = directory / "model.safetensors"
        content = path.read_bytes()
        for broken in [
            content[:4],
            content[:100],
            content[:-1],
            content + b"x",
            struct.pack("<Q", 2**63) + content[8:],
            struct.pack("<Q", 10**9) + content[8:],
            struct.pack("<Q", 5) + content[8:],
            content.replace(b"[0,", b"[4,", 1),
            content.replace(b'"F32"', b'"X99"', 1),
        ]:
            path.write_bytes(broken)
            assert refusal(directory).startswith("model.safetensors: not a readable safetensors file: ")

    def test_optimizer_state_of_other_weights(self, directory, odd_checkpoint):
        replace_weights(directory, random_state_dict(ODD_SIZES, 77))
        assert refusal(directory) == (
            "optimizer.safetensors: this optimiser state belongs to other weights than those beside it"
        )
        assert load_pretrained(directory, optimizer=False).config == ODD_SIZES

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t, m: m.update(iteration="-3"), "iteration is -3, expected a number"),
            (lambda t, m: m.update(iteration="9" * 5000), "iteration is " + "9" * 60 + "..., expected a number"),
            (lambda t, m: t["second.token_head.bias"].fill_(-1), "second.token_head.bias holds negative values"),
            (lambda t, m: t["first.token_head.bias"].fill_(torch.nan), "first.token_head.bias holds 26 NaN"),
            (lambda t, m: t.pop("first.token_head.bias"), "1 of 53 tensors are missing, the first is token_head.bias"),
            (
                lambda t, m: t.update({"second.token_head.bias": torch.zeros(26).half()}),
                "second.token_head.bias is F16",
            ),
        ],
    )
    def test_wrong_optimizer_files(self, directory, change, message):
        path = directory / "optimizer.safetensors"
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = safetensors.torch.load_file(path)
        change(tensors, metadata)
        safetensors.torch.save_file(tensors, path, metadata=metadata)
        assert refusal(directory).startswith(f"optimizer.safetensors: {message}")


class TestGoTerms:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda text: text.replace("go_id", "id"), "the first line is not index go_id name, separated by tabs"),
            (lambda text: "", "the file is empty"),
            (lambda text: text.rpartition("6\tGO")[0], "6 GO terms, expected one for each of 7 outputs"),
            (lambda text: text.replace("3\tGO:", "4\tGO:"), "line 5: expected index 3, GO id and name"),
            (lambda text: text.replace("GO:0000003", "GO:3"), "GO term 3 is GO:3, expected GO:0000000"),
            (lambda text: text.replace("GO:0000003", "GO:0000002"), "a GO term is listed twice"),
            (lambda text: text.replace("process 3", "proc\tess 3"), "line 5: expected index 3, GO id and name"),
            (lambda text: text.replace("process 3", "proc\x1b[2Jess 3"), "the name of GO term 3 holds control"),
        ],
    )
    def test_wrong_tables(self, directory, change, message):
        path = directory / "go_terms.tsv"
        path.write_text(change(path.read_text()))
        assert refusal(directory).startswith(f"go_terms.tsv: {message}")

    @pytest.mark.parametrize(
        "terms", [TERMS[:-1], (*TERMS[:-1], GoTerm("GO:1", "x")), (*TERMS[:-1], GoTerm("GO:0009999", "a\tb"))]
    )
    def test_wrong_terms_are_not_written(self, tmp_path, odd_checkpoint, terms):
        with pytest.raises(CheckpointError, match="GO term"):
            write_directory(
                tmp_path / "m", LoadedCheckpoint(ODD_SIZES, odd_checkpoint.state_dict, None, "", None, terms)
            )
        assert list(tmp_path.iterdir()) == []
