"""Make the pretraining corpus of `proteinbert-swissprot`: 90 % representatives of Swiss-Prot, 50 % clusters held out.

    python prepare.py swissprot_2014.tsv --clusters90 nr90.tsv --clusters50 nr50.tsv --ontology go.obo \
        --benchmarks benchmarks/*.test.csv.gz benchmarks/*.valid.csv.gz -o swissprot

Writes into the output folder

    corpus.h5               the corpus, as `proteinbert-fast build-corpus` makes it of the files below
    proteins.fasta          the 90 % representatives
    annotations.tsv         their GO terms
    validation_ids.txt      held out: accessions, one a line
    test_ids.txt
    hidden_annotations.txt  proteins whose GO terms must stay out of the loss

**Held out** are whole 50 % clusters, by a rule that needs nothing but the accession r of a cluster's representative:
int(sha1(r), 16) % 50 is 0 for validation, 1 for test.

**Hidden annotations.** A model that has seen the GO terms of a protein knows more about it than its sequence, so the
terms of proteins like those of a benchmark's held-out files are no training signal. A protein is like a benchmark
protein if

- they are in the same 50 % cluster (a benchmark protein is in the cluster of the protein with the same sequence), or
- it holds at least half of the benchmark protein's distinct words of 12 residues, or the other way round. Words with
  unknown residues (X) do not count.

Same files, same bytes. Takes about two minutes and 2 GB.
"""

import argparse
import csv
import gzip
import hashlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

from proteinbert_fast.data.corpus import build_corpus
from proteinbert_fast.errors import InputError, ProteinBertError

COLUMNS = ["accession", "go_bp", "go_mf", "go_cc", "sequence"]
HELD_OUT_OF = 50  # clusters: one of them is validation, one test
WORD = 12  # residues; 5 bits each are 60
CHUNK = 1 << 22  # residues whose words are looked up at a time

Words = npt.NDArray[np.uint64]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    parser = argparse.ArgumentParser(
        description="Make the pretraining corpus of Swiss-Prot, with held-out clusters, from a table of proteins."
    )
    parser.add_argument("proteins", type=Path, help="table that download.py writes")
    parser.add_argument("--clusters90", type=Path, required=True, help="table: representative, a tab, member")
    parser.add_argument("--clusters50", type=Path, required=True, help="table: representative, a tab, member")
    parser.add_argument("--ontology", type=Path, required=True, help="the Gene Ontology as OBO")
    parser.add_argument("--benchmarks", type=Path, nargs="*", default=[], help="CSV files with a column seq")
    parser.add_argument("--min-count", type=int, default=100, help="proteins that must have a GO term (default 100)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing corpus there")
    args = parser.parse_args(argv)
    try:
        prepare(args)
    except (ProteinBertError, OSError, UnicodeDecodeError, EOFError) as error:
        print(f"prepare.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def prepare(args: argparse.Namespace) -> None:
    """Does all of it.

    Raises:
        InputError: a file cannot be used, or files do not belong together.
    """
    corpus = args.output / "corpus.h5"
    if corpus.exists() and not args.overwrite:
        raise InputError(f"{corpus} exists: --overwrite replaces it")
    proteins = read_proteins(args.proteins)
    clusters90 = read_clusters(args.clusters90)
    clusters50 = read_clusters(args.clusters50)
    cluster = {accession: cluster_of(accession, clusters90, clusters50, args) for accession in proteins}
    corpus_ids = [accession for accession in sorted(proteins) if clusters90[accession] == accession]
    print(f"{len(proteins):,} proteins, {len(corpus_ids):,} representatives at 90 %, ", end="")
    print(f"{len(set(cluster.values())):,} clusters at 50 %")

    held_out = {accession: held_out_set(cluster[accession]) for accession in corpus_ids}
    hidden = hidden_annotations(proteins, corpus_ids, cluster, read_benchmarks(args.benchmarks))

    args.output.mkdir(parents=True, exist_ok=True)
    lists = {
        "validation_ids.txt": [accession for accession in corpus_ids if held_out[accession] == "validation"],
        "test_ids.txt": [accession for accession in corpus_ids if held_out[accession] == "test"],
        "hidden_annotations.txt": sorted(hidden),
    }
    for name, ids in lists.items():
        write(args.output / name, "".join(f"{accession}\n" for accession in ids))
        print(f"{args.output / name}: {len(ids):,} proteins")
    write(args.output / "proteins.fasta", "".join(f">{i}\n{proteins[i][1]}\n" for i in corpus_ids))
    write(args.output / "annotations.tsv", "".join(f"{i}\t{proteins[i][0]}\n" for i in corpus_ids if proteins[i][0]))
    built = build_corpus(
        args.output / "proteins.fasta",
        corpus,
        ontology=args.ontology,
        annotations=[args.output / "annotations.tsv"],
        ancestors="part_of",
        min_count=args.min_count,
        # A small corpus may have none, which the builder takes for a mistake.
        validation_ids=[args.output / "validation_ids.txt"] if lists["validation_ids.txt"] else [],
        test_ids=[args.output / "test_ids.txt"] if lists["test_ids.txt"] else [],
        overwrite=args.overwrite,
    )
    report = built.report
    split = ", ".join(f"{name} {count:,}" for name, count in report["split"].items())
    print(f"{corpus}: {report['records']:,} proteins, {report['residues']:,} residues ({split})")
    print(f"  {report['go']['terms']:,} GO terms, {report['go']['annotations']:,} annotations", end=" ")
    print(f"of {report['go']['records_with_terms']:,} proteins; fingerprint {built.fingerprint}")


def held_out_set(representative: str) -> str:
    """The set of a 50 % cluster: "train", "validation" or "test"."""
    place = int(hashlib.sha1(representative.encode()).hexdigest(), 16) % HELD_OUT_OF
    return {0: "validation", 1: "test"}.get(place, "train")


def cluster_of(accession: str, clusters90: dict[str, str], clusters50: dict[str, str], args: argparse.Namespace) -> str:
    """Representative of a protein's 50 % cluster; that table may hold all proteins, or the 90 % representatives."""
    if accession not in clusters90:
        raise InputError(f"{args.clusters90}: no cluster for {accession} of {args.proteins}")
    found = clusters50.get(accession) or clusters50.get(clusters90[accession])
    if found is None:
        raise InputError(f"{args.clusters50}: no cluster for {clusters90[accession]} of {args.clusters90}")
    return found


def read_proteins(path: Path) -> dict[str, tuple[str, str]]:
    """GO ids, joined by ";", and residues of each accession."""
    proteins: dict[str, tuple[str, str]] = {}
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip("\n").split("\t")
            if number == 1 and fields != COLUMNS:
                raise InputError(f"{path}:1: the columns {', '.join(COLUMNS)} were expected")
            if number == 1:
                continue
            if len(fields) != len(COLUMNS) or not fields[0]:
                raise InputError(f"{path}:{number}: {len(COLUMNS)} columns were expected, the first an accession")
            accession, *terms, residues = fields
            if accession in proteins:
                raise InputError(f"{path}:{number}: {accession} for the second time")
            if not (residues.isascii() and residues.isalpha() and residues.isupper()):
                raise InputError(f"{path}:{number}: the sequence of {accession} is not of capital letters")
            proteins[accession] = ";".join(filter(None, terms)), residues
    if not proteins:
        raise InputError(f"{path}: no proteins")
    return proteins


def read_clusters(path: Path) -> dict[str, str]:
    """Representative of each member."""
    clusters: dict[str, str] = {}
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip("\n").split("\t")
            if len(fields) != 2 or not all(fields):
                raise InputError(f"{path}:{number}: representative, a tab, member were expected")
            if clusters.setdefault(fields[1], fields[0]) != fields[0]:
                raise InputError(f"{path}:{number}: {fields[1]} is in two clusters")
    return clusters


def read_benchmarks(paths: Sequence[Path]) -> list[str]:
    """Distinct sequences of CSV files, sorted."""
    sequences: set[str] = set()
    for path in paths:
        with open_text(path) as file:
            rows = csv.DictReader(file)
            if "seq" not in (rows.fieldnames or ()):
                raise InputError(f"{path}:1: no column seq")
            found = {(row["seq"] or "").strip().upper() for row in rows}
        bad = next((sequence for sequence in sorted(found) if not (sequence.isascii() and sequence.isalpha())), None)
        if bad is not None:
            raise InputError(f"{path}: a sequence is not of letters: {bad[:60]!r}")
        print(f"{path.name}: {len(found):,} sequences")
        sequences |= found
    return sorted(sequences)


def hidden_annotations(
    proteins: dict[str, tuple[str, str]], corpus_ids: list[str], cluster: dict[str, str], benchmark: list[str]
) -> set[str]:
    """Accessions of the corpus that are like one of the sequences of ``benchmark``."""
    wanted = set(benchmark)
    same = {accession for accession, (_, residues) in proteins.items() if residues in wanted}
    clusters = {cluster[accession] for accession in same}
    by_cluster = {accession for accession in corpus_ids if cluster[accession] in clusters}
    alike = sharing_words([proteins[accession][1] for accession in corpus_ids], benchmark)
    by_words = {corpus_ids[i] for i in alike}
    print(f"{len(benchmark):,} benchmark sequences: {len(same):,} proteins have the same sequence; ", end="")
    print(f"{len(by_cluster):,} of the corpus are in their {len(clusters):,} clusters, ", end="")
    print(f"{len(by_words):,} share words, {len(by_cluster | by_words):,} either")
    return by_cluster | by_words


def sharing_words(sequences: Sequence[str], benchmark: Sequence[str]) -> list[int]:
    """Places in ``sequences`` of those that share half of the words of some ``benchmark`` sequence, or of their own."""
    postings = [np.unique(own) for _, own in words_of(benchmark)]
    n_words = np.array([len(own) for own in postings])
    if not n_words.sum():
        return []
    owner = np.repeat(np.arange(len(postings)), n_words)
    flat = np.concatenate(postings)
    order = np.argsort(flat, kind="stable")
    owner = owner[order]
    known, start = np.unique(flat[order], return_index=True)
    stop = np.append(start[1:], len(owner))
    # Most words are in no benchmark sequence: a table of 16 MB says so faster than a search.
    maybe = np.zeros(1 << 24, dtype=bool)
    maybe[hashed(known)] = True

    found = []
    for i, own in words_of(sequences):
        candidates = own[maybe[hashed(own)]]
        if not len(candidates):
            continue
        place = np.minimum(np.searchsorted(known, candidates), len(known) - 1)
        place = np.unique(place[known[place] == candidates])
        if not len(place):
            continue
        owners, shared = np.unique(np.concatenate([owner[start[p] : stop[p]] for p in place]), return_counts=True)
        if (2 * shared >= np.minimum(n_words[owners], len(np.unique(own)))).any():
            found.append(i)
    return found


def words_of(sequences: Sequence[str]) -> Iterator[tuple[int, Words]]:
    """Place and words of each sequence, repeats included: WORD letters of 5 bits, none of them X."""
    at = 0
    while at < len(sequences):
        first, size = at, 0
        while at < len(sequences) and (size == 0 or size + len(sequences[at]) <= CHUNK):
            size += len(sequences[at])
            at += 1
        letters = np.frombuffer("".join(sequences[first:at]).encode(), dtype=np.uint8)
        codes = (letters & 31).astype(np.uint64)
        n = max(len(codes) - WORD + 1, 0)
        words, usable = np.zeros(n, np.uint64), np.ones(n, dtype=bool)
        for i in range(WORD):
            words = (words << np.uint64(5)) | codes[i : n + i]
            usable &= letters[i : n + i] != ord("X")
        begin = 0
        for i in range(first, at):
            end = begin + len(sequences[i])
            inside = slice(begin, max(begin, end - WORD + 1))
            yield i, words[inside][usable[inside]]
            begin = end


def hashed(words: Words) -> Words:
    """24 bits of each word, by multiplication."""
    return (words * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)


def open_text(path: Path) -> TextIO:
    """A text file, gzip or plain, told by its first bytes."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return io.TextIOWrapper(gzip.open(path), "utf-8") if packed else open(path, encoding="utf-8")


def write(path: Path, text: str) -> None:
    """Writes a file under its name when it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
