"""`build_corpus`: from public files to a corpus, in memory that does not depend on their size.

1. Every file is read once, several at a time, and its rows are written as sorted runs (`runs`). With large files this
   takes nearly all of the time, and it is what an interrupted build keeps.
2. Range by range of keys, rows are joined to proteins (`merge`) without their residues: GO terms are counted, and what
   must be refused is found before anything is written.
3. Range by range again, with residues, proteins are written to a temporary HDF5 file, which gets its name at the end.
"""

import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from proteinbert_fast._tokenizer import OTHER, VOCABULARY
from proteinbert_fast._version import __version__
from proteinbert_fast.data.corpus import layout
from proteinbert_fast.data.corpus import runs as _runs
from proteinbert_fast.data.corpus.merge import Duplicates, Findings, Merger, Proteins, Rules, Unmatched
from proteinbert_fast.data.corpus.reader import read_report
from proteinbert_fast.data.corpus.runs import PartialBuild, RunReader
from proteinbert_fast.data.corpus.sources import (
    TEST,
    VALIDATION,
    Batch,
    Role,
    Source,
    open_source,
    read_rows,
)
from proteinbert_fast.data.fasta import check_choice
from proteinbert_fast.data.gene_ontology import RELATIONS, GeneOntology, Relations
from proteinbert_fast.errors import InputError
from proteinbert_fast.processors import usable_processors

logger = logging.getLogger("proteinbert_fast")

Path = str | os.PathLike[str]

RANGE_BYTES = 1 << 25  # of rows that are joined at a time
_OUTPUT = "corpus.tmp"
_LISTED = 1000  # unknown ids that the report names, the most frequent first


@dataclass(frozen=True)
class Built:
    """What a build has made.

    Attributes:
        path: of the corpus.
        report: what is in it and where that came from (docs/corpus.md lists the fields).
        fingerprint: SHA-256 that names its content.
        seconds: it took; 0 if it was there already.
    """

    path: str
    report: dict[str, Any]
    fingerprint: str
    seconds: float


def build_corpus(
    proteins: Path | Sequence[Path],
    output: Path,
    *,
    ontology: Path | None = None,
    sequences: Sequence[Path] = (),
    annotations: Sequence[Path] = (),
    ancestors: Relations = "part_of",
    min_count: int = 100,
    seed: int = 0,
    validation: float = 0.0,
    test: float = 0.0,
    clusters: Sequence[Path] = (),
    validation_ids: Sequence[Path] = (),
    test_ids: Sequence[Path] = (),
    duplicates: Duplicates = "refuse",
    unmatched: Unmatched = "refuse",
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Built:
    """Builds a corpus: proteins in a shuffled order, with GO terms and held-out sets.

    The same files, options and seed give the same bytes, whatever the number of workers and however often the build was
    interrupted.

    Args:
        proteins: files of UniRef XML, UniProtKB XML or flat text, FASTA, or a dataset of the original; plain, gzip or
            zstandard. Told by their content.
        output: HDF5 file to write.
        ontology: OBO file of the Gene Ontology. None builds a corpus without GO terms.
        sequences: FASTA files with the residues of UniRef XML's entries, which are then taken from there.
        annotations: GAF files, or tables of ids and GO terms, with (more) terms of the proteins.
        ancestors: which ancestors of terms are added: by "is_a" and "part_of", by "is_a" alone, or "none".
        min_count: proteins that must have a term for it to be kept.
        seed: of the order, and of the draws for held-out sets; 0 to 2^64 - 1.
        validation, test: probability that a protein is held out. With ``clusters``, of a cluster.
        clusters: tables of two columns, representative and member.
        validation_ids, test_ids: lists of ids to hold out.
        duplicates: "refuse" an id that occurs twice, or keep the "first".
        unmatched: "refuse" an entry without a sequence in ``sequences`` and the reverse, or "drop" both.
        workers: files that are read at the same time, and threads that compress; the processors there are when None.
        resume: go on with an interrupted build, or start.
        overwrite: replace an existing output, when the new one is complete.
        progress: show a progress bar; when None, if stderr is a terminal.

    Raises:
        InputError: a file or an option cannot be used; names the file and the line.
        ProteinBertError: the disk cannot be written to.
    """
    started = time.perf_counter()
    options = _Options(
        list(_paths(proteins)),
        os.fspath(output),
        None if ontology is None else os.fspath(ontology),
        ancestors,
        min_count,
        Rules(seed, duplicates, unmatched, ancestors, validation, test, bool(clusters)),
        usable_processors() if workers is None else workers,
        sys.stderr.isatty() if progress is None else progress,
    )
    options.check(bool(validation_ids or test_ids))
    with PartialBuild(options.output, resume=resume, overwrite=overwrite) as partial:
        sources = _sources(options, sequences, annotations, clusters, validation_ids, test_ids)
        terms = None if options.ontology is None else GeneOntology.read(options.ontology)
        build = options.build(sources, terms)
        if partial.begin(build, sources, build_of(options.output)):
            with h5py.File(options.output, "r") as file:
                report = read_report(file, options.output)
                return Built(options.output, report, str(layout.attribute(file, "fingerprint")), 0.0)
        try:
            _read_all(partial, sources, options)
            report, fingerprint = _merge_all(partial, sources, options, terms)
        except KeyboardInterrupt:
            rows = sum(run.rows for run in partial.runs)
            logger.warning("interrupted: %s rows are safe in %s; go on with --resume", f"{rows:,}", partial.folder)
            raise
    return Built(options.output, report, fingerprint, time.perf_counter() - started)


@dataclass(frozen=True)
class _Options:
    proteins: list[str]
    output: str
    ontology: str | None
    ancestors: Relations
    min_count: int
    rules: Rules
    workers: int
    progress: bool

    def check(self, has_lists: bool) -> None:
        """Refuses what cannot be. Raises InputError."""
        rules = self.rules
        if not self.proteins:
            raise InputError("no file of proteins given")
        check_choice("ancestors", self.ancestors, RELATIONS)
        check_choice("duplicates", rules.duplicates, ("refuse", "first"))
        check_choice("unmatched", rules.unmatched, ("refuse", "drop"))
        if self.min_count < 1:
            raise InputError(f"min_count must be 1 or more, got {self.min_count}")
        if not 0 <= rules.seed < 1 << 64:
            raise InputError(f"seed must be from 0 to 2^64 - 1, got {rules.seed}")
        if not (0 <= rules.validation <= 1 and 0 <= rules.test <= 1 and rules.validation + rules.test <= 1):
            raise InputError("validation and test are probabilities, and so is their sum")
        if rules.has_clusters and not (rules.validation or rules.test):
            raise InputError("clusters are for drawing held-out sets: give the probability of validation or test")
        if rules.has_clusters and has_lists:
            raise InputError("held-out sets are drawn by cluster or listed by id, not both: lists would tear clusters")
        if self.workers < 1:
            raise InputError(f"workers must be 1 or more, got {self.workers}")

    def build(self, sources: list[Source], terms: GeneOntology | None) -> dict[str, Any]:
        """All that decides the bytes of the output."""
        rules = self.rules
        return {
            "format_version": layout.VERSION,
            "inputs": [
                [source.role.name.lower(), source.format, source.name, os.path.getsize(source.path)]
                for source in sources
            ],
            "ontology": None if terms is None else terms.fingerprint,
            "ancestors": self.ancestors if terms is not None else None,
            "min_count": self.min_count if terms is not None else None,
            "seed": rules.seed,
            "validation": rules.validation,
            "test": rules.test,
            "held_out_ids": [[source.name, source.mark] for source in sources if source.role == Role.HELD_OUT],
            "duplicates": rules.duplicates,
            "unmatched": rules.unmatched,
        }


def _paths(paths: Path | Sequence[Path]) -> list[str]:
    return [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]


def _sources(
    options: _Options,
    sequences: Sequence[Path],
    annotations: Sequence[Path],
    clusters: Sequence[Path],
    validation_ids: Sequence[Path],
    test_ids: Sequence[Path],
) -> list[Source]:
    found = []
    for path in options.proteins:
        source = open_source(path, Role.PROTEIN)
        if sequences and source.format == "uniref-xml":
            source = Source(source.path, Role.ENTRY, source.format)
        found.append(source)
    if sequences and not any(source.role == Role.ENTRY for source in found):
        raise InputError("sequences are for entries of UniRef XML, and there is no such file")
    found += [open_source(path, Role.SEQUENCE) for path in _paths(sequences)]
    found += [open_source(path, Role.ANNOTATION) for path in _paths(annotations)]
    found += [open_source(path, Role.CLUSTER) for path in _paths(clusters)]
    found += [open_source(path, Role.HELD_OUT, mark=VALIDATION) for path in _paths(validation_ids)]
    found += [open_source(path, Role.HELD_OUT, mark=TEST) for path in _paths(test_ids)]
    seen: dict[str, None] = {}
    for source in found:
        real = os.path.realpath(source.path)
        if real in seen:
            raise InputError(f"{source.path}: is given twice")
        seen[real] = None
    if annotations and options.ontology is None:
        raise InputError("GO terms need the ontology: give the OBO file with --ontology")
    return found


def build_of(path: str) -> dict[str, Any] | None:
    """What build made a corpus; None if it is no corpus of this version."""
    try:
        with h5py.File(path, "r") as file:
            if layout.attribute(file, "format") != layout.FORMAT:
                return None
            if layout.attribute(file, "format_version") != layout.VERSION:
                return None
            build: dict[str, Any] = json.loads(layout.attribute(file, "build"))
            return build
    except (OSError, KeyError, TypeError, ValueError, RuntimeError):
        return None


def _read_all(partial: PartialBuild, sources: list[Source], options: _Options) -> None:
    """Every file that is not complete, to runs."""
    left = [i for i, file in enumerate(partial.files) if not file.sha256]
    total = sum(partial.files[i].bytes for i in left)
    stop = threading.Event()
    with _bar(options, total, "reading") as bar:
        counting = threading.Lock()

        def on_bytes(n: int) -> None:
            if stop.is_set():
                raise _Stopped
            with counting:
                bar.update(n)

        # Large files first: the last one to be read decides when all are.
        left.sort(key=lambda i: -partial.files[i].bytes)
        with ThreadPoolExecutor(min(options.workers, len(left)) or 1, thread_name_prefix="read") as pool:
            futures = [pool.submit(_read_one, partial, i, sources[i], options.rules.seed, on_bytes) for i in left]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                if not all(future.done() and future.exception() is None for future in futures):
                    stop.set()
                    for future in futures:
                        future.cancel()
        errors = [error for future in futures if not future.cancelled() and (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, _Stopped)):
            raise error


class _Stopped(Exception):
    """Ends the reading of a file because that of another has failed."""


def _read_one(partial: PartialBuild, number: int, source: Source, seed: int, on_bytes: Callable[[int], None]) -> None:
    digest = hashlib.sha256()
    skip = partial.files[number].rows
    waiting: list[Batch] = []
    size = 0
    try:
        for batch in read_rows(source, on_bytes, digest):
            if skip >= len(batch):
                skip -= len(batch)
                continue
            if skip:
                batch, skip = batch.from_row(skip), 0
            waiting.append(batch)
            size += batch.n_bytes
            if size >= _runs.RUN_BYTES:
                partial.add_run(number, Batch.joined(waiting), seed)
                waiting, size = [], 0
    except _Stopped:
        if waiting:
            partial.add_run(number, Batch.joined(waiting), seed)
        raise
    if waiting:
        partial.add_run(number, Batch.joined(waiting), seed)
    found = os.stat(source.path)
    expected = partial.files[number]
    if (found.st_size, found.st_mtime_ns) != (expected.bytes, expected.mtime_ns):
        raise InputError(f"{source.path}: has changed while it was read")
    partial.complete_file(number, digest.hexdigest())


def _bar(options: _Options, total: int, what: str) -> Any:
    return tqdm(
        total=total, desc=what, unit="B", unit_scale=True, disable=not options.progress, file=sys.stderr, leave=False
    )


@dataclass
class _Counts:
    """What the first pass over all ranges has counted."""

    records: int
    residues: int
    longest_id: int
    own_terms: int
    all_terms: int
    of_term: npt.NDArray[np.int64]


def _merge_all(
    partial: PartialBuild, sources: list[Source], options: _Options, terms: GeneOntology | None
) -> tuple[dict[str, Any], str]:
    with_data = frozenset(i for i, source in enumerate(sources) if source.role == Role.CLUSTER)
    reader = RunReader(partial, with_data)
    ranges = reader.ranges(RANGE_BYTES)
    merger = Merger(sources, options.rules, terms)
    findings = Findings()
    of_term = np.zeros(len(terms) if terms is not None else 0, np.int64)
    counts = _Counts(0, 0, 1, 0, 0, of_term)
    with _bar(options, len(ranges), "joining") as bar:
        for first, stop in ranges:
            found = merger.join(reader.read(first, stop, residues=False), findings)
            counts.records += len(found)
            counts.residues += int(found.lengths.sum())
            counts.own_terms += found.own_go
            counts.all_terms += len(found.go)
            counts.longest_id = max(counts.longest_id, int(np.diff(found.id_offsets).max(initial=1)))
            counts.of_term += np.bincount(found.go, minlength=len(of_term))[: len(of_term)]
            bar.update(1)
    findings.check(lambda source: sources[source].path)
    if terms is None and (given := sum(run.n_go for run in partial.runs)):
        logger.warning("%s GO terms of the input are left out: no ontology was given", f"{given:,}")
    if not counts.records:
        raise InputError(f"{options.output}: no protein is left to write")
    with partial.new_output(_OUTPUT, libver=("v110", "v110")) as (file, sink):
        writing = _Writing(file, partial, sources, options, terms, counts, findings)
        try:
            with _bar(options, len(ranges), "writing") as bar:
                for first, stop in ranges:
                    # Findings of the first pass hold: the second is not asked again.
                    writing.add(merger.join(reader.read(first, stop, residues=True), Findings()))
                    sink.check()
                    bar.update(1)
            report, fingerprint = writing.finish()
        finally:
            writing.writer.close()
    return report, fingerprint


class _Writing:
    """The second pass: proteins to the datasets of an open file."""

    def __init__(
        self,
        file: Any,
        partial: PartialBuild,
        sources: list[Source],
        options: _Options,
        terms: GeneOntology | None,
        counts: _Counts,
        findings: Findings,
    ) -> None:
        self._file, self._partial, self._sources, self._options = file, partial, sources, options
        self._terms, self._counts, self._findings = terms, counts, findings
        self.writer = layout.Writer(file, options.workers)
        kept = np.flatnonzero(counts.of_term >= options.min_count)
        self._kept = kept
        self._new_index = np.full(len(counts.of_term), -1, np.int64)
        self._new_index[kept] = np.arange(len(kept))
        self._ids_dtype = layout.text_dtype(counts.longest_id)
        n, column = counts.records, self.writer.column
        self._tokens = column(layout.TOKENS, counts.residues)
        self._offsets = column(layout.OFFSETS, n + 1)
        self._ids = column(layout.IDS, n, self._ids_dtype)
        self._split = column(layout.SPLIT, n)
        self._go = column(layout.GO_INDICES, int(counts.of_term[kept].sum()), layout.index_dtype(len(kept)))
        self._go_offsets = column(layout.GO_OFFSETS, n + 1)
        self._offsets.append(np.zeros(1, np.int64))
        self._go_offsets.append(np.zeros(1, np.int64))
        self._residues = self._annotations = self._with_go = self._unknown_residues = 0
        self._of_split = np.zeros(3, np.int64)
        self._of_length: Counter[int] = Counter()

    def add(self, proteins: Proteins) -> None:
        """Writes proteins behind those that are there."""
        n = len(proteins)
        if not n:
            return
        self._tokens.append(proteins.tokens)
        self._offsets.append(self._residues + np.cumsum(proteins.lengths, dtype=np.int64))
        self._residues += int(proteins.lengths.sum(dtype=np.int64))
        self._ids.append(_texts(proteins.ids, proteins.id_offsets, self._ids_dtype))
        self._split.append(proteins.split)
        new = self._new_index[proteins.go]
        counts = np.bincount(np.repeat(np.arange(n), np.diff(proteins.go_offsets))[new >= 0], minlength=n)
        self._go.append(new[new >= 0])
        self._go_offsets.append(self._annotations + np.cumsum(counts))
        self._annotations += int(counts.sum())
        self._with_go += int((counts > 0).sum())
        self._unknown_residues += int((proteins.tokens == OTHER).sum())
        self._of_split += np.bincount(proteins.split, minlength=3)
        self._of_length.update(proteins.lengths.tolist())

    def finish(self) -> tuple[dict[str, Any], str]:
        """Completes the datasets and the attributes; the report and the fingerprint."""
        for column in (self._tokens, self._offsets, self._ids, self._split, self._go, self._go_offsets):
            column.finish()
        terms = [] if self._terms is None else [self._terms.terms[i] for i in self._kept.tolist()]
        names = [term.name.encode() for term in terms]
        write = self.writer.write
        write(layout.TERM_IDS, np.array([term.id.encode() for term in terms], "S10"), layout.text_dtype(10))
        width = max(map(len, names), default=1)
        write(layout.TERM_NAMES, np.array(names, f"S{width}"), layout.text_dtype(width))
        write(layout.TERM_ASPECTS, np.array([term.aspect.encode() for term in terms], "S1"))
        write(layout.TERM_COUNTS, self._counts.of_term[self._kept])
        fingerprint = layout.fingerprint(self.writer.digests, self.writer.types)
        report = self._report()
        file = self._file
        text = np.bytes_(json.dumps(report).encode())
        dataset = file.create_dataset(layout.REPORT, data=text, track_times=False)
        layout.set_attribute(dataset, "sha256", hashlib.sha256(text).hexdigest())
        for name, value in (
            ("format", layout.FORMAT),
            ("format_version", layout.VERSION),
            ("fingerprint", fingerprint),
            ("vocabulary", VOCABULARY),
            ("build", json.dumps(self._partial.build)),
            ("version", __version__),
        ):
            layout.set_attribute(file, name, value)
        return report, fingerprint

    def _report(self) -> dict[str, Any]:
        counts, findings, terms = self._counts, self._findings, self._terms
        report: dict[str, Any] = {
            "records": counts.records,
            "residues": counts.residues,
            "unknown_residues": self._unknown_residues,
            "lengths": _lengths(self._of_length),
            "split": dict(zip(("train", "validation", "test"), self._of_split.tolist(), strict=True)),
        }
        if terms is not None:
            aspects = Counter(terms.terms[i].aspect for i in self._kept.tolist())
            report["go"] = {
                "records_with_terms": self._with_go,
                "terms": len(self._kept),
                "terms_by_aspect": dict(sorted(aspects.items())),
                "terms_below_min_count": int((counts.of_term > 0).sum()) - len(self._kept),
                "annotations": self._annotations,
                "annotations_given": counts.own_terms,
                "annotations_with_ancestors": counts.all_terms,
                "annotations_renamed": findings.renamed,
                "unknown_ids": _listed(findings.unknown),
                "obsolete_ids": _listed(findings.obsolete),
                "malformed_ids": findings.malformed,
            }
        report["left_out"] = {
            "duplicates": findings.duplicates,
            "entries_without_sequence": findings.entries_without_sequence,
            "sequences_without_entry": findings.sequences_without_entry,
        }
        report["ids_without_protein"] = {
            "annotations": findings.annotations_without_protein,
            "clusters": findings.clusters_without_protein,
            "held_out": findings.held_out_without_protein,
        }
        report["proteins_without_cluster"] = findings.proteins_without_cluster
        report["inputs"] = [
            {
                "name": file.name,
                "role": source.role.name.lower(),
                "format": source.format,
                "bytes": file.bytes,
                "sha256": file.sha256,
                "rows": file.rows,
            }
            for file, source in zip(self._partial.files, self._sources, strict=True)
        ]
        report["ontology"] = None if terms is None else terms.fingerprint
        return report


def _texts(packed: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], dtype: Any) -> npt.NDArray[Any]:
    """Packed texts as an array of fixed width."""
    width = np.dtype(dtype).itemsize
    table = np.zeros((len(offsets) - 1, width), np.uint8)
    table[np.arange(width) < np.diff(offsets)[:, None]] = packed
    return table.view(f"S{width}").ravel()


def _lengths(of_length: Counter[int]) -> dict[str, float]:
    """Smallest, largest, mean and percentiles of lengths."""
    lengths = np.array(sorted(of_length), np.int64)
    below = np.cumsum([of_length[n] for n in lengths.tolist()])
    total = int(below[-1])
    found: dict[str, float] = {
        "min": int(lengths[0]),
        "max": int(lengths[-1]),
        "mean": round(sum(n * times for n, times in of_length.items()) / total, 2),
    }
    for percent in (5, 25, 50, 75, 95):
        found[f"p{percent}"] = int(lengths[np.searchsorted(below, percent / 100 * total)])
    return found


def _listed(counter: Counter[int]) -> dict[str, Any]:
    """Ids with their counts, the most frequent first."""
    most = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    return {
        "ids": len(counter),
        "annotations": sum(counter.values()),
        "counts": {f"GO:{number:07d}": times for number, times in most[:_LISTED]},
    }
