"""What a pretrained model is worth: the tables of a model card, each with what it must be better than.

    python evaluate.py run/model swissprot/corpus.h5 --benchmarks benchmarks -o evaluation

- Sequence: loss of held-out proteins, corrupted as in pretraining, beside an untrained model, the frequencies of
  tokens, and the best that can be said of a token without its neighbours.
- GO terms of held-out proteins from their sequences alone, beside frequencies of terms and the terms of similar
  training proteins, which mmseqs2 finds.
- Linear probes on benchmarks' validation files (with --benchmarks), beside an untrained model and letters.

Writes evaluation.json and evaluation.md into the output folder, and the hits of mmseqs2. Needs scikit-learn for probes.
Samples are drawn with the seed; same files and options, same numbers, up to rounding on other devices.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import held_out
import numpy as np
import probes
import torch

from proteinbert_fast import InputError, ProteinBert, ProteinBertConfig, __version__, embed
from proteinbert_fast.data.corpus import Corpus
from proteinbert_fast.embedding.api import has_fast_bfloat16
from proteinbert_fast.errors import ProteinBertError
from proteinbert_fast.pretraining.config import read_config
from proteinbert_fast.pretraining.metrics import go_metrics
from proteinbert_fast.weights import SHIPPED

OFFICIAL = "proteinbert"
UNTRAINED = "untrained model"
TRAINED = "this model"
LABELLED_THROUGHOUT = 4  # proteins whose every residue has a label are taken as a fourth as many
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    parser = argparse.ArgumentParser(description="Tables of what a pretrained model is worth.")
    parser.add_argument("model", help="folder of the model, or what else ProteinBert.from_pretrained takes")
    parser.add_argument("corpus", type=Path, help="that it was trained on")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--split", choices=tuple(held_out.SPLITS), default="validation", help="default: %(default)s")
    parser.add_argument("--benchmarks", type=Path, help="folder of NAME.train.csv.gz, NAME.valid.csv.gz; for probes")
    parser.add_argument("--hidden-annotations", type=Path, help="ids whose GO terms were kept out of training")
    parser.add_argument("--max-proteins", type=int, default=2000, metavar="N", help="held out; default: %(default)s")
    parser.add_argument("--max-train", type=int, default=1500, metavar="N", help="of a probe; default: %(default)s")
    parser.add_argument("--max-validation", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--noise",
        type=float,
        metavar="P",
        help="probability that a token is replaced; default: that of the model's training, from pretrain.toml beside "
        f"its weights or config.json of its run, else {held_out.NOISE}",
    )
    parser.add_argument("--hits", type=Path, help="table of hits of an earlier run; no mmseqs2 is needed then")
    parser.add_argument("--no-neighbours", action="store_true", help="leave that row out")
    parser.add_argument("--sensitivity", type=float, default=5.7, help="of mmseqs2; default: %(default)s, its own")
    parser.add_argument("--seed", type=int, default=0, help="of samples, corruption, the untrained model; default: 0")
    parser.add_argument("--device", help="cuda, cpu; default: a GPU if there is one")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto (default): bfloat16 on GPUs and on CPUs that multiply it in hardware, else float32",
    )
    args = parser.parse_args(argv)
    for name in ("max_proteins", "max_train", "max_validation"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if args.noise is not None and not 0 < args.noise < 1:
        parser.error(f"--noise must be between 0 and 1, got {args.noise}")
    try:
        evaluate(args)
    except (ProteinBertError, OSError, UnicodeDecodeError) as error:
        print(f"evaluate.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Measures and writes everything; returns what evaluation.json holds.

    Raises:
        ProteinBertError: model, corpus or benchmarks cannot be used, or do not belong together.
    """
    started = time.perf_counter()
    if args.benchmarks is not None:
        _need("sklearn", "probes need scikit-learn: pip install scikit-learn")
    # Read before anything is measured: a file that cannot be used is said at once.
    examples = [(task, probes.read_examples(args.benchmarks, task)) for task in probes.TASKS if args.benchmarks]
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" or has_fast_bfloat16() else "float32"

    def computing() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")

    noise = args.noise if args.noise is not None else trained_noise(args.model)
    model = ProteinBert.from_pretrained(args.model, device=device)
    untrained = _untrained(model.config, args.seed).to(device)
    args.output.mkdir(parents=True, exist_ok=True)
    with Corpus(args.corpus) as corpus:
        _check_terms(model, corpus)
        proteins = held_out.read_held_out(corpus, args.split, args.max_proteins, args.seed)
        training = held_out.read_training(corpus, _ids(args.hidden_annotations))
        n_tokens = int(proteins.tokens.sum())
        with _told(f"losses of {len(proteins):,} proteins", n_tokens) as tell:
            tables = {
                "best without neighbours": held_out.copying(training.token_counts, noise),
                "token frequencies": held_out.unigram(training.token_counts),
            }
            sequence = held_out.sequence_losses(
                proteins, {TRAINED: model, UNTRAINED: untrained}, tables, args.seed, computing, tell, noise
            )
        go = None
        if corpus.terms:
            with _told(f"GO terms of {len(proteins):,} proteins", n_tokens) as tell:
                go = _go_terms(args, corpus, proteins, training, model, computing, tell)
        facts = {"path": str(args.corpus), "fingerprint": corpus.fingerprint, "split": args.split}
    result = {
        "model": {
            "source": str(args.model), "sha256": model.checkpoint_sha256, "sizes": model.config.to_dict(),
            "parameters": model.config.n_parameters,
        },
        "corpus": facts,
        "sequence": sequence,
        "go": go,
        "probes": _probes(args, examples, {TRAINED: model, UNTRAINED: untrained}, dtype) if examples else None,
        "environment": {
            "proteinbert_fast": __version__, "torch": torch.__version__, "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "dtype": dtype,
            "threads": torch.get_num_threads(), "seed": args.seed,
        },
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    _write(args.output / "evaluation.json", json.dumps(result, indent=1) + "\n")
    text = as_markdown(result)
    _write(args.output / "evaluation.md", text)
    print(text, end="")
    return result


def trained_noise(model: str) -> float:
    """The probability that a token of a model's training was replaced; the paper's where nothing says it."""
    path = SHIPPED[model] if model in SHIPPED else Path(model).expanduser().resolve()
    if not path.exists() or model == OFFICIAL:  # a name of published weights
        return held_out.NOISE
    folder = path if path.is_dir() else path.parent
    found: dict[str, Any] = {}
    if (options := folder / "pretrain.toml").is_file():
        found = read_config(options).to_dict()
    elif (run := folder.parent / "config.json").is_file():
        with suppress(ValueError, KeyError, TypeError):
            found = json.loads(run.read_text())["config"]
    noise: float = found.get("replace_probability", held_out.NOISE)
    return noise if 0 < noise < 1 else held_out.NOISE


def _go_terms(
    args: argparse.Namespace,
    corpus: Corpus,
    proteins: held_out.Proteins,
    training: held_out.Training,
    model: ProteinBert,
    computing: Callable[[], Any],
    tell: Callable[[int], object],
) -> dict[str, Any]:
    aspects = ["" if term.id in held_out.ROOTS else term.aspect for term in corpus.terms]
    rows = {TRAINED: go_metrics(held_out.go_scores(proteins, model, computing, tell), proteins.terms, aspects)}
    found = None
    if not args.no_neighbours:
        hits = args.hits
        if hits is None:
            hits = args.output / f"hits_{args.split}.tsv"
            print("searching similar training proteins", file=sys.stderr)
            threads = len(os.sched_getaffinity(0))
            held_out.search(proteins, corpus, training, hits, threads, args.sensitivity)
        scores, found = held_out.neighbour_scores(proteins, training, hits, len(corpus.terms))
        for name, values in scores.items():
            rows[f"similar proteins, by {name}"] = go_metrics(values, proteins.terms, aspects)
    frequencies = np.broadcast_to(training.term_frequencies, (len(proteins), len(corpus.terms)))
    rows["term frequencies"] = go_metrics(frequencies, proteins.terms, aspects)
    indices, offsets = proteins.terms
    counts = {letter: int((np.array(aspects) == letter).sum()) for letter in "PFC"}
    return {
        "proteins": int((np.diff(offsets) > 0).sum()), "annotations": len(indices), "terms": counts,
        "proteins_with_hits": found, "rows": rows,
    }  # fmt: skip


def _probes(
    args: argparse.Namespace, examples: Sequence[tuple[probes.Task, Any]], models: Mapping[str, ProteinBert], dtype: str
) -> list[dict[str, Any]]:
    rows = []
    for task, (train, validation, source) in examples:
        sizes = {"train_of": len(train), "validation_of": len(validation)}
        part = LABELLED_THROUGHOUT if task.per == "residue" else 1
        train = train.sample(max(args.max_train // part, 1), args.seed)
        validation = validation.sample(max(args.max_validation // part, 1), args.seed)
        sources = {**{name: _features(model, dtype) for name, model in models.items()}, "letters": probes.composition}
        with _told(f"probe: {task.name}", 0):
            scores = {n: probes.probe(task, train, validation, features, args.seed) for n, features in sources.items()}
        rows.append(
            {
                "task": task.name, "metric": task.metric, "per": task.per, "train": len(train),
                "validation": len(validation), **sizes, "validation_file": source, "scores": scores,
            }
        )  # fmt: skip
    return rows


def _features(model: ProteinBert, dtype: Any) -> probes.Features:
    """States of all blocks: of proteins the global state and the mean over residues, of residues the local state."""

    def features(sequences: Sequence[str], per: Any) -> probes.Floats:
        of = embed(
            list(sequences), model=model, per=per, pooling="both" if per == "protein" else None, layers="all",
            dtype=dtype, storage_dtype="float32", tokens_per_batch=held_out.TOKENS_PER_BATCH, progress=False,
        )  # fmt: skip
        return of.embeddings

    return features


def as_markdown(result: Mapping[str, Any]) -> str:
    """The tables."""
    e, sequence, go, rows = (result[name] for name in ("environment", "sequence", "go", "probes"))
    classes = list(sequence["tokens"])
    lines = [
        f"## Held-out proteins: {result['corpus']['split']} set",
        "",
        f"{sequence['proteins']['all']:,} proteins of whole clusters at 50 % identity that training has not seen, "
        f"{sequence['tokens']['all']:,} tokens, at full length, {sequence['corrupted']['all']:,} of them corrupted: "
        f"as in pretraining, a token is replaced with a probability of {sequence['noise']:g}; no GO term is shown. "
        "Without neighbours, the best is to trust the token that is shown: hard to beat over all tokens, no help where "
        "the token is corrupted. A model that has learned this trusts the shown token, too, and must lose where that "
        "is wrong; so the third table takes the trust back by Bayes's rule: what is left comes from the neighbours, "
        "and token frequencies are what to beat.",
        "",
    ]
    for kind, title in (
        ("all", "over all tokens"),
        ("corrupted", "over corrupted tokens alone"),
        ("by_neighbours", "over corrupted tokens alone, from their neighbours"),
    ):
        lines += [
            f"Cross entropy in nats per token, {title}, by tokens of the protein:",
            "",
            f"| | {' | '.join(_class_title(name) for name in classes)} |",
            f"|---|{'---:|' * len(classes)}",
        ]
        for name, losses in sequence["losses"].items():
            lines.append(f"| {name} | {' | '.join(f'{losses[kind][c]:.4f}' for c in classes)} |")
        lines.append(f"| tokens | {' | '.join(f'{sequence[_COUNTS[kind]][c]:,}' for c in classes)} |")
        lines.append("")
    if go is not None:
        terms = go["terms"]
        lines += [
            f"GO terms of {go['proteins']:,} of them, from the sequence alone ({terms['P']:,} terms of processes, "
            f"{terms['F']:,} of functions, {terms['C']:,} of components; the three roots do not count):",
            "",
            "| | Fmax, process | Fmax, function | Fmax, component | AUPR, micro | AUPR, macro |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, found in go["rows"].items():
            values = [*found["fmax"].values(), found["micro_aupr"], found["macro_aupr"]]
            lines.append(f"| {name} | {' | '.join('' if v is None else f'{v:.3f}' for v in values)} |")
        if go["proteins_with_hits"] is not None:
            lines += ["", f"{go['proteins_with_hits']:,} proteins have a similar training protein (E < 0.001)."]
        lines.append("")
    if rows:
        columns = list(rows[0]["scores"])
        lines += [
            "## Linear probes",
            "",
            "Ridge regression on frozen states of all blocks (of proteins the global state and the mean over residues, "
            "of residues the local state), on samples of the benchmarks' training files, scored on samples of their "
            f"validation files. Proteins are cut to {probes.MAX_LENGTH:,} residues. Letters: frequencies of amino "
            f"acids and length; of residues, the letters of the residue and of {probes.NEIGHBOURS} on each side. "
            f"Probes of residues are trained on {probes.RESIDUES:,} of them.",
            "",
            f"| task | metric | {' | '.join(columns)} | train | validation |",
            f"|---|---|{'---:|' * len(columns)}---:|---:|",
        ]
        for row in rows:
            scores = " | ".join(f"{row['scores'][name]:.3f}" for name in columns)
            sizes = f"{row['train']:,} of {row['train_of']:,} | {row['validation']:,} of {row['validation_of']:,}"
            lines.append(f"| {row['task']} | {row['metric']} | {scores} | {sizes} |")
        own = [f"{row['task']}: {row['validation_file']}" for row in rows if "SHA-1" in row["validation_file"]]
        lines += ["", *(f"Validation of {line}." for line in own), ""]
    lines.append(
        f"proteinbert_fast {e['proteinbert_fast']}, torch {e['torch']}, {e['device']}, {e['dtype']}, seed {e['seed']}, "
        f"{result['seconds']:.0f} s; model {result['model']['sha256']}; corpus {result['corpus']['fingerprint']}."
    )
    return "\n".join(lines) + "\n"


_COUNTS = {"all": "tokens", "corrupted": "corrupted", "by_neighbours": "corrupted"}


def _class_title(name: str) -> str:
    return {"all": "all", "longer": "longer"}.get(name, f"to {name}")


def _untrained(config: ProteinBertConfig, seed: int) -> ProteinBert:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ProteinBert(config).eval()


def _check_terms(model: ProteinBert, corpus: Corpus) -> None:
    wanted = max(len(corpus.terms), 1)
    if model.config.n_annotations != wanted:
        raise InputError(f"the model has {model.config.n_annotations:,} annotations, {corpus.path} {wanted:,} terms")
    if model.go_terms is not None and [t.accession for t in model.go_terms] != [t.id for t in corpus.terms]:
        raise InputError(f"the model's GO terms are not those of {corpus.path}")


def _ids(path: Path | None) -> set[str]:
    return (
        set()
        if path is None
        else {w for line in path.read_text().splitlines() if (w := line.partition("#")[0].strip())}
    )


def _need(module: str, otherwise: str) -> None:
    try:
        __import__(module)
    except ImportError:
        raise InputError(otherwise) from None


@contextmanager
def _told(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Says on stderr what is done, how far it came, and how long it took."""
    started, done, said = time.perf_counter(), 0, time.perf_counter()

    def tell(n: int) -> None:
        nonlocal done, said
        done += n
        if time.perf_counter() - said > 15:
            said = time.perf_counter()
            print(f"{what}: {done / total:.0%}", file=sys.stderr)

    print(what, file=sys.stderr)
    yield tell
    print(f"{what}: {time.perf_counter() - started:.0f} s", file=sys.stderr)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
