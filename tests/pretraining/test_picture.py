"""Curves of a log: which lines there are, of which numbers, and what the picture says of them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from proteinbert_fast import InputError
from proteinbert_fast.pretraining.picture import curves, draw, read_log, smoothed


def train(step: int, **more: object) -> dict[str, object]:
    return {
        "kind": "train", "step": step, "records": step * 100, "residues": step * 30_000, "loss": 9.0,
        "token_loss": 3.0 / step, "annotation_loss": 0.7 / step, "learning_rate": 2e-4, "seconds": 1.0, **more,
    }  # fmt: skip


def validation(step: int, *classes: str) -> dict[str, object]:
    found = {
        c: {"token_loss": i + 1.0 / step, "annotation_loss": 0.1 / step, "records": 5} for i, c in enumerate(classes)
    }
    row = {"kind": "validation", "step": step, "records": step * 100, "residues": step * 30_000, "classes": found}
    return row | {"token_loss": 2.0, "annotation_loss": 0.05, "go": {"fmax": {"P": 0.1}}}


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    train(1),
    train(2),
    validation(2, "128", "1024", "longer", "512"),
    train(3),
    train(4),
    validation(4, "128", "512"),
]


def test_lines_by_length():
    """In the order of the legend: training first, then held-out classes from short to long, for each loss."""
    found = curves(ROWS)
    labels = [
        "training, all lengths",
        *(f"held out, {n}" for n in ("up to 128 tokens", "up to 512 tokens", "up to 1024 tokens", "longer")),
    ]
    assert [(c.loss, c.label) for c in found] == [(x, y) for x in ("token_loss", "annotation_loss") for y in labels]
    short, middle = found[1], found[2]
    assert short.x.tolist() == middle.x.tolist() == [200, 400]
    assert short.y.tolist() == [0.5, 0.25]
    assert middle.y.tolist() == [3.5, 1.25]
    assert found[3].x.tolist() == found[4].x.tolist() == [200]
    assert found[0].x.tolist() == [100, 200, 300, 400]
    np.testing.assert_allclose(found[0].y, [3, 1.5, 1, 0.75])  # too few rows to smooth
    assert curves(ROWS, "residues")[1].x.tolist() == [60_000, 120_000]


def test_windows_of_episodes_are_lines_of_their_own():
    found = curves([train(1, window=512), train(2, window=128), train(3, window=512)])
    assert [(c.label, c.x.tolist()) for c in found[:2]] == [
        ("training, windows of 128 tokens", [200]), ("training, windows of 512 tokens", [100, 300]),
    ]  # fmt: skip


def test_a_validation_without_classes_is_a_line_for_all():
    (tokens, terms) = curves([validation(2), validation(4)])
    assert (tokens.label, tokens.y.tolist(), terms.y.tolist()) == ("held out, all lengths", [2, 2], [0.05, 0.05])


def test_training_is_smoothed_over_a_fiftieth():
    """100 rows: means over two neighbours on each side, of fewer near the ends; a straight line stays one."""
    rng = np.random.default_rng(0)
    rows = [train(i + 1, token_loss=float(rng.random())) for i in range(100)]
    y = np.array([row["token_loss"] for row in rows])
    found = curves(rows)[0].y
    np.testing.assert_allclose(found[2:-2], [y[i - 2 : i + 3].mean() for i in range(2, 98)])
    np.testing.assert_allclose(found[[0, 1, -2, -1]], [y[0], y[:3].mean(), y[-3:].mean(), y[-1]])
    line = np.linspace(5.0, 1.0, 37)
    for reach in (0, 1, 5, 100):
        np.testing.assert_allclose(smoothed(line, reach), line)


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path):
    row = {"kind": "train", "step": 1, "records": 1, "residues": 1, "annotation_loss": None}
    values = [3.0, float("nan"), None, 1.0]
    rows = [{**row, "step": i, "records": i, "token_loss": value} for i, value in enumerate(values, 1)]
    (line,) = curves(rows)
    assert line.y.tolist() == [3.0, 1.0]
    draw(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_read_log(tmp_path: Path):
    """The file or its folder; a line that is still being written is none."""
    log = write(tmp_path / "log.jsonl", ROWS)
    assert read_log(log) == read_log(tmp_path) == ROWS
    with log.open("a") as file:
        file.write('{"kind": "train", "step": 5')
    assert read_log(log) == ROWS


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[1]", "3", '{"step": 1}', '{"kind": "train", "records": 1}', '{"kind": "train", "records": "x"}'],
)
def test_not_a_log(tmp_path: Path, line: str):
    log = write(tmp_path / "log.jsonl", ROWS)
    with log.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=r"log\.jsonl:7: is no row of a pretraining log$"):
        read_log(log)


def test_no_log(tmp_path: Path):
    with pytest.raises(InputError, match=r"log\.jsonl: no such file: the log of a run is log\.jsonl in its folder"):
        read_log(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_draw(tmp_path: Path, suffix: str):
    pytest.importorskip("matplotlib")
    draw(ROWS, tmp_path / f"a.{suffix}", title="a run")
    content = (tmp_path / f"a.{suffix}").read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])


def test_the_picture_has_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both panels, their scales, and a line for each curve with its own numbers."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: drawn.append(self))
    draw(ROWS, tmp_path / "a.png", "residues")
    sequence, terms = drawn[0].axes
    assert (sequence.get_yscale(), terms.get_yscale()) == ("linear", "log")
    assert sequence.get_xlabel() == terms.get_xlabel() == "residues seen"
    for ax, loss in ((sequence, "token_loss"), (terms, "annotation_loss")):
        wanted = [c for c in curves(ROWS, "residues") if c.loss == loss]
        assert [line.get_label() for line in ax.lines] == [c.label for c in wanted]
        for line, curve in zip(ax.lines, wanted, strict=True):
            np.testing.assert_array_equal(line.get_xydata(), np.column_stack([curve.x, curve.y]))
        assert len({line.get_color() for line in ax.lines}) == len(wanted)
    assert sequence.get_ylim()[0] < 0.25 < 3.5 < sequence.get_ylim()[1]
    draw([train(1, annotation_loss=0.0)], tmp_path / "a.png")
    assert drawn[1].axes[1].get_yscale() == "linear"  # a logarithm of zero is none
    no_terms = [{k: v for k, v in row.items() if k != "annotation_loss"} for row in (train(1), train(2))]
    draw(no_terms, tmp_path / "a.png")
    assert len(drawn[2].axes) == 1


def test_the_first_drop_may_lie_above_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """100 rows, of which the first 4 come before a twentieth of the run."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: drawn.append(self))
    rows = [train(i, token_loss=9.0 if i < 5 else 0.5 - i / 1000) for i in range(1, 101)]
    held_out = validation(50) | {"token_loss": 0.7}
    draw([*rows, held_out], tmp_path / "a.png")
    low, high = drawn[0].axes[0].get_ylim()
    y = curves(rows)[0].y[4:]
    assert y.max() > 3  # smoothed over the edge
    assert (low, high) == pytest.approx((y.min() - 0.08 * np.ptp(y), y.max() + 0.08 * np.ptp(y)))
    draw([train(1)], tmp_path / "a.png")
    assert drawn[1].axes[0].get_ylim() == pytest.approx((2.9, 3.1))


def test_draw_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match="the log has no losses yet: there is nothing to draw"):
        draw([], tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.xyz: Format 'xyz' is not supported"):
        draw(ROWS, tmp_path / "a.xyz")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"^a picture needs matplotlib: pip install 'proteinbert-fast\[plots\]'$"):
        draw(ROWS, tmp_path / "a.png")
