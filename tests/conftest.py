"""Fixtures that several folders of tests share."""

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proteinbert_fast import ProteinBert, ProteinBertConfig, Tokenizer

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "leave out the tests that are marked long, or run them alone"
    parser.addoption("--long", choices=("without", "only"), default="without", help=what)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every test runs with one value of --long and not with the other, whatever -m and -k say."""
    wants_long = config.getoption("--long") == "only"
    kept, left_out = [], []
    for item in items:
        (kept if (item.get_closest_marker("long") is not None) == wants_long else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """Numbers made by running the original; tests/data/golden/README.md explains every key."""
    with np.load(GOLDEN / "tiny_io.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def golden_meta() -> dict[str, Any]:
    return json.loads((GOLDEN / "tiny_meta.json").read_text())


@pytest.fixture(scope="session")
def tiny_pickle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original's pickle of the two-block model behind the golden numbers."""
    path = tmp_path_factory.mktemp("golden") / "tiny_model.pkl"
    path.write_bytes(lzma.decompress((GOLDEN / "tiny_model.pkl.xz").read_bytes()))
    return path


@pytest.fixture
def tiny_model(tiny_pickle: Path) -> ProteinBert:
    """The two-block model behind the golden numbers, float32, in evaluation mode."""
    return ProteinBert.from_pretrained(tiny_pickle)


@pytest.fixture(scope="session")
def real_sequences() -> list[str]:
    """200 real Swiss-Prot proteins."""
    lines = (DATA / "swissprot_200.tsv").read_text().splitlines()[1:]
    return [line.split("\t")[-1] for line in lines]


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 200 real proteins, a fifth of them for validation, some without any GO term."""
    pytest.importorskip("fastobo")
    from proteinbert_fast.data.corpus import build_corpus

    folder = tmp_path_factory.mktemp("corpus")
    rows = [line.split("\t") for line in (DATA / "swissprot_200.tsv").read_text().splitlines()[1:]]
    (folder / "proteins.fasta").write_text("".join(f">{row[0]}\n{row[4]}\n" for row in rows))
    (folder / "terms.tsv").write_text("".join(f"{row[0]}\t{';'.join(row[1:4])}\n" for row in rows[:150]))
    build_corpus(
        [folder / "proteins.fasta"], folder / "corpus.h5", annotations=[folder / "terms.tsv"],
        ontology=DATA / "corpus" / "go_2013_part.obo.gz", min_count=3, validation=0.2, progress=False,
    )  # fmt: skip
    return folder / "corpus.h5"


@pytest.fixture
def small_config() -> ProteinBertConfig:
    """Sizes that the CPU kernels take and that run in milliseconds."""
    return ProteinBertConfig(n_annotations=30, d_local=32, d_global=64, n_blocks=2, n_heads=4, d_key=16)


@pytest.fixture
def small_model(small_config: ProteinBertConfig) -> ProteinBert:
    torch.manual_seed(0)
    return ProteinBert(small_config).eval()


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture
def two_threads():
    """More than one thread, whatever the environment says: for what must not depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory():
    """Fills uninitialised tensors with NaN, so that a row that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
