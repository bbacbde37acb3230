"""Linear probes: what of a protein can be read off a frozen model's states, beside an untrained model and its letters.

Ridge regression on standardised features, its strength chosen by leave-one-out errors on the training file
(scikit-learn's RidgeCV and RidgeClassifierCV). No weight of the model is trained, so these numbers are below those of
fine-tuning; they compare representations.
"""

import csv
import gzip
import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from proteinbert_fast import InputError

ALPHAS = np.logspace(-1, 6, 15)
MAX_LENGTH = 1024  # residues; what lies behind is cut off
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
NEIGHBOURS = 7  # residues on each side that the baseline for residues sees
RESIDUES = 20_000  # that a probe is trained on, of all that its proteins have
OWN_SPLIT_OF = 5  # of a benchmark without a validation file: one part in so many

Floats = npt.NDArray[np.floating[Any]]
Features = Callable[[Sequence[str], Literal["protein", "residue"]], Floats]


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: of it.
        file: its files' names start with this.
        metric: "Spearman", "AUC" or "accuracy".
        per: what has a label.
    """

    name: str
    file: str
    metric: Literal["Spearman", "AUC", "accuracy"]
    per: Literal["protein", "residue"] = "protein"


TASKS = (
    Task("stability", "stability", "Spearman"),
    Task("fluorescence", "fluorescence", "Spearman"),
    Task("remote homology", "remote_homology", "accuracy"),
    Task("signal peptide", "signalP_binary", "AUC"),
    Task("membrane or soluble", "deeploc_membrane_soluble", "AUC"),
    Task("neuropeptide cleavage", "ProFET_NP_SP_Cleaved", "AUC"),
    Task("secondary structure", "secondary_structure", "accuracy", "residue"),
    Task("disorder", "disorder_secondary_structure", "AUC", "residue"),
)


@dataclass(frozen=True)
class Examples:
    """Proteins with labels: sequences, and a text for each, which for residues has a character for each residue."""

    sequences: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.sequences)

    def sample(self, most: int, seed: int) -> "Examples":
        """So many of them, drawn with the seed, in their order."""
        if len(self) <= most:
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), most, replace=False))
        return Examples([self.sequences[i] for i in chosen], [self.labels[i] for i in chosen])


def read_examples(folder: Path, task: Task) -> tuple[Examples, Examples, str]:
    """Training and validation examples, and where the latter come from.

    A benchmark without a validation file is divided: of the SHA-1 of its sequence, one in five proteins goes there.

    Raises:
        InputError: a file cannot be used.
    """
    train, validation = (folder / f"{task.file}.{part}.csv.gz" for part in ("train", "valid"))
    examples = _read(train, task)
    if validation.exists():
        return examples, _read(validation, task), validation.name
    is_held_out = [int(hashlib.sha1(s.encode()).hexdigest(), 16) % OWN_SPLIT_OF == 0 for s in examples.sequences]
    parts = [
        Examples(
            [s for s, held in zip(examples.sequences, is_held_out, strict=True) if held == wanted],
            [label for label, held in zip(examples.labels, is_held_out, strict=True) if held == wanted],
        )
        for wanted in (False, True)
    ]
    return parts[0], parts[1], f"one in {OWN_SPLIT_OF} of {train.name}, by SHA-1 of the sequence"


def _read(path: Path, task: Task) -> Examples:
    try:
        return _rows(path, task)
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is damaged or cut short: {error}") from error


def _rows(path: Path, task: Task) -> Examples:
    sequences, labels = [], []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = csv.DictReader(file)  # labels stay text: leading zeros count
        if not {"seq", "label"} <= set(rows.fieldnames or ()):
            raise InputError(f"{path}:1: the columns seq and label were expected")
        for number, row in enumerate(rows, 2):
            sequence, label = row["seq"], row["label"]
            if not sequence or not label:
                raise InputError(f"{path}:{number}: no sequence or no label")
            if task.per == "residue" and len(sequence) != len(label):
                raise InputError(f"{path}:{number}: {len(sequence)} residues, {len(label)} labels")
            sequences.append(sequence[:MAX_LENGTH])
            labels.append(label[:MAX_LENGTH] if task.per == "residue" else label)
    if not sequences:
        raise InputError(f"{path}: no examples")
    return Examples(sequences, labels)


def composition(sequences: Sequence[str], per: Literal["protein", "residue"]) -> Floats:
    """The baseline's features: of proteins, frequencies of the 20 amino acids and the logarithm of the length.

    Of residues, the letters of the residue and of 7 on each side: 15 times 21 zeros and ones, the 21st for what is none
    of the 20 or beyond the end.
    """
    code = np.full(256, len(AMINO_ACIDS))
    code[np.frombuffer(AMINO_ACIDS.encode(), np.uint8)] = np.arange(len(AMINO_ACIDS))
    coded = [code[np.frombuffer(s.encode("latin-1", "replace"), np.uint8)] for s in sequences]
    n = len(AMINO_ACIDS) + 1
    if per == "protein":
        frequencies = np.array([np.bincount(c, minlength=n)[:-1] / len(c) for c in coded])
        return np.column_stack([frequencies, np.log([len(c) for c in coded])])
    padded = [np.pad(c, NEIGHBOURS, constant_values=n - 1) for c in coded]
    windows = np.concatenate([np.lib.stride_tricks.sliding_window_view(p, 2 * NEIGHBOURS + 1) for p in padded])
    return np.eye(n, dtype=np.float32)[windows].reshape(len(windows), -1)


def probe(task: Task, train: Examples, validation: Examples, features: Features, seed: int = 0) -> float:
    """How well a linear model of these features does on validation examples.

    Args:
        task: names the measure.
        train: examples; of residues, so many as RESIDUES are drawn.
        validation: examples, all of which count.
        features: of sequences: a row for each protein, or for each residue.
        seed: of that draw.

    Raises:
        InputError: the labels do not fit the task.
    """
    from scipy.stats import spearmanr
    from sklearn.linear_model import RidgeClassifierCV, RidgeCV
    from sklearn.metrics import accuracy_score, roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    y = _targets(task, train)
    if len(np.unique(y)) < 2:
        raise InputError(f"{task.name}: {len(train):,} training examples have one label: take more")
    x = features(train.sequences, task.per)
    if task.per == "residue" and len(x) > RESIDUES:
        chosen = np.sort(np.random.default_rng(seed).choice(len(x), RESIDUES, replace=False))
        x, y = x[chosen], y[chosen]
    held_out_x, held_out_y = features(validation.sequences, task.per), _targets(task, validation)
    model = make_pipeline(StandardScaler(), (RidgeCV if task.metric == "Spearman" else RidgeClassifierCV)(ALPHAS))
    model.fit(x, y)
    if task.metric == "Spearman":
        return float(spearmanr(model.predict(held_out_x), held_out_y).statistic)
    if task.metric == "AUC":
        return float(roc_auc_score(held_out_y, model.decision_function(held_out_x)))
    return float(accuracy_score(held_out_y, model.predict(held_out_x)))


def _targets(task: Task, examples: Examples) -> npt.NDArray[Any]:
    if task.per == "residue":
        return np.array(list("".join(examples.labels)))
    if task.metric != "Spearman":
        return np.array(examples.labels)
    try:
        return np.array([float(label) for label in examples.labels])
    except ValueError as error:
        raise InputError(f"{task.name}: a label is no number: {error}") from None
