"""``proteinbert-fast convert``."""

import pickle

import pytest
import torch

from proteinbert_fast.checkpoints import GoTerm, LoadedCheckpoint, load_pretrained, write_directory
from proteinbert_fast.cli.main import main
from proteinbert_fast.config import ProteinBertConfig

from .conftest import NANO, ODD_SIZES, same_tensors


@pytest.fixture
def convert(capsys, monkeypatch, tmp_path):
    """Runs the command in an empty directory; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["convert", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_there_and_back_gives_the_same_bytes(convert, tmp_path):
    assert convert(NANO, "nano")[0] == 0
    assert convert("nano", "back.pkl")[0] == 0
    assert (tmp_path / "back.pkl").read_bytes() == NANO.read_bytes()
    assert sorted(path.name for path in (tmp_path / "nano").iterdir()) == [
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]


def test_summary(convert, tmp_path):
    code, out, err = convert(NANO, "nano")
    assert (code, err) == (0, "")
    digest = load_pretrained(tmp_path / "nano").sha256
    for line in [
        f"read {NANO}",
        "  sizes       5 GO terms, local 4, global 8, 1 blocks, 2 heads of 4, 9 taps (dilations 1 and 5)",
        "  weights     30 tensors, 999 parameters, float32",
        "  optimiser   state after 3 steps",
        "  GO terms    not named",
        "wrote nano/model.safetensors (",
        f"  sha256      {digest}",
        "read back: the same",
    ]:
        assert line in out


def test_single_file_and_no_optimizer(convert, tmp_path):
    code, _, err = convert(NANO, "nano.safetensors")
    assert code == 0
    assert err == "left out: optimiser state (a directory or .pkl keeps it)\n"
    code, out, err = convert(NANO, "bare.pkl", "--no-optimizer")
    assert (code, err) == (0, "")
    assert "optimiser   none" in out
    assert pickle.loads((tmp_path / "bare.pkl").read_bytes())[2] is None
    assert convert("nano.safetensors", "again.pkl")[0] == 0
    assert (tmp_path / "again.pkl").read_bytes() == (tmp_path / "bare.pkl").read_bytes()


def test_go_terms_are_kept_or_named(convert, tmp_path, odd_checkpoint):
    terms = tuple(GoTerm(f"GO:{index:07d}", f"term {index}") for index in range(7))
    write_directory(tmp_path / "odd", LoadedCheckpoint(ODD_SIZES, odd_checkpoint.state_dict, None, "", None, terms))
    code, out, err = convert("odd", "copy")
    assert (code, err) == (0, "")
    assert "GO terms    7 named" in out
    assert load_pretrained(tmp_path / "copy").go_terms == terms
    assert convert("odd", "odd.pkl")[2] == "left out: GO terms (a directory keeps them)\n"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_become_exact_float32(convert, tmp_path, odd_checkpoint, dtype):
    state = {key: tensor.to(dtype) for key, tensor in odd_checkpoint.state_dict.items()}
    write_directory(tmp_path / "half", LoadedCheckpoint(ODD_SIZES, state, None, ""))
    code, out, _ = convert("half", "half.pkl")
    assert code == 0
    assert str(dtype).removeprefix("torch.") in out
    written = load_pretrained(tmp_path / "half.pkl").state_dict
    assert same_tensors(written, {key: tensor.float() for key, tensor in state.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_rounded_on_demand(convert, tmp_path, odd_checkpoint, dtype):
    name = str(dtype).removeprefix("torch.")
    code, out, err = convert(NANO, "half", "--dtype", name)
    assert code == 0
    assert f"rounded     to {name}, by at most" in out
    assert err == "left out: optimiser state (it belongs to the weights before rounding)\n"
    rounded = load_pretrained(tmp_path / "half")
    whole = load_pretrained(NANO).state_dict
    assert same_tensors(rounded.state_dict, {key: tensor.to(dtype) for key, tensor in whole.items()})
    assert rounded.optimizer_state is None
    assert convert("half", "back", "--dtype", "float32")[0] == 0
    widened = {key: tensor.float() for key, tensor in rounded.state_dict.items()}
    assert same_tensors(load_pretrained(tmp_path / "back").state_dict, widened)


def test_the_same_type_rounds_nothing(convert, tmp_path):
    assert convert(NANO, "same", "--dtype", "float32")[::2] == (0, "")
    assert load_pretrained(tmp_path / "same").optimizer_state is not None


def test_values_beyond_float16_are_refused(convert, tmp_path, odd_checkpoint):
    state = dict(odd_checkpoint.state_dict)
    state["token_head.bias"] = torch.full_like(state["token_head.bias"], 70_000.0)
    write_directory(tmp_path / "large", LoadedCheckpoint(ODD_SIZES, state, None, ""))
    code, _, err = convert("large", "half", "--dtype", "float16")
    assert code == 1
    assert "token_head.bias holds" in err
    assert not (tmp_path / "half").exists()
    assert convert("large", "half", "--dtype", "bfloat16")[0] == 0


@pytest.mark.parametrize("name", ["out.pkl", "out.safetensors", "out"])
def test_existing_output_needs_overwrite(convert, tmp_path, name):
    assert convert(NANO, name, "--no-optimizer")[0] == 0
    code, out, err = convert(NANO, name)
    assert (code, out) == (1, "")
    assert err == f"proteinbert-fast: error: {name}: exists already; --overwrite replaces it\n"
    assert convert(NANO, name, "--overwrite")[0] == 0
    assert (load_pretrained(tmp_path / name).optimizer_state is None) == (name == "out.safetensors")


def test_outputs_that_cannot_be(convert, tmp_path, odd_checkpoint):
    write_directory(tmp_path / "odd", odd_checkpoint)
    (tmp_path / "taken").write_text("")
    (tmp_path / "dir.pkl").mkdir()
    for arguments, message in [
        (("odd", "out.pt"), "out.pt: .pt is not written; use .pkl, .safetensors or a directory"),
        (("odd", "out.h5"), "out.h5: .h5 is not written"),
        (("odd", "out.pkl", "--dtype", "float16"), "out.pkl: the original's pickle holds float32 only, not float16"),
        (("odd", "taken", "--overwrite"), "taken: a file is in the way of the directory"),
        (("odd", "dir.pkl", "--overwrite"), "dir.pkl: a directory is in the way of the file"),
        (("odd", "odd", "--overwrite"), "odd: IN and OUT are the same"),
        (("missing", "out.pkl"), "missing: no such file or directory"),
        (("taken", "out.pkl"), "taken: the file is empty"),
    ]:
        code, out, err = convert(*arguments)
        assert (code, out) == (1, "")
        assert err.startswith(f"proteinbert-fast: error: {message}")
        assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir.pkl", "odd", "taken"]


def test_a_directory_name_with_dots(convert, tmp_path):
    assert convert(NANO, "model-v1.0")[0] == 0
    assert (tmp_path / "model-v1.0" / "config.json").exists()


def test_a_dilation_that_the_original_cannot_hold(convert, tmp_path, nano):
    config = ProteinBertConfig(5, 4, 8, 1, 2, 4, 9, 3)
    write_directory(tmp_path / "wide", LoadedCheckpoint(config, nano.state_dict, None, ""))
    code, _, err = convert("wide", "wide.pkl")
    assert code == 1
    assert "the original's format has no place for wide_dilation 3" in err
    assert not (tmp_path / "wide.pkl").exists()


def test_wrong_use(convert):
    code, _, err = convert("only-one")
    assert code == 2
    assert "OUT" in err
