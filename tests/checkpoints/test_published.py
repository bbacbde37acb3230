"""Fetching published weights into the cache, from a server that behaves well and badly."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from proteinbert_fast import ProteinBert
from proteinbert_fast.cache import cache_directory
from proteinbert_fast.checkpoints import PUBLISHED, PublishedCheckpoint, load_pretrained, published
from proteinbert_fast.errors import CheckpointError

from .conftest import NANO, Page, Web, environment, same_tensors

CONTENT = NANO.read_bytes()
NAME = "nano-test"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:cffb53\nsize 16536\n"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def publish(web: Web, monkeypatch: pytest.MonkeyPatch):
    """Registers the nano file as published at these pages of the server, tried in order."""

    def register(*pages: Page) -> None:
        urls = tuple(web.serve(f"/mirror{index}/nano.pkl", page) for index, page in enumerate(pages))
        entry = PublishedCheckpoint(
            "nano.pkl", urls, len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "https://example.org/nano"
        )
        monkeypatch.setitem(PUBLISHED, NAME, entry)

    return register


def fetch(cache: Path) -> bytes:
    path = published.fetch_published(NAME, offline=False, cache_dir=cache)
    assert path == cache / "nano.pkl"
    assert sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock")) == ["nano.pkl"]
    return path.read_bytes()


def failure(cache: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        published.fetch_published(NAME, offline=False, cache_dir=cache)
    line = str(error.value)
    assert line.isprintable()
    assert not (cache / "nano.pkl").exists()
    return line


def test_the_published_table():
    entry = PUBLISHED["proteinbert"]
    assert entry.size == 191_800_918
    assert entry.sha256 == "cffb53e237e49fa91f19a4c8bc0898dcfd75fd12eab7833d6e95b36c02ebacbf"
    assert all(url.startswith("https://") for url in entry.urls)
    assert len(entry.urls) >= 2


def test_fetched_once(cache, publish, web):
    publish(Page(CONTENT))
    assert fetch(cache) == CONTENT
    assert fetch(cache) == CONTENT
    assert web.requests == [("/mirror0/nano.pkl", None)]


def test_model_by_published_name(cache, publish, nano):
    publish(Page(CONTENT))
    model = ProteinBert.from_pretrained(NAME, backend="reference", cache_dir=cache)
    assert model.checkpoint_source == NAME
    assert model.checkpoint_sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert same_tensors(dict(model.state_dict()), nano.state_dict)


def test_default_cache_is_the_environments(publish, tmp_path):
    publish(Page(CONTENT))
    assert load_pretrained(NAME).config.n_blocks == 1
    assert (tmp_path / "default-cache" / "nano.pkl").read_bytes() == CONTENT


def test_default_cache_without_environment(monkeypatch):
    monkeypatch.delenv("PROTEINBERT_FAST_CACHE")
    assert cache_directory() == Path.home() / ".cache" / "proteinbert_fast"


def test_redirects_keep_the_range(cache, publish, web):
    web.serve("/elsewhere", Page(CONTENT))
    publish(Page(redirect=f"{web.address}/elsewhere"))
    cache.mkdir()
    (cache / "nano.pkl.part").write_bytes(CONTENT[:1000])
    assert fetch(cache) == CONTENT
    assert web.requests[-1] == ("/elsewhere", "bytes=1000-")


@pytest.mark.parametrize("announce_length", [True, False])
def test_goes_on_after_cut_connections(cache, publish, web, announce_length):
    publish(Page(CONTENT, break_after=[5000, 0, 3000], announce_length=announce_length))
    assert fetch(cache) == CONTENT
    assert [asked for _, asked in web.requests] == [None, "bytes=5000-", "bytes=5000-", "bytes=8000-"]


def test_goes_on_in_a_later_call(cache, publish, web):
    publish(Page(CONTENT, break_after=[5000, 0, 0, 0]))
    assert "127.0.0.1: " in failure(cache)
    assert (cache / "nano.pkl.part").read_bytes() == CONTENT[:5000]
    web.requests.clear()
    assert fetch(cache) == CONTENT
    assert [asked for _, asked in web.requests] == ["bytes=5000-"]


def test_server_without_ranges_starts_again(cache, publish, web):
    publish(Page(CONTENT, ranges=False, break_after=[5000]))
    assert fetch(cache) == CONTENT
    assert [asked for _, asked in web.requests] == [None, "bytes=5000-"]


def test_server_that_answers_with_another_range(cache, publish):
    publish(Page(CONTENT, break_after=[5000], content_range=f"bytes 7000-16535/{len(CONTENT)}"))
    assert "it answered with another part of the file than asked for" in failure(cache)


@pytest.mark.parametrize(
    "part", [b"x" * 1000, CONTENT + b"more", b"x" * len(CONTENT), CONTENT[:999] + b"x"], ids=lambda part: str(len(part))
)
def test_a_wrong_part_is_thrown_away(cache, publish, part):
    publish(Page(CONTENT))
    cache.mkdir()
    (cache / "nano.pkl.part").write_bytes(part)
    assert fetch(cache) == CONTENT


def test_a_complete_part_needs_no_network(cache, publish, web):
    publish(Page(CONTENT))
    cache.mkdir()
    (cache / "nano.pkl.part").write_bytes(CONTENT)
    assert fetch(cache) == CONTENT
    assert web.requests == []


def test_next_place_after_a_failure(cache, publish, web):
    publish(Page(status=404), Page(LFS_POINTER), Page(CONTENT[:-1] + b"x"), Page(CONTENT))
    assert fetch(cache) == CONTENT
    assert [path for path, _ in web.requests] == [f"/mirror{index}/nano.pkl" for index in range(4)]


def test_next_place_goes_on_where_the_first_stopped(cache, publish, web):
    publish(Page(CONTENT, break_after=[5000, 0, 0, 0]), Page(CONTENT))
    assert fetch(cache) == CONTENT
    assert web.requests[-1] == ("/mirror1/nano.pkl", "bytes=5000-")


def test_a_busy_server_is_asked_again(cache, publish):
    publish(Page(CONTENT, failures=[503, 429]))
    assert fetch(cache) == CONTENT


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (Page(status=404), "HTTP 404 Not Found"),
        (Page(status=403), "HTTP 403 Forbidden"),
        (Page(status=500), "HTTP 500 Internal Server Error"),
        (Page(CONTENT + b"x"), "its file has 16,537 bytes, expected 16,536"),
        (Page(CONTENT + b"x", announce_length=False), "it has 16,537 bytes, expected 16,536"),
        (Page(CONTENT[:-1]), "its file has 16,535 bytes, expected 16,536"),
        (Page(b""), "its file has 0 bytes, expected 16,536"),
        (Page(CONTENT[:-1] + b"x"), "its SHA-256 is "),
        (Page(LFS_POINTER), "this is a git-lfs pointer, not the weights"),
        (Page(LFS_POINTER, announce_length=False), "this is a git-lfs pointer, not the weights"),
        (Page(b"<!DOCTYPE html><html>quota</html>"), "this is a web page, not the weights"),
        (Page(b"<html>" + b" " * (len(CONTENT) - 6)), "this is a web page, not the weights"),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{value.status}-{value.body[:6]!r}-{len(value.body)}",
)
def test_a_place_without_the_file_is_named(cache, publish, page, reason):
    publish(page)
    line = failure(cache)
    assert line.startswith(f"{NAME}: could not be fetched (127.0.0.1: {reason}")
    assert "download https://example.org/nano by hand (16,536 bytes) and give the path of the file" in line
    if page.status == 200 and page.announce_length:
        assert not (cache / "nano.pkl.part").exists()


def test_no_place_can_be_reached(cache, publish, web, monkeypatch):
    publish(Page(CONTENT))
    entry = PUBLISHED[NAME]
    urls = ("http://127.0.0.1:1/nano.pkl", "http://127.0.0.1:2/nano.pkl")
    monkeypatch.setitem(PUBLISHED, NAME, PublishedCheckpoint("nano.pkl", urls, entry.size, entry.sha256, entry.page))
    line = failure(cache)
    assert "(127.0.0.1: Connection refused; 127.0.0.1: Connection refused)" in line
    assert "by hand" in line


class TestOffline:
    @pytest.mark.parametrize("variable", ["PROTEINBERT_FAST_OFFLINE", "HF_HUB_OFFLINE", None])
    def test_without_the_file(self, cache, publish, web, monkeypatch, variable):
        publish(Page(CONTENT))
        if variable:
            monkeypatch.setenv(variable, "1")
        with pytest.raises(CheckpointError) as error:
            load_pretrained(NAME, offline=None if variable else True, cache_dir=cache)
        assert str(error.value) == (
            f"{NAME}: not in the cache ({cache / 'nano.pkl'}), and offline: "
            "download https://example.org/nano by hand (16,536 bytes) and give the path of the file"
        )
        assert web.requests == []
        assert not cache.exists()

    def test_with_the_file(self, cache, publish, web, monkeypatch):
        publish(Page(CONTENT))
        fetch(cache)
        web.requests.clear()
        monkeypatch.setenv("PROTEINBERT_FAST_OFFLINE", "true")
        assert load_pretrained(NAME, cache_dir=cache).source == NAME
        assert web.requests == []

    def test_argument_goes_before_environment(self, cache, publish, monkeypatch):
        publish(Page(CONTENT))
        monkeypatch.setenv("PROTEINBERT_FAST_OFFLINE", "1")
        assert load_pretrained(NAME, offline=False, cache_dir=cache).source == NAME

    @pytest.mark.parametrize("value", ["", "0", "no", "false"])
    def test_values_that_do_not_mean_offline(self, monkeypatch, value):
        monkeypatch.setenv("PROTEINBERT_FAST_OFFLINE", value)
        assert not published.is_offline()


@pytest.mark.parametrize(
    ("content", "reason"), [(CONTENT[:-1], "it has 16,535 bytes"), (CONTENT[:-1] + b"x", "its SHA-256 is ")]
)
def test_a_damaged_file_in_the_cache_is_not_used(cache, publish, web, content, reason):
    publish(Page(CONTENT))
    cache.mkdir()
    (cache / "nano.pkl").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        load_pretrained(NAME, cache_dir=cache)
    assert str(error.value).startswith(f"{cache / 'nano.pkl'}: not the published file: {reason}")
    assert "delete it and try again" in str(error.value)
    assert web.requests == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(cache, publish):
    publish(Page(CONTENT))
    cache.mkdir()
    (cache / "nano.pkl.part").symlink_to("/dev/full")
    line = failure(cache)
    assert "nano.pkl.part: cannot be written: No space left on device; 16,536 bytes are needed there" in line
    assert "PROTEINBERT_FAST_CACHE" in line


def test_a_file_size_limit_leaves_a_part_to_go_on_with(cache, publish, web):
    publish(Page(CONTENT))
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
from pathlib import Path
from proteinbert_fast.checkpoints import published
published.PUBLISHED[{NAME!r}] = published.{PUBLISHED[NAME]!r}
from proteinbert_fast.errors import CheckpointError
try:
    published.fetch_published({NAME!r}, offline=False, cache_dir=Path({str(cache)!r}))
except CheckpointError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment()
    )
    assert "nano.pkl.part: cannot be written: File too large" in result.stdout
    part = (cache / "nano.pkl.part").read_bytes()
    assert part == CONTENT[: len(part)]
    assert fetch(cache) == CONTENT


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_may_not_be_written(cache, publish):
    publish(Page(CONTENT))
    cache.mkdir(mode=0o500)
    assert "cannot be used as a cache: Permission denied" in failure(cache)


def test_a_file_where_the_cache_should_be(cache, publish):
    publish(Page(CONTENT))
    cache.write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be used as a cache: .*PROTEINBERT_FAST_CACHE"):
        load_pretrained(NAME, cache_dir=cache)


def test_several_at_once_fetch_once(cache, publish, web):
    publish(Page(CONTENT))
    failures = []

    def run() -> None:
        try:
            assert published.fetch_published(NAME, offline=False, cache_dir=cache).read_bytes() == CONTENT
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(web.requests) == 1


def test_paths_are_never_fetched(tmp_path, monkeypatch, web, publish):
    publish(Page(CONTENT))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        load_pretrained(Path(NAME))
    with pytest.raises(CheckpointError, match="no such file or directory"):
        load_pretrained(f"./{NAME}")
    assert web.requests == []
