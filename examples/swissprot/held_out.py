"""What a model says of held-out proteins: losses of corrupted sequences, and GO terms, each beside simple baselines."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from proteinbert_fast import InputError, PackedBatch, ProteinBert, Tokenizer
from proteinbert_fast.config import VOCABULARY_SIZE
from proteinbert_fast.data.corpus import Corpus
from proteinbert_fast.packing import batches_by_tokens
from proteinbert_fast.pretraining.corruption import corrupt_tokens
from proteinbert_fast.tokenizer import END, START

TRAIN = 0
SPLITS = {"validation": 1, "test": 2}
CLASSES = {"128": 128, "512": 512, "1024": 1024, "longer": None}  # most tokens of a protein, START and END included
ROOTS = {"GO:0008150", "GO:0003674", "GO:0005575"}  # every protein has them
NOISE = 0.05  # of the paper
TOKENS_PER_BATCH = 16_384
LETTERS = np.frombuffer(b"ACDEFGHIKLMNPQRSTUVWXY?", np.uint8)

Computing = Callable[[], Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Proteins:
    """Held-out proteins.

    Attributes:
        numbers: int64 (n,): of each in the corpus.
        sequences: residues, "?" for unknown ones.
        terms: GO terms: indices, and offsets (n + 1,).
    """

    numbers: npt.NDArray[np.int64]
    sequences: list[str]
    terms: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """int64 (n,): of each, START and END included."""
        return np.array([len(sequence) + 2 for sequence in self.sequences])

    def batches(self, gap: int) -> Iterator[tuple[npt.NDArray[np.int64], PackedBatch]]:
        """Places of some proteins, and their batch."""
        tokenizer = Tokenizer(gap=gap)
        for places in batches_by_tokens(self.tokens, TOKENS_PER_BATCH, gap):
            yield places, tokenizer([self.sequences[i] for i in places])


@dataclass(frozen=True)
class Training:
    """What the training set says.

    Attributes:
        token_counts: int64 (26,): START and END included.
        term_frequencies: float32 (T,): of its proteins with terms.
        indices, offsets: GO terms of each protein of the corpus.
        numbers: of each training protein that may tell of GO terms, by id.
    """

    token_counts: npt.NDArray[np.int64]
    term_frequencies: npt.NDArray[np.float32]
    indices: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    numbers: Mapping[str, int]


def read_held_out(corpus: Corpus, split: str, most: int | None, seed: int) -> Proteins:
    """The proteins of a held-out set, or so many of them, drawn with the seed.

    Raises:
        InputError: there are none.
    """
    numbers = np.flatnonzero(corpus.split == SPLITS[split])
    if not len(numbers):
        raise InputError(f"{corpus.path}: has no {split} set")
    if most is not None and most < len(numbers):
        numbers = np.sort(np.random.default_rng(seed).choice(numbers, most, replace=False))
    part = corpus.read_many(numbers)
    text = LETTERS[part.tokens].tobytes().decode()
    bounds = part.offsets.tolist()
    sequences = [text[a:b] for a, b in pairwise(bounds)]
    return Proteins(numbers, sequences, (part.go_indices.astype(np.int64), part.go_offsets))


def read_training(corpus: Corpus, hidden: set[str]) -> Training:
    """Counts of the training set; proteins whose GO terms are hidden say nothing about those."""
    token_counts = np.zeros(VOCABULARY_SIZE, np.int64)
    term_counts = np.zeros(max(len(corpus.terms), 1), np.int64)
    numbers: dict[str, int] = {}
    indices, sizes, n_annotated, first = [], [], 0, 0
    for part in corpus.slices():
        is_train = part.split == TRAIN
        token_counts += np.bincount(part.tokens[np.repeat(is_train, np.diff(part.offsets))], minlength=VOCABULARY_SIZE)
        token_counts[[START, END]] += is_train.sum()
        n_terms = np.diff(part.go_offsets)
        names = part.ids.tolist()
        tells = is_train & (n_terms > 0)
        for i in np.flatnonzero(tells).tolist():
            if (name := names[i].decode()) in hidden:
                tells[i] = False
            else:
                numbers[name] = first + i
        term_counts += np.bincount(part.go_indices[np.repeat(tells, n_terms)], minlength=len(term_counts))
        n_annotated += int(tells.sum())
        indices.append(part.go_indices)
        sizes.append(n_terms)
        first += len(part)
    return Training(
        token_counts, (term_counts / max(n_annotated, 1)).astype(np.float32), np.concatenate(indices),
        np.concatenate([[0], np.cumsum(np.concatenate(sizes))]), numbers,
    )  # fmt: skip


def unigram(counts: npt.NDArray[np.int64]) -> Floats:
    """Log probabilities (26, 26) of the true token by the one that is shown: training frequencies, whatever is shown.

    Each count is raised by one, so that no token is impossible.
    """
    p = (counts + 1) / (counts + 1).sum()
    return np.log(np.tile(p, (VOCABULARY_SIZE, 1)))


def copying(counts: npt.NDArray[np.int64], noise: float = NOISE) -> Floats:
    """The same for the best that can be said of a token without its neighbours.

    By Bayes's rule, of training frequencies p and the corruption: shown x, the true token is y with a probability that
    goes with p(y) (noise / 26 + (1 - noise) [x = y]). So a rare token that is shown is likelier to be corrupted.
    """
    p = (counts + 1) / (counts + 1).sum()
    joint = p * (noise / VOCABULARY_SIZE + (1 - noise) * np.eye(VOCABULARY_SIZE))
    return np.log(joint / joint.sum(1, keepdims=True))


def by_neighbours(log_p: Tensor, shown: Tensor, noise: float = NOISE) -> Tensor:
    """What log probabilities (n, 26) of true tokens come to when the tokens shown in their place (n,) say nothing.

    A model that has learned the corruption trusts the token that it is shown as often as that is right. Bayes's rule
    takes that back: its probabilities are divided by those of showing this token x for each true one y,
    noise / 26 + (1 - noise) [x = y]. What is left is what it expects from the neighbours.
    """
    shows = torch.full((VOCABULARY_SIZE, VOCABULARY_SIZE), noise / VOCABULARY_SIZE) + (1 - noise) * torch.eye(
        VOCABULARY_SIZE
    )
    return (log_p - shows.log()[shown]).log_softmax(-1)


@torch.inference_mode()
def sequence_losses(
    proteins: Proteins,
    models: Mapping[str, ProteinBert],
    tables: Mapping[str, Floats],
    seed: int,
    computing: Computing,
    on_tokens: Callable[[int], object] = lambda n: None,
    noise: float = NOISE,
) -> dict[str, Any]:
    """Cross entropy of the true tokens, in nats per token, when some of them are replaced and no GO term is shown.

    Args:
        proteins: whole, however long.
        models: on one device.
        tables: log probabilities of the true token (26) by the one shown (26).
        seed: of the corruption, which depends on it and on a protein's number in the corpus.
        computing: gives the context to compute in.
        on_tokens: is told of each batch's tokens.
        noise: probability that a token is replaced, as it was in training.

    Returns:
        ``{"noise": p, "tokens": {class: n}, "corrupted": {class: n}, "proteins": {class: n}, "losses": {name: {"all":
        {class: x}, "corrupted": {class: x}, "by_neighbours": {class: x}}}}``; the classes are those of CLASSES that
        occur, and "all". A token is corrupted if another one is shown; the last is over these, of ``by_neighbours``.
    """
    names = [*models, *tables]
    limits = [np.inf if most is None else most for most in CLASSES.values()]
    kinds = np.searchsorted(limits, proteins.tokens)
    sums = np.zeros((len(names), 3, len(CLASSES)))
    ignores = {name for name, table in tables.items() if (table == table[:1]).all()}  # the token that is shown
    counts = np.zeros((2, len(CLASSES)), np.int64)
    on_device = {name: torch.tensor(table, dtype=torch.float32) for name, table in tables.items()}
    for places, clean in proteins.batches(_gap(models)):
        noisy = corrupt_tokens(clean, proteins.numbers[places], seed=seed, step=0, probability=noise)
        inside = clean.segments >= 0
        true, shown = clean.tokens[inside].long(), noisy.tokens[inside].long()
        kind = torch.from_numpy(kinds[places])[clean.segments[inside].long()]
        is_corrupted = true != shown
        for k in range(len(CLASSES)):
            counts[0, k] += int((kind == k).sum())
            counts[1, k] += int((is_corrupted & (kind == k)).sum())
        for i, name in enumerate(names):
            if name in models:
                device = models[name].token_embedding.weight.device
                with computing():
                    logits = models[name](noisy.to(device)).token_logits.float()
                log_p = logits.log_softmax(-1).cpu()[inside]
            else:
                log_p = on_device[name][shown]
            nll = -log_p.gather(1, true[:, None])[:, 0].double()
            sums[i, 0] += np.bincount(kind, weights=nll, minlength=len(CLASSES))
            sums[i, 1] += np.bincount(kind[is_corrupted], weights=nll[is_corrupted], minlength=len(CLASSES))
            rest = log_p[is_corrupted]
            if name not in ignores:
                rest = by_neighbours(rest, shown[is_corrupted], noise)
            nll = -rest.gather(1, true[is_corrupted][:, None])[:, 0].double()
            sums[i, 2] += np.bincount(kind[is_corrupted], weights=nll, minlength=len(CLASSES))
        on_tokens(clean.n_tokens)

    def by_class(values: npt.NDArray[Any]) -> dict[str, Any]:
        named = dict(zip(CLASSES, values.tolist(), strict=True))
        return {name: named[name] for name, n in zip(CLASSES, counts[0], strict=True) if n}

    def losses(kind: int, values: Floats) -> dict[str, float]:
        n = counts[kind]
        return {"all": float(values.sum() / max(n.sum(), 1)), **by_class(values / np.maximum(n, 1))}

    return {
        "noise": noise,
        "proteins": {"all": len(proteins), **by_class(np.bincount(kinds, minlength=len(CLASSES)))},
        "tokens": {"all": int(counts[0].sum()), **by_class(counts[0])},
        "corrupted": {"all": int(counts[1].sum()), **by_class(counts[1])},
        "losses": {
            name: {
                "all": losses(0, sums[i, 0]),
                "corrupted": losses(1, sums[i, 1]),
                "by_neighbours": losses(1, sums[i, 2]),
            }
            for i, name in enumerate(names)
        },
    }


@torch.inference_mode()
def go_scores(
    proteins: Proteins, model: ProteinBert, computing: Computing, on_tokens: Callable[[int], object] = lambda n: None
) -> npt.NDArray[np.float32]:
    """The model's probabilities of GO terms, (n, T), of sequences alone, uncorrupted."""
    scores = np.empty((len(proteins), model.config.n_annotations), np.float32)
    device = model.token_embedding.weight.device
    for places, batch in proteins.batches(model.config.reach):
        with computing():
            scores[places] = model(batch.to(device)).go_probabilities.float().cpu().numpy()
        on_tokens(batch.n_tokens)
    return scores


def search(
    proteins: Proteins, corpus: Corpus, training: Training, output: Path, threads: int, sensitivity: float
) -> None:
    """Aligns held-out proteins to training proteins with mmseqs2: a table of query, target, identity, bit score.

    Queries are named by their numbers in the corpus. Training proteins whose GO terms are hidden are left out.

    Raises:
        InputError: mmseqs is not installed, or failed.
    """
    program = shutil.which("mmseqs")
    if program is None:
        raise InputError("neighbours need mmseqs2 (Debian's package mmseqs2), or a table of hits: --hits")
    with tempfile.TemporaryDirectory() as folder:
        query, target, hits = (Path(folder, name) for name in ("query.fasta", "target.fasta", "hits.tsv"))
        with open(query, "w") as file:
            file.writelines(
                f">{number}\n{seq}\n" for number, seq in zip(proteins.numbers, proteins.sequences, strict=True)
            )
        with open(target, "wb") as file:
            for part in corpus.slices():
                text, bounds = LETTERS[part.tokens].tobytes(), part.offsets.tolist()
                for i, name in enumerate(part.ids.tolist()):
                    if name.decode() in training.numbers:
                        file.write(b">%s\n%s\n" % (name, text[bounds[i] : bounds[i + 1]]))
        command = [
            program, "easy-search", query, target, hits, Path(folder, "tmp"), "--format-output",
            "query,target,fident,bits", "-s", sensitivity, "-e", 0.001, "--threads", threads, "-v", 1,
        ]  # fmt: skip
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr + done.stdout).strip().splitlines()
            raise InputError(f"mmseqs easy-search failed: {said[-1] if said else f'exit code {done.returncode}'}")
        shutil.move(hits, output)


def neighbour_scores(
    proteins: Proteins, training: Training, hits: Path, n_terms: int
) -> tuple[dict[str, npt.NDArray[np.float32]], int]:
    """GO terms carried over from the training proteins that `search` has found.

    Returns:
        Scores (n, T) by name: "identity" is the highest sequence identity of a hit with the term, the BLAST baseline of
        CAFA; "bit score" is the share of hits with the term, weighted by their bit scores (Kulmanov and Hoehndorf 2020,
        doi:10.1093/bioinformatics/btz595). And how many proteins have a hit.

    Raises:
        InputError: the table cannot be read, or is of other proteins.
    """
    place_of = {str(number): place for place, number in enumerate(proteins.numbers.tolist())}
    identity, bits = (np.zeros((len(proteins), n_terms), np.float32) for _ in range(2))
    total = np.zeros(len(proteins), np.float32)
    with open(hits) as file:
        for number, line in enumerate(file, 1):
            try:
                query, target, fident, score = line.split()
                i, j = place_of.get(query), training.numbers[target]
                share, weight = float(fident), float(score)
            except (ValueError, KeyError):
                raise InputError(f"{hits}:{number}: is no hit of a protein of this training set") from None
            if i is None:
                continue  # of a larger sample
            terms = training.indices[training.offsets[j] : training.offsets[j + 1]]
            identity[i, terms] = np.maximum(identity[i, terms], share)
            bits[i, terms] += weight
            total[i] += weight
    bits /= np.maximum(total, 1e-9)[:, None]
    return {"identity": identity, "bit score": np.minimum(bits, 1)}, int((total > 0).sum())


def _gap(models: Mapping[str, ProteinBert]) -> int:
    return max((model.config.reach for model in models.values()), default=0)
