"""The package as a stranger meets it: what importing costs, what the metadata say, whether pages are true."""

import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import proteinbert_fast
from proteinbert_fast.cli.main import COMMANDS, main
from proteinbert_fast.data.fasta import read_fasta

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PACKAGE = Path(proteinbert_fast.__file__).parent
CARDS = sorted(PACKAGE.glob("weights/*/README.md"))
PAGES = sorted({*GUIDES, *ROOT.glob("*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("benchmarks/*.md"), *CARDS})


def name_of(page: Path) -> str:
    return str(page.relative_to(PACKAGE.parent if PACKAGE in page.parents else ROOT))


def run_python(code: str, *options: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter, where nothing is imported yet."""
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=300)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, but for those marked as not to be run."""
    fence = re.compile(rf"^(<!-- not run: [^\n]+ -->\n)?```{language}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [match[2] for match in fence.finditer(page.read_text("utf-8")) if match[1] is None]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `proteinbert-fast` in the shell blocks of a page."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    found = [re.split(r"[|>]", line.partition("proteinbert-fast ")[2])[0] for line in lines]
    return [words for line in found if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def distribution() -> metadata.Distribution:
    try:
        return metadata.distribution("proteinbert-fast")
    except metadata.PackageNotFoundError:
        pytest.skip("proteinbert_fast is on the path but not installed, so it has no metadata")


class TestImport:
    def test_is_light_and_quiet(self) -> None:
        code = """
import sys
import proteinbert_fast
roots = {name.partition(".")[0] for name in sys.modules}
heavy = {"torch", "triton", "numpy", "h5py", "safetensors", "huggingface_hub", "tqdm", "zstandard"}
heavy |= {"matplotlib", "pandas", "sklearn", "ray", "lxml", "fastobo"}
assert not roots & heavy, sorted(roots & heavy)
"""
        done = run_python(code, "-W", "error")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_every_public_name_loads_without_what_only_some_commands_need(self) -> None:
        code = """
import sys
import torch
torch_needs = set(sys.modules)
import proteinbert_fast
for name in proteinbert_fast.__all__:
    getattr(proteinbert_fast, name)
roots = {name.partition(".")[0] for name in set(sys.modules) - torch_needs}
heavy = {"triton", "huggingface_hub", "zstandard", "matplotlib", "pandas", "sklearn", "ray", "lxml"}
assert not roots & heavy, sorted(roots & heavy)
assert not torch.cuda.is_initialized()
"""
        done = run_python(code, "-W", "error")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_every_module_imports_quietly_and_touches_no_gpu(self) -> None:
        code = """
import importlib.util, pkgutil, sys
import proteinbert_fast
left_out = {"proteinbert_fast.__main__"}
if not importlib.util.find_spec("triton"):
    left_out |= {"proteinbert_fast.ops.kernels", "proteinbert_fast.benchmark.gpu.reading"}
def fail(name):
    if name not in left_out:
        raise ImportError(name)
for module in pkgutil.walk_packages(proteinbert_fast.__path__, "proteinbert_fast.", onerror=fail):
    if module.name not in left_out:
        importlib.import_module(module.name)
assert not {"matplotlib", "pandas", "ray"} & sys.modules.keys()
assert not sys.modules["torch"].cuda.is_initialized()
"""
        done = run_python(code, "-W", "error")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_public_names_are_listed_and_unknown_ones_refused(self) -> None:
        assert set(proteinbert_fast.__all__) <= set(dir(proteinbert_fast))
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            proteinbert_fast.nothing  # noqa: B018


class TestCommand:
    @pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["embed", "--help"]], ids=" ".join)
    def test_help_and_version_need_no_torch(self, arguments: list[str]) -> None:
        code = f"""
import sys
from proteinbert_fast.cli.main import main
try:
    code = main({arguments!r})
except SystemExit as stop:
    code = stop.code
assert not code, code
assert "torch" not in sys.modules
"""
        done = run_python(code, "-W", "error")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"proteinbert-fast {proteinbert_fast.__version__}\n"


class TestMetadata:
    def test_one_version(self, distribution: metadata.Distribution) -> None:
        assert distribution.version == proteinbert_fast.__version__

    def test_citation_names_this_version(self) -> None:
        citation = (ROOT / "CITATION.cff").read_text("utf-8")
        assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [proteinbert_fast.__version__]

    def test_command_is_installed(self, distribution: metadata.Distribution) -> None:
        commands = distribution.entry_points.select(group="console_scripts")
        assert [(command.name, command.load()) for command in commands] == [("proteinbert-fast", main)]

    def test_base_install_is_small(self, distribution: metadata.Distribution) -> None:
        requirements = [Requirement(line) for line in distribution.requires or []]
        base = {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
        assert base == {"torch", "numpy", "h5py", "safetensors", "huggingface_hub", "tqdm", "filelock"}

    def test_types_and_extensions_are_shipped(self) -> None:
        folder = Path(proteinbert_fast.__file__).parent
        assert (folder / "py.typed").is_file()
        for name in ("_tokenizer", "_cpu_kernels", "_records"):
            assert (folder / f"{name}.pyi").is_file()
            assert list(folder.glob(f"{name}.*.so"))

    def test_constraints_name_every_requirement_and_fit(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
        lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        pins = {
            pin.name: next(iter(pin.specifier)).version
            for pin in map(Requirement, (line for line in lines if line and not line.startswith("#")))
        }
        extras = project["project"]["optional-dependencies"]
        wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
        wanted += [line for name, extra in extras.items() if name != "kernels" for line in extra]
        for requirement in map(Requirement, wanted):
            if requirement.name != "proteinbert-fast":
                assert requirement.name in pins, f"constraints.txt does not pin {requirement.name}"
                assert requirement.specifier.contains(pins[requirement.name]), requirement


class TestDocuments:
    @pytest.mark.parametrize("page", PAGES, ids=name_of)
    def test_links_lead_somewhere(self, page: Path) -> None:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            if linked.is_relative_to(ROOT / "proteinbert_fast"):  # the package may be installed elsewhere
                linked = PACKAGE / linked.relative_to(ROOT / "proteinbert_fast")
            assert linked.exists(), f"{page.name} links to {target}, which is not there"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", linked.read_text("utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in slugs, f"{page.name} links to {target}, which has no such heading"

    def test_there_are_model_cards(self) -> None:
        assert [card.parent.name for card in CARDS] == ["proteinbert-swissprot"]

    def test_every_page_is_in_the_index(self) -> None:
        index = (ROOT / "docs/README.md").read_text("utf-8")
        for page in ROOT.glob("docs/*.md"):
            assert page.name == "README.md" or f"]({page.name})" in index, page.name

    @pytest.mark.slow
    @pytest.mark.parametrize("page", [page for page in GUIDES if blocks(page, "python")], ids=name_of)
    def test_python_snippets_run(self, page: Path, tmp_path: Path) -> None:
        """All snippets of a page, in turn in one interpreter, in a folder that holds proteins.fasta."""
        # Without titin: the snippets are to be shown to run, not to be timed.
        records = (ROOT / "examples/proteins.fasta").read_text("ascii").split(">")[1:]
        short = [record for record in records if len(record) < 300]
        (tmp_path / "proteins.fasta").write_text("".join(f">{record}" for record in short), "ascii")
        done = run_python("\n".join(blocks(page, "python")), "-W", "error", cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("page", [page for page in GUIDES if commands(page)], ids=name_of)
    def test_commands_are_understood(self, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every `proteinbert-fast` line of a page passes the parser; nothing is run."""
        for words in commands(page):
            monkeypatch.setattr(f"{COMMANDS[words[0]][0]}.run", lambda args: 0)
            assert main(words) == 0, words


class TestExamples:
    def test_forty_proteins_and_titin(self) -> None:
        lengths = {record.id: len(record.sequence) for record in read_fasta(ROOT / "examples/proteins.fasta")}
        assert len(lengths) == 41
        assert lengths["Q8WZ42"] == 34350
        assert sum(lengths.values()) == 48825
        assert f"{sum(lengths.values()):,} residues" in (ROOT / "examples/README.md").read_text("utf-8")
        assert sum(path.stat().st_size for path in (ROOT / "examples").iterdir()) < 150_000
