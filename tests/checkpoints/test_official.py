"""The original's pickle: read, checked, and written so that the original reads it."""

import hashlib
import lzma
import pickle
import pickletools

import numpy as np
import pytest
import torch

from proteinbert_fast import ProteinBert, Tokenizer
from proteinbert_fast.checkpoints import LoadedCheckpoint, OptimizerState, read_official, write_official
from proteinbert_fast.checkpoints.layouts import official_from_state_dict, official_names, state_dict_shapes
from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.errors import CheckpointError

from ..conftest import GOLDEN
from .conftest import NANO, NANO_FILES, ODD_SIZES, same_tensors

NANO_NAMES = official_names(1)


def trusted(path):
    """What plain pickle gives; only ever for files made here."""
    return pickle.loads(path.read_bytes())


def assert_same_as_pickle(checkpoint: LoadedCheckpoint, content) -> None:
    n_annotations, weights, optimizer = content
    config, state = checkpoint.config, checkpoint.optimizer_state
    assert config.n_annotations == n_annotations
    groups = [(checkpoint.state_dict, weights)]
    if optimizer is None:
        assert state is None
    else:
        assert state.iteration == optimizer[0]
        n = len(weights)
        groups += [(state.first_moments, optimizer[1 : n + 1]), (state.second_moments, optimizer[n + 1 :])]
    for ours, theirs in groups:
        for mine, array in zip(official_from_state_dict(ours, config), theirs, strict=True):
            assert array.dtype == np.float32
            np.testing.assert_array_equal(mine, array)


@pytest.mark.parametrize("path", NANO_FILES, ids=lambda path: path.stem)
def test_reads_what_pickle_reads(path):
    checkpoint = read_official(path)
    assert checkpoint.config == ProteinBertConfig(5, 4, 8, 1, 2, 4, 9, 5)
    assert checkpoint.optimizer_state.iteration == 3
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.source == str(path.resolve())
    assert_same_as_pickle(checkpoint, trusted(path))


def test_reads_the_two_block_model(tiny_pickle):
    checkpoint = read_official(tiny_pickle)
    assert checkpoint.config == ProteinBertConfig(24, 32, 64, 2, 4, 16, 9, 5)
    assert_same_as_pickle(checkpoint, trusted(tiny_pickle))


def test_optimizer_state_can_be_left_out():
    assert read_official(NANO, optimizer=False).optimizer_state is None


def test_writes_the_originals_bytes(tmp_path, nano, tiny_pickle):
    digest = write_official(tmp_path / "nano.pkl", nano)
    assert (tmp_path / "nano.pkl").read_bytes() == NANO.read_bytes()
    assert digest == hashlib.sha256(NANO.read_bytes()).hexdigest()
    write_official(tmp_path / "tiny.pkl", read_official(tiny_pickle))
    assert (tmp_path / "tiny.pkl").read_bytes() == tiny_pickle.read_bytes()


@pytest.mark.parametrize("path", NANO_FILES, ids=lambda path: path.stem)
def test_read_write_read(tmp_path, path):
    first = read_official(path)
    write_official(tmp_path / "out.pkl", first)
    second = read_official(tmp_path / "out.pkl")
    assert first.config == second.config
    assert same_tensors(first.state_dict, second.state_dict)
    assert same_tensors(first.optimizer_state.first_moments, second.optimizer_state.first_moments)
    assert same_tensors(first.optimizer_state.second_moments, second.optimizer_state.second_moments)


def test_plain_pickle_reads_what_is_written(tmp_path, odd_checkpoint):
    path = tmp_path / "odd.pkl"
    write_official(path, odd_checkpoint)
    content = trusted(path)
    assert_same_as_pickle(odd_checkpoint, content)
    # What the original's loader does with the values, and what Keras' set_weights accepts.
    n_annotations, weights, optimizer = content
    assert type(n_annotations) is int
    assert all(type(array) is np.ndarray and array.flags.writeable for array in weights + optimizer[1:])
    assert type(optimizer[0]) is np.int64


def test_written_names_are_known_to_old_and_new_numpy(tmp_path, odd_checkpoint):
    write_official(tmp_path / "odd.pkl", odd_checkpoint)
    opcodes = list(pickletools.genops((tmp_path / "odd.pkl").read_bytes()))
    assert {argument for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"} == {
        "numpy.core.multiarray _reconstruct",
        "numpy.core.multiarray scalar",
        "numpy ndarray",
        "numpy dtype",
    }


def test_without_optimizer_state_the_third_part_is_none(tmp_path, nano):
    path = tmp_path / "bare.pkl"
    write_official(path, LoadedCheckpoint(nano.config, nano.state_dict, None, ""))
    assert trusted(path)[2] is None
    assert read_official(path).optimizer_state is None


@pytest.mark.slow
def test_the_published_sizes_give_the_published_number_of_bytes(tmp_path):
    config = ProteinBertConfig()
    zeros = {key: torch.zeros(shape) for key, shape in state_dict_shapes(config).items()}
    path = tmp_path / "full.pkl"
    write_official(path, LoadedCheckpoint(config, zeros, None, "", OptimizerState(92400, zeros, zeros)))
    assert path.stat().st_size == 191_800_918
    checkpoint = read_official(path, optimizer=False)
    assert checkpoint.config == config
    path.unlink()


def test_model_gives_the_originals_numbers_from_either_protocol(golden):
    tokens = torch.from_numpy(golden["nano_tokens"])
    annotations = torch.from_numpy(golden["nano_annotations"]).float()
    for path in (NANO, GOLDEN / "nano_model_lamb_step3_proto4.pkl"):
        model = ProteinBert.from_pretrained(path, backend="reference")
        with torch.no_grad():
            out = model(tokens, annotations)
        expected = torch.from_numpy(golden["nano_lamb_output_seq"]).float()
        torch.testing.assert_close(out.token_probabilities, expected, atol=5e-6, rtol=0)


def test_model_survives_the_original_format(tmp_path, small_model, small_config):
    path = tmp_path / "small.pkl"
    write_official(path, LoadedCheckpoint(small_config, small_model.state_dict(), None, ""))
    again = ProteinBert.from_pretrained(path)
    batch = Tokenizer()(["MKTAYIAKQR", "M"])
    with torch.no_grad():
        assert torch.equal(small_model(batch).global_state, again(batch).global_state)


def rewritten(tmp_path, change, protocol=4):
    """The nano file after a change to its content, as numpy and pickle of this machine write it."""
    n_annotations, weights, optimizer = trusted(NANO)
    content = [n_annotations, weights, optimizer]
    changed = change(content)
    content = content if changed is None else changed
    path = tmp_path / "changed.pkl"
    path.write_bytes(pickle.dumps(tuple(content) if isinstance(content, list) else content, protocol))
    return path


def at(name):
    return NANO_NAMES.index(name)


@pytest.mark.parametrize("protocol", [3, 4])
def test_reads_what_this_numpy_writes(tmp_path, nano, protocol):
    checkpoint = read_official(rewritten(tmp_path, lambda content: None, protocol))
    assert same_tensors(checkpoint.state_dict, nano.state_dict)


def test_reads_fortran_order(tmp_path, nano):
    def change(content):
        content[1] = [np.asfortranarray(array) for array in content[1]]

    assert same_tensors(read_official(rewritten(tmp_path, change)).state_dict, nano.state_dict)


def set_weight(name, make):
    def change(content):
        content[1][at(name)] = make(content[1][at(name)])

    return change


def set_optimizer(index, make):
    def change(content):
        content[2][index] = make(content[2][index])

    return change


def with_value(value):
    def make(array):
        array = array.copy()
        array.flat[0] = value
        return array

    return make


STRUCTURE = {
    "not a tuple": (lambda c: 1, "holds a number, expected a tuple of 3"),
    "two parts": (lambda c: c[:2], "holds a tuple of 2, expected a tuple of 3"),
    "list of three": (lambda c: [[c]], "holds a tuple of 1"),
    "terms as text": (lambda c: ["5", *c[1:]], "starts with a text, expected the number of GO terms"),
    "terms as truth value": (lambda c: [True, *c[1:]], "starts with a truth value"),
    "terms as numpy": (lambda c: [np.int64(5), *c[1:]], "starts with a scalar"),
    "no terms": (lambda c: [0, *c[1:]], "number of GO terms is 0"),
    "negative terms": (lambda c: [-5, *c[1:]], "number of GO terms is -5"),
    "too many terms": (lambda c: [2_000_000_000, *c[1:]], "number of GO terms is 2000000000"),
    "other number of terms": (
        lambda c: [6, *c[1:]],
        "dense-global-input/kernel has 5 rows, but there are 6 GO terms",
    ),
    "weights as tuple": (
        lambda c: [c[0], tuple(c[1]), c[2]],
        "weights are a tuple, expected a list of arrays",
    ),
    "one weight short": (
        lambda c: [c[0], c[1][:-1], c[2]],
        "29 weight arrays, expected 7 + 23 for each block",
    ),
    "no weights": (lambda c: [c[0], [], c[2]], "0 weight arrays"),
    "weights as number": (
        set_weight("output-seq/bias", lambda a: 3),
        "output-seq/bias is a number, expected a float32 array",
    ),
    "float64": (
        set_weight("narrow-conv-block1/kernel", lambda a: a.astype(np.float64)),
        "narrow-conv-block1/kernel is float64, expected float32",
    ),
    "int32": (
        set_weight("output-seq/kernel", lambda a: a.astype(np.int32)),
        "output-seq/kernel is int32, expected float32",
    ),
    "transposed dense": (
        set_weight("output-annotations/kernel", lambda a: a.T),
        "output-annotations/kernel has shape (5, 8), expected (8, 5)",
    ),
    "other convolution": (
        set_weight("wide-conv-block1/kernel", lambda a: a[:7]),
        "wide-conv-block1/kernel has shape (7, 4, 4), expected (9, 4, 4)",
    ),
    "even convolution": (
        set_weight("narrow-conv-block1/kernel", lambda a: a[:8]),
        "the shapes of its arrays fit no model: config: kernel_size must be odd, got 8",
    ),
    "flat convolution": (
        set_weight("narrow-conv-block1/kernel", lambda a: a.ravel()),
        "narrow-conv-block1/kernel has shape (144,), expected (taps, local, local)",
    ),
    "other vocabulary": (
        set_weight("embedding-seq-input/embeddings", lambda a: a[:25]),
        "embedding-seq-input/embeddings has 25 rows, expected 26",
    ),
    "heads that do not divide": (
        set_weight("global-attention-block1/Wq", lambda a: np.concatenate([a, a[:1]])),
        "the shapes of its arrays fit no model",
    ),
    "no head": (
        set_weight("global-attention-block1/Wq", lambda a: a[:0]),
        "global-attention-block1/Wq has shape (0, 8, 4), expected (heads, global, key)",
    ),
    "NaN": (
        set_weight("seq-merge1-norm-block1/gamma", with_value(np.nan)),
        "seq-merge1-norm-block1/gamma holds 1 NaN or infinite values, expected numbers",
    ),
    "infinity": (
        set_weight("output-annotations/bias", with_value(-np.inf)),
        "output-annotations/bias holds 1 NaN or infinite values",
    ),
    "optimiser as tuple": (
        lambda c: [*c[:2], tuple(c[2])],
        "optimiser weights are a tuple, expected a list or None",
    ),
    "optimiser short": (lambda c: [*c[:2], c[2][:-1]], "60 optimiser weights, expected 61"),
    "optimiser without iteration": (set_optimizer(0, lambda a: 3), "optimiser iteration is a number"),
    "iteration as float": (set_optimizer(0, lambda a: np.float32(3)), "optimiser iteration is float32"),
    "negative iteration": (set_optimizer(0, lambda a: np.int64(-1)), "optimiser iteration is -1"),
    "moment of other shape": (
        set_optimizer(1 + 3, lambda a: a.T),
        "first moment of global-to-seq-dense-block1/kernel has shape (4, 8), expected (8, 4)",
    ),
    "moment of other type": (
        set_optimizer(1 + 30, lambda a: a.astype(np.float64)),
        "second moment of dense-global-input/kernel is float64",
    ),
    "moment with NaN": (
        set_optimizer(2, with_value(np.nan)),
        "first moment of dense-global-input/bias holds 1 NaN",
    ),
    "negative second moment": (
        set_optimizer(31, with_value(-1)),
        "second moment of dense-global-input/kernel holds negative values",
    ),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_wrong_content_is_named(tmp_path, case):
    change, message = STRUCTURE[case]
    path = rewritten(tmp_path, change)
    with pytest.raises(CheckpointError) as error:
        read_official(path)
    line = str(error.value)
    assert line.startswith(f"{path}: {message}")
    assert "\n" not in line


def test_big_endian_is_refused(tmp_path):
    path = rewritten(tmp_path, set_weight("output-seq/bias", lambda a: a.astype(">f4")))
    with pytest.raises(CheckpointError, match="byte order >, expected little"):
        read_official(path)


def test_a_dilation_that_the_original_cannot_hold(tmp_path):
    config = ProteinBertConfig(5, 4, 8, 1, 2, 4, 9, 3)
    checkpoint = LoadedCheckpoint(config, read_official(NANO).state_dict, None, "")
    with pytest.raises(CheckpointError, match="no place for wide_dilation 3"):
        write_official(tmp_path / "x.pkl", checkpoint)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, nano, monkeypatch):
    path = tmp_path / "weights.pkl"
    write_official(path, nano)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        write_official(path, nano)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_wrong_weights_are_not_written(tmp_path, odd_checkpoint):
    odd_checkpoint.state_dict["token_head.bias"][0] = torch.inf
    with pytest.raises(CheckpointError, match=r"token_head\.bias holds 1 NaN"):
        write_official(tmp_path / "x.pkl", odd_checkpoint)
    assert odd_checkpoint.config == ODD_SIZES
    assert list(tmp_path.iterdir()) == []


def test_compressed_fixture_is_refused_by_name(tmp_path):
    path = GOLDEN / "tiny_model.pkl.xz"
    assert lzma.decompress(path.read_bytes())[:2] == b"\x80\x03"
    with pytest.raises(CheckpointError, match="this is an xz file; unpack it first"):
        read_official(path)
