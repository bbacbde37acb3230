"""Whatever a file holds, reading it gives a checked checkpoint or one CheckpointError."""

import pickletools
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from proteinbert_fast.checkpoints import LoadedCheckpoint, load_pretrained, read_official, write_single_file
from proteinbert_fast.checkpoints.layouts import check_shapes
from proteinbert_fast.errors import CheckpointError

from .attacks import FORBIDDEN_NAMES, MARK, P3, REDUCE, array, data, name, number_type, raw_array, stacked, text
from .conftest import NANO, NANO_FILES

CONTENTS = [path.read_bytes() for path in NANO_FILES]
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
STARTS = [[place for _, _, place in pickletools.genops(content)] for content in CONTENTS]

settings.register_profile("fuzz", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FUZZ = settings.get_profile("fuzz")


def read_any(content: bytes, suffix: str = ".pkl") -> LoadedCheckpoint | None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"fuzzed{suffix}"
        path.write_bytes(content)
        try:
            checkpoint = read_official(path) if suffix == ".pkl" else load_pretrained(path)
        except CheckpointError as error:
            line = str(error)
            assert line.isprintable(), line
            return None
    shapes = {key: tuple(tensor.shape) for key, tensor in checkpoint.state_dict.items()}
    check_shapes(shapes, checkpoint.config, "fuzzed")
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint.state_dict.values())
    return checkpoint


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A real file with a few bytes replaced, inserted, removed, repeated or moved, often just at an opcode."""
    which = draw(st.integers(0, len(CONTENTS) - 1))
    content = bytearray(CONTENTS[which])
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.one_of(st.sampled_from(STARTS[which]), st.integers(0, len(content))))
        length = draw(st.integers(0, 12))
        new = draw(st.one_of(st.binary(max_size=12), st.sampled_from(OPCODES), st.just(bytes(content[place:][:40]))))
        kind = draw(st.sampled_from(["replace", "insert", "remove", "cut"]))
        if kind == "replace":
            content[place : place + len(new)] = new
        elif kind == "insert":
            content[place:place] = new
        elif kind == "remove":
            del content[place : place + length]
        else:
            del content[place:]
    return bytes(content)


PIECES = [
    *OPCODES, name("numpy", "ndarray"), name("numpy", "dtype"), name("numpy.core.multiarray", "_reconstruct"),
    name("numpy._core.multiarray", "scalar"), number_type(), number_type("i8"), raw_array(), raw_array() + b"q\x00",
    array(b"K\x01\x85", number_type(), data(bytes(4))), text("f4"), text("<"), data(bytes(8)),
    b"K\x05", b"h\x00", b"q\x01",
    MARK + b"K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb", b"C\x01b", b"K\x00\x85", REDUCE,
    *(name(*pair) for pair in FORBIDDEN_NAMES[:10]), *(stacked(*pair) for pair in FORBIDDEN_NAMES[:10]),
]  # fmt: skip


@settings(FUZZ, max_examples=400)
@given(mutated())
@example(CONTENTS[0])
def test_mutations_of_real_files(content):
    read_any(content)


@settings(FUZZ, max_examples=400)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join), st.sampled_from([b"\x80\x03", b"\x80\x04"]))
def test_programs_of_likely_pieces(program, protocol):
    read_any(protocol + program + b".")


@settings(FUZZ, max_examples=150)
@given(st.binary(max_size=300))
def test_random_bytes(content):
    read_any(content)
    read_any(P3 + content)


@settings(FUZZ, max_examples=150)
@given(st.integers(8, 900), st.binary(min_size=1, max_size=6), st.booleans())
def test_mutations_of_safetensors(place, new, insert):
    global _safetensors
    if not _safetensors:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "nano.safetensors"
            write_single_file(path, read_official(NANO))
            _safetensors = path.read_bytes()
    content = bytearray(_safetensors)
    content[place : place + (0 if insert else len(new))] = new
    read_any(bytes(content), ".safetensors")


_safetensors = b""


def test_the_fuzzer_can_tell(tmp_path):
    """The unchanged file passes the same door, so that refusals are not all there is."""
    checkpoint = read_any(CONTENTS[0])
    assert checkpoint is not None
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint.state_dict.values())
