"""Rows of one range of keys to proteins of the corpus: everything that is known of an id, joined."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from proteinbert_fast._records import close_terms, gather_bytes, hash_texts
from proteinbert_fast.data.corpus.runs import SPLIT, Rows
from proteinbert_fast.data.corpus.sources import TEST, VALIDATION, Role, Source
from proteinbert_fast.data.gene_ontology import OBSOLETE, GeneOntology, Relations
from proteinbert_fast.errors import InputError

Duplicates = Literal["refuse", "first"]
Unmatched = Literal["refuse", "drop"]

Bools = npt.NDArray[np.bool_]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rules:
    """How rows become proteins.

    Attributes:
        seed: of the order and of draws.
        duplicates: an id that a protein had before: "refuse" it, or keep the "first".
        unmatched: an entry without its sequence, or the reverse, where they come from different files: "refuse" it, or
            "drop" it.
        relations: which ancestors of GO terms are added.
        validation, test: probabilities that a protein, or a cluster of them, is held out.
        has_clusters: whether whole clusters are drawn.
    """

    seed: int
    duplicates: Duplicates
    unmatched: Unmatched
    relations: Relations
    validation: float
    test: float
    has_clusters: bool


@dataclass(slots=True)
class Problem:
    """What is refused: the place that comes first in the input, and how many there are."""

    place: tuple[int, int]
    what: str
    count: int


@dataclass
class Findings:
    """What joining has found out, over all ranges.

    Attributes:
        unknown, obsolete: GO numbers that no term has, or an obsolete one without a replacement; with counts.
        malformed: words in the place of a GO id that are none.
        renamed: annotations whose id is an alternative id or was replaced.
        duplicates: proteins left out because an earlier one has their id.
        entries_without_sequence, sequences_without_entry: left out.
        annotations_without_protein, clusters_without_protein, held_out_without_protein: ids in those files that no
            protein has.
        proteins_without_cluster: drawn on their own.
    """

    unknown: Counter[int] = field(default_factory=Counter)
    obsolete: Counter[int] = field(default_factory=Counter)
    malformed: int = 0
    renamed: int = 0
    duplicates: int = 0
    entries_without_sequence: int = 0
    sequences_without_entry: int = 0
    annotations_without_protein: int = 0
    clusters_without_protein: int = 0
    held_out_without_protein: int = 0
    proteins_without_cluster: int = 0
    problems: dict[str, Problem] = field(default_factory=dict)

    def check(self, path_of: Callable[[int], str]) -> None:
        """Raises an InputError about the first problem there is."""
        for problem in sorted(self.problems.values(), key=lambda problem: problem.place):
            source, line = problem.place
            more = f" ({problem.count - 1:,} more such)" if problem.count > 1 else ""
            raise InputError(f"{path_of(source)}:{line}: {problem.what}{more}")


@dataclass(frozen=True, slots=True)
class Proteins:
    """Proteins of a range of keys, in the order of the corpus.

    Attributes:
        ids: packed UTF-8, with ``id_offsets``.
        lengths: (n,) residues.
        tokens: packed residues; empty when they were not asked for.
        go: indices of terms of the whole ontology, ascending for each protein, with ``go_offsets``.
        own_go: how many terms the proteins had before ancestors were added.
        split: (n,) 0 train, 1 validation, 2 test.
    """

    ids: npt.NDArray[np.uint8]
    id_offsets: Longs
    lengths: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.uint8]
    go: npt.NDArray[np.int32]
    go_offsets: Longs
    own_go: int
    split: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.split)


class Merger:
    """Joins rows.

    Args:
        sources: the files, in the order of their numbers.
        rules: how.
        ontology: None if GO terms are left out.
    """

    def __init__(self, sources: list[Source], rules: Rules, ontology: GeneOntology | None) -> None:
        self._sources = sources
        self._rules = rules
        self._ontology = ontology
        self._roles = np.array([source.role for source in sources], np.uint8)
        if ontology is not None:
            self._ancestors, self._ancestor_offsets = ontology.ancestors(rules.relations)
            numbers = [int(term.id[3:]) for term in ontology]
            self._number_of_term = np.array(numbers, np.int64)

    def join(self, rows: Rows, findings: Findings) -> Proteins:
        """Proteins of a range.

        Args:
            rows: all rows of it.
            findings: what is found out is added to.
        """
        n = len(rows)
        table = rows.rows
        starts = np.ones(n, bool)
        starts[1:] = (table["key"][1:] != table["key"][:-1]) | (table["identity"][1:] != table["identity"][:-1])
        group = np.cumsum(starts) - 1
        n_groups = int(group[-1]) + 1 if n else 0
        role = self._roles[rows.sources]

        # The row that gives each group its residues, and the one that says that there is such a protein.
        owner = self._first_of(rows, group, n_groups, (role == Role.PROTEIN) | (role == Role.SEQUENCE), findings)
        entry = self._first_of(rows, group, n_groups, role == Role.ENTRY, findings)
        owner_role = np.where(owner >= 0, role[owner] if n else 0, 255)
        lonely_entry = (entry >= 0) & (owner_role != Role.SEQUENCE)
        lonely_sequence = (entry < 0) & (owner_role == Role.SEQUENCE)
        self._unmatched(rows, entry[lonely_entry], "has no sequence in the files of sequences", findings)
        self._unmatched(rows, owner[lonely_sequence], "is no entry of the XML files", findings)
        findings.entries_without_sequence += int(lonely_entry.sum())
        findings.sequences_without_entry += int(lonely_sequence.sum())
        kept = (owner >= 0) & ~lonely_sequence & ~(lonely_entry & (owner_role != Role.PROTEIN))
        for one_role, counter in (
            (Role.ANNOTATION, "annotations_without_protein"),
            (Role.CLUSTER, "clusters_without_protein"),
            (Role.HELD_OUT, "held_out_without_protein"),
        ):
            lost = len(np.unique(group[(role == one_role) & ~kept[group]]))
            setattr(findings, counter, getattr(findings, counter) + lost)

        chosen = owner[kept]
        ids, id_offsets = gather_bytes(rows.ids, rows.id_offsets, chosen)
        tokens, _ = gather_bytes(rows.data, rows.data_offsets, chosen)
        # Rows of dropped duplicates give no terms.
        usable = kept[group] & (role != Role.CLUSTER) & (role != Role.HELD_OUT)
        usable &= (role == Role.ANNOTATION) | (np.arange(n) == owner[group]) | (np.arange(n) == entry[group])
        new_number = np.cumsum(kept) - 1
        go, go_offsets, own = self._terms(rows, usable, new_number[group], len(chosen), findings)
        split = self._split(rows, role, group, kept, chosen, findings)
        return Proteins(ids, id_offsets, rows.lengths[chosen], tokens, go, go_offsets, own, split)

    def _first_of(self, rows: Rows, group: Longs, n_groups: int, wanted: Bools, findings: Findings) -> Longs:
        """Row of each group that is the first wanted one, or -1; the others are duplicates."""
        first = np.full(n_groups, -1, np.int64)
        at = np.flatnonzero(wanted)
        first[group[at][::-1]] = at[::-1]
        for i in at[first[group[at]] != at].tolist():
            findings.duplicates += 1
            if self._rules.duplicates == "refuse":
                earlier = int(first[group[i]])
                place = f"{self._sources[rows.sources[earlier]].path}:{rows.rows['line'][earlier]}"
                what = f"the id {_id_of(rows, i)} was already used at {place}"
                self._refuse(rows, i, "duplicate", what + "; --duplicates first keeps the first", findings)
        return first

    def _unmatched(self, rows: Rows, at: Longs, what: str, findings: Findings) -> None:
        if self._rules.unmatched == "refuse":
            for i in at.tolist():
                text = f"{_id_of(rows, i)} {what}; --unmatched drop leaves such out"
                self._refuse(rows, i, "unmatched", text, findings)

    def _refuse(self, rows: Rows, i: int, kind: str, what: str, findings: Findings) -> None:
        place = (int(rows.sources[i]), int(rows.rows["line"][i]))
        known = findings.problems.get(kind)
        if known is None:
            findings.problems[kind] = Problem(place, what, 1)
            return
        known.count += 1
        if place < known.place:
            known.place, known.what = place, what

    def _terms(
        self, rows: Rows, usable: Bools, number: Longs, n: int, findings: Findings
    ) -> tuple[npt.NDArray[np.int32], Longs, int]:
        """Terms of each protein with their ancestors; how many there were before."""
        if self._ontology is None:
            return np.empty(0, np.int32), np.zeros(n + 1, np.int64), 0
        terms, offsets, own, renamed, lost = close_terms(
            rows.go,
            rows.go_offsets,
            np.where(usable, number, -1),
            n,
            self._ontology.index_of_number,
            self._number_of_term,
            self._ancestors,
            self._ancestor_offsets,
        )
        findings.renamed += renamed
        for value, times in zip(*(part.tolist() for part in np.unique(lost, return_counts=True)), strict=True):
            if value < 0:
                findings.malformed += times
            elif self._ontology.index_of_number[value] == OBSOLETE:
                findings.obsolete[value] += times
            else:
                findings.unknown[value] += times
        return terms, offsets, own

    def _split(
        self,
        rows: Rows,
        role: npt.NDArray[np.uint8],
        group: Longs,
        kept: Bools,
        chosen: Longs,
        findings: Findings,
    ) -> npt.NDArray[np.uint8]:
        rules = self._rules
        table = rows.rows
        # By name: a list of ids, or the set that the file itself names.
        split = np.zeros(len(kept), np.uint8)
        for i in np.flatnonzero((table["mark"] > 0) & ((role == Role.HELD_OUT) | (role == Role.PROTEIN))).tolist():
            mark = table["mark"][i]
            if split[group[i]] not in (0, mark) and kept[group[i]]:
                self._refuse(
                    rows, i, "held out", f"{_id_of(rows, i)} is held out for validation and for test", findings
                )
            split[group[i]] = mark
        split = split[kept]
        if not rules.validation and not rules.test:
            return split
        # By chance: of the protein, or of its cluster.
        names, name_offsets = gather_bytes(rows.ids, rows.id_offsets, chosen)
        draws = hash_texts(names, name_offsets, rules.seed, SPLIT)
        if rules.has_clusters:
            at = np.flatnonzero((role == Role.CLUSTER) & kept[group])
            of_cluster, cluster_offsets = gather_bytes(rows.data, rows.data_offsets, at)
            cluster_draws = hash_texts(of_cluster, cluster_offsets, rules.seed, SPLIT)
            number = (np.cumsum(kept) - 1)[group[at]]
            repeated = np.flatnonzero(number[1:] == number[:-1]) + 1
            for k in repeated[cluster_draws[repeated] != cluster_draws[repeated - 1]].tolist():
                self._refuse(rows, int(at[k]), "cluster", f"{_id_of(rows, int(at[k]))} is in two clusters", findings)
            draws[number] = cluster_draws
            findings.proteins_without_cluster += len(draws) - len(np.unique(number))
        chance = draws.astype(np.float64) / 2.0**64
        drawn = np.where(chance < rules.test, TEST, np.where(chance < rules.test + rules.validation, VALIDATION, 0))
        return np.where(split > 0, split, drawn).astype(np.uint8)


def _id_of(rows: Rows, i: int) -> str:
    return rows.ids[rows.id_offsets[i] : rows.id_offsets[i + 1]].tobytes().decode("utf-8", "replace")
