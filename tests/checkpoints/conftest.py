"""Fixtures of the checkpoint tests: small official files, and a web server that misbehaves on demand."""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import proteinbert_fast
from proteinbert_fast.checkpoints import LoadedCheckpoint, OptimizerState, read_official
from proteinbert_fast.checkpoints.layouts import state_dict_shapes
from proteinbert_fast.config import ProteinBertConfig

from ..conftest import GOLDEN

NANO = GOLDEN / "nano_model_lamb_step3_proto3.pkl"
NANO_FILES = [NANO, GOLDEN / "nano_model_lamb_step3_proto4.pkl", GOLDEN / "nano_model_adam_step3_proto4.pkl"]

# No two sizes are equal, so that a wrong transposition shows in a shape.
ODD_SIZES = ProteinBertConfig(
    n_annotations=7, d_local=5, d_global=12, n_blocks=2, n_heads=3, d_key=2, kernel_size=9, wide_dilation=5
)


def environment() -> dict[str, str]:
    """For programs that a test starts: they import the package that the test imports."""
    return os.environ | {"PYTHONPATH": str(Path(proteinbert_fast.__file__).parents[1])}


def random_state_dict(config: ProteinBertConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in state_dict_shapes(config).items()}


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


@pytest.fixture
def nano() -> LoadedCheckpoint:
    """The original's one-block model after three LAMB steps."""
    return read_official(NANO)


@pytest.fixture
def odd_checkpoint() -> LoadedCheckpoint:
    """Random weights and optimiser state whose sizes all differ."""
    second = {key: tensor.square() for key, tensor in random_state_dict(ODD_SIZES, 2).items()}
    state = OptimizerState(11, random_state_dict(ODD_SIZES, 1), second)
    return LoadedCheckpoint(ODD_SIZES, random_state_dict(ODD_SIZES), None, "made here", state)


@dataclass
class Page:
    """What the server does for one path.

    ``break_after``: bytes of the body that each answer gives before the connection is cut.
    ``failures``: status of each answer, before answers as they should be.
    """

    body: bytes = b""
    status: int = 200
    ranges: bool = True
    announce_length: bool = True
    break_after: list[int] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    redirect: str | None = None
    content_range: str | None = None


@dataclass
class Web:
    """A web server on this machine: pages by path, and the (path, Range) of every request it got."""

    address: str
    pages: dict[str, Page]
    requests: list[tuple[str, str | None]]

    def serve(self, path: str, page: Page) -> str:
        self.pages[path] = page
        return self.address + path


def make_handler(pages: dict[str, Page], requests: list[tuple[str, str | None]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            requests.append((self.path, asked))
            page = pages.get(self.path, Page(status=404))
            self.close_connection = True
            if page.redirect is not None:
                self.send_response(302)
                self.send_header("Location", page.redirect)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            status = page.failures.pop(0) if page.failures else page.status
            body, start = page.body, 0
            if status == 200 and asked and page.ranges:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                if start >= len(body):
                    status, body = 416, b""
                else:
                    status, body = 206, body[start:]
            self.send_response(status)
            if status == 206:
                last = len(page.body) - 1
                self.send_header("Content-Range", page.content_range or f"bytes {start}-{last}/{len(page.body)}")
            if page.announce_length:
                self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body[: page.break_after.pop(0)] if page.break_after else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("no_proxy", "*")
    pages: dict[str, Page] = {}
    requests: list[tuple[str, str | None]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(pages, requests))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Web(f"http://127.0.0.1:{server.server_port}", pages, requests)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees or fills the caches of whoever runs it."""
    for name in ("PROTEINBERT_FAST_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PROTEINBERT_FAST_CACHE", str(tmp_path / "default-cache"))
