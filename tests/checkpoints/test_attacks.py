"""Nothing in a checkpoint from a stranger runs, and every refusal is one clear line."""

import copyreg
import gc
import pickle
import sys
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from proteinbert_fast.checkpoints import load_pretrained, read_official
from proteinbert_fast.checkpoints.restricted_pickle import MAX_OPCODES, UnsafePickleError, read_pickle
from proteinbert_fast.errors import CheckpointError

from .attacks import EXTENSION_CODE, FORBIDDEN_NAMES, P3, P4, STOP, live_attacks, malformed, name, stacked, text
from .conftest import NANO, NANO_FILES

LIVE = sorted(live_attacks(Path("unused")))
MALFORMED = malformed()

# What Python reports before it runs, imports or looks up anything.
FORBIDDEN_EVENTS = (
    "pickle.find_class", "import", "exec", "compile", "os.system", "os.exec", "os.spawn", "os.posix_spawn",
    "subprocess.Popen", "ctypes", "socket", "marshal", "code.", "function.__new__", "shutil", "os.remove", "os.rename",
)  # fmt: skip

_watched: list[str] | None = None


def _watch(event: str, arguments: object) -> None:
    if _watched is not None and event.startswith(FORBIDDEN_EVENTS):
        _watched.append(event)


sys.addaudithook(_watch)


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """Names of the events above that happen during the test."""
    global _watched
    _watched = events = []
    yield events
    _watched = None


@pytest.fixture
def registered_extension() -> Iterator[None]:
    """EXT1, EXT2 and EXT4 reach what a program has registered; here that is os.system."""
    copyreg.add_extension("posix", "system", EXTENSION_CODE)
    yield
    copyreg.remove_extension("posix", "system", EXTENSION_CODE)
    copyreg.clear_extension_cache()


def refusal(path: Path) -> str:
    """The line of the error that reading ``path`` must raise, checked to be a clear line."""
    with pytest.raises(CheckpointError) as error:
        read_official(path)
    line = str(error.value)
    assert line.startswith(f"{path}: ")
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < len(str(path)) + 300
    return line.removeprefix(f"{path}: ")


def test_there_are_enough_attacks():
    assert len(LIVE) + len(FORBIDDEN_NAMES) + len(MALFORMED) > 200


@pytest.mark.usefixtures("registered_extension")
@pytest.mark.parametrize("attack", LIVE)
def test_attacks_work_on_plain_pickle(tmp_path, attack):
    sentinel = tmp_path / "sentinel"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = pickle.loads(live_attacks(sentinel)[attack])
        except Exception:
            found = None
        if hasattr(found, "wait"):
            found.wait()
    assert sentinel.exists()


@pytest.mark.usefixtures("registered_extension")
@pytest.mark.parametrize("attack", LIVE)
def test_attacks_do_nothing_here(tmp_path, attack, request):
    sentinel, path = tmp_path / "sentinel", tmp_path / "evil.pkl"
    path.write_bytes(live_attacks(sentinel)[attack])
    watched = request.getfixturevalue("watched")
    line = refusal(path)
    assert watched == []
    assert not sentinel.exists()
    assert "nothing in it was run" in line


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors", ".bin", ""])
def test_the_suffix_does_not_matter(tmp_path, suffix, request):
    sentinel, path = tmp_path / "sentinel", tmp_path / f"evil{suffix}"
    path.write_bytes(live_attacks(sentinel)["os.system by REDUCE"])
    watched = request.getfixturevalue("watched")
    with pytest.raises(CheckpointError):
        load_pretrained(path)
    assert watched == []
    assert not sentinel.exists()


@pytest.mark.parametrize("opcode", ["GLOBAL", "STACK_GLOBAL"])
@pytest.mark.parametrize(("module", "attribute"), FORBIDDEN_NAMES, ids=lambda name: ascii(name))
def test_other_names_are_refused(tmp_path, opcode, module, attribute, request):
    path = tmp_path / "evil.pkl"
    content = P3 + name(module, attribute) if opcode == "GLOBAL" else P4 + stacked(module, attribute)
    path.write_bytes(content + text("x") + b"\x85R" + STOP)
    watched = request.getfixturevalue("watched")
    line = refusal(path)
    assert watched == []
    if module.isascii() and module.isalpha() and attribute.isalpha():
        assert f"it asks for {module}.{attribute}, and weights need numpy arrays only" in line


@pytest.mark.parametrize("attack", MALFORMED)
def test_malformed_pickles_are_refused(tmp_path, attack, request):
    path = tmp_path / "evil.pkl"
    path.write_bytes(MALFORMED[attack])
    watched = request.getfixturevalue("watched")
    started = time.process_time()
    refusal(path)
    assert watched == []
    assert time.process_time() - started < 20  # the opcode limit; without it "deep" files would take minutes


@pytest.mark.parametrize(
    "attack",
    ["memo 2**32 - 1", "memo bomb", "billion laughs", "billion laughs as weights", "arrays that share memory",
     "array of sizes 0 and 2**31", "BINBYTES8 of 2**64 - 1", "frame of 2**64 - 1", "LONG4 of 2 GB",
     "dtype V with a count"],
)  # fmt: skip
def test_memory_stays_in_proportion(tmp_path, attack):
    path = tmp_path / "evil.pkl"
    path.write_bytes(MALFORMED[attack])
    gc.collect()
    tracemalloc.start()
    refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 + 60 * len(MALFORMED[attack])


@pytest.mark.parametrize("path", NANO_FILES, ids=lambda path: path.stem)
def test_every_cut_is_refused(path):
    content = path.read_bytes()
    for length in [*range(600), *range(600, len(content), 37), *range(len(content) - 60, len(content))]:
        with pytest.raises(UnsafePickleError) as error:
            read_pickle(content[:length])
        assert str(error.value).isprintable()


def test_the_hints_for_honest_files(tmp_path):
    path = tmp_path / "honest.pkl"
    for case, hint in [
        ("bytes by protocol 2", "it is a pickle of protocol 2; save it with protocol 3 or 4"),
        ("arrays by protocol 5", "it is a pickle of protocol 5; save it with protocol 3 or 4"),
        ("two pickles", "bytes follow its end"),
        ("no stop", "it is cut off"),
        ("empty", "the file is empty"),
    ]:
        path.write_bytes(MALFORMED[case])
        assert hint in refusal(path)
    path.write_bytes(P3 + name("_codecs", "encode") + STOP)
    assert "protocol 2 writes bytes that way, save the file with protocol 3 or 4" in refusal(path)
    path.write_bytes(P4 + stacked("numpy._core.numeric", "_frombuffer") + STOP)
    assert "protocol 5 writes arrays that way" in refusal(path)


def test_control_characters_of_a_name_do_not_reach_the_terminal(tmp_path):
    path = tmp_path / "evil.pkl"
    path.write_bytes(P4 + stacked("evil\x1b[2J" + "m" * 200, "a\nb\rc\u202e") + STOP)
    assert r"evil\x1b[2Jmmm" in refusal(path)


def test_the_limits_leave_room_for_real_files():
    assert MAX_OPCODES > 10 * 13_000
    for path in NANO_FILES:
        read_pickle(path.read_bytes())


def test_files_that_are_no_files(tmp_path):
    assert refusal(tmp_path / "missing.pkl") == "no such file"
    assert refusal(tmp_path) == "not a regular file"
    assert refusal(Path("/dev/zero")) == "not a regular file"


def test_a_file_beyond_the_size_limit(tmp_path):
    path = tmp_path / "huge.pkl"
    with path.open("wb") as file:
        file.write(P3)
        file.truncate(2**33)  # a hole, no bytes on the disk
    assert refusal(path) == "over 4,294,967,296 bytes, more than such a file can hold"


def test_nothing_here_was_of_the_real_format():
    """The attacks stay attacks: the same reader takes the real files."""
    assert read_official(NANO).config.n_blocks == 1
