"""The Gene Ontology: terms, their ancestors, and what became of ids that are no longer in use.

OBO files are read by fastobo, a strict parser of OBO 1.4 that reads 1.2 as well and says where a file is malformed.
What is looked at here is the meaning: ids that are defined twice or never, circles, replacements.
"""

import io
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from proteinbert_fast.data.fasta import DamagedFile, FastaFile, Fingerprint, TextFile, check_choice, check_readable
from proteinbert_fast.errors import InputError

__all__ = ["Aspect", "GeneOntology", "Relations", "Term"]

Aspect = Literal["P", "F", "C", ""]
Relations = Literal["part_of", "is_a", "none"]

RELATIONS = ("part_of", "is_a", "none")
UNKNOWN, OBSOLETE = -1, -2

_ASPECTS: dict[str, Aspect] = {"biological_process": "P", "molecular_function": "F", "cellular_component": "C"}
GO_ID = re.compile(r"GO:[0-9]{7}")
_COMMENT = re.compile(rb"^[ \t]*!.*$", re.MULTILINE)
_LARGEST = 10_000_000  # ids have seven digits


@dataclass(frozen=True, slots=True)
class Term:
    """A term in use.

    Attributes:
        id: such as "GO:0005737".
        name: such as "cytoplasm".
        aspect: P (biological process), F (molecular function), C (cellular component), or "" if the file says none.
        is_a: indices of its direct is_a parents, ascending.
        part_of: indices of what it is directly part of, ascending.
    """

    id: str
    name: str
    aspect: Aspect
    is_a: tuple[int, ...]
    part_of: tuple[int, ...]


class GeneOntology:
    """Terms in use by ascending id; the index of a term is its place in that order.

    Args:
        terms: by ascending id.
        synonyms: other ids (alternative, or obsolete with a replacement) and the index of the term that they mean.
        obsolete: ids that are no longer in use and have no replacement.
        name: of the file, for messages.
        fingerprint: of the file.
    """

    def __init__(
        self,
        terms: Iterable[Term],
        synonyms: dict[str, int],
        obsolete: Iterable[str] = (),
        name: str = "ontology",
        fingerprint: Fingerprint | None = None,
    ) -> None:
        self.terms = tuple(terms)
        self.synonyms = synonyms
        self.obsolete = frozenset(obsolete)
        self.name = name
        self.fingerprint = fingerprint
        self._index = {term.id: i for i, term in enumerate(self.terms)} | synonyms

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "GeneOntology":
        """Reads an OBO file, 1.2 or 1.4, plain or compressed.

        Raises:
            InputError: the file cannot be read, is no OBO file, defines an id twice, refers to a GO term that it does
                not define, goes round in a circle, or has no GO term; or fastobo is not installed.
        """
        file = FastaFile.at(path)
        check_readable(file)
        source = TextFile(file, digest=True)
        text = bytearray()
        try:
            for chunk in source:
                text += chunk
        except DamagedFile as error:
            line = text.count(b"\n") + 1
            raise InputError(f"{file.name}:{line}: {error}") from error
        return _Reading(file.name, bytes(text)).ontology(source.fingerprint)

    def __len__(self) -> int:
        return len(self.terms)

    def __iter__(self) -> Iterator[Term]:
        return iter(self.terms)

    def find(self, go_id: str) -> int:
        """Index of the term that an id means, by way of alternative ids and replacements.

        Returns:
            The index; UNKNOWN (-1) or OBSOLETE (-2, without a replacement) if there is none.
        """
        return self._index.get(go_id, OBSOLETE if go_id in self.obsolete else UNKNOWN)

    @cached_property
    def index_of_number(self) -> npt.NDArray[np.int32]:
        """int32 (10,000,000,): `find` for every GO number (5737 is GO:0005737); 40 MB."""
        table = np.full(_LARGEST, UNKNOWN, np.int32)
        for go_id in self.obsolete:
            if GO_ID.fullmatch(go_id):
                table[int(go_id[3:])] = OBSOLETE
        for go_id, index in self._index.items():
            if GO_ID.fullmatch(go_id):
                table[int(go_id[3:])] = index
        return table

    def ancestors(self, relations: Relations = "part_of") -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """What each term implies, itself included.

        Args:
            relations: "part_of" follows is_a and part_of, over which GO annotations hold; "is_a" that alone; "none"
                gives each term alone.

        Returns:
            Indices, int32 (n,), ascending for each term; and offsets, int64 (terms + 1,).
        """
        check_choice("relations", relations, RELATIONS)
        found: list[frozenset[int]] = [frozenset()] * len(self.terms)
        for i in _parents_first(self.terms):
            implied = {i}
            for parent in _parents(self.terms[i], relations):
                implied |= found[parent]
            found[i] = frozenset(implied)
        indices, offsets = array("i"), array("q", [0])
        for implied_terms in found:
            indices.extend(sorted(implied_terms))
            offsets.append(len(indices))
        return np.frombuffer(indices, np.int32) if indices else np.empty(0, np.int32), np.frombuffer(offsets, np.int64)


def _parents(term: Term, relations: Relations = "part_of") -> tuple[int, ...]:
    return {"none": (), "is_a": term.is_a, "part_of": term.is_a + term.part_of}[relations]


def _parents_first(terms: tuple[Term, ...]) -> list[int]:
    """Indices with every term behind its parents; terms of a circle, and what is below one, are left out."""
    waiting = [len(_parents(term)) for term in terms]
    children: list[list[int]] = [[] for _ in terms]
    for i, term in enumerate(terms):
        for parent in _parents(term):
            children[parent].append(i)
    order = [i for i, n in enumerate(waiting) if n == 0]
    for i in order:  # grows meanwhile
        for child in children[i]:
            waiting[child] -= 1
            if waiting[child] == 0:
                order.append(child)
    return order


@dataclass(slots=True)
class _Frame:
    """A term as the file states it."""

    name: str
    aspect: Aspect
    obsolete: bool
    is_a: list[str]
    part_of: list[str]
    alternatives: list[str]
    replacements: list[str]


class _Reading:
    """Reads one file; keeps its text, to say in which line something is wrong."""

    def __init__(self, name: str, text: bytes) -> None:
        self._name = name
        self._text = text
        self._frames: dict[str, _Frame] = {}

    def ontology(self, fingerprint: Fingerprint) -> GeneOntology:
        for frame in self._parsed():
            self._add(frame)
        ids = sorted(go_id for go_id, frame in self._frames.items() if not frame.obsolete)
        if not ids:
            raise InputError(f"{self._name}: no GO term is defined in it")
        index = {go_id: i for i, go_id in enumerate(ids)}
        terms = tuple(self._term(go_id, index) for go_id in ids)
        self._refuse_circles(terms)
        synonyms, obsolete = self._other_ids(index)
        return GeneOntology(terms, synonyms, obsolete, self._name, fingerprint)

    def _parsed(self) -> Iterator[Any]:
        try:
            import fastobo
        except ImportError as error:
            raise InputError(
                f"{self._name}: reading OBO files needs a package: pip install 'proteinbert-fast[corpus]'"
            ) from error
        if not self._text.strip():
            raise InputError(f"{self._name}: is empty")
        try:
            self._text.decode()
        except UnicodeDecodeError as error:
            line = self._text.count(b"\n", 0, error.start) + 1
            raise InputError(f"{self._name}:{line}: is not UTF-8 text") from error
        try:
            # Lines of nothing but a comment are blanked: fastobo's parser gives up on them within a term.
            text = _COMMENT.sub(b"", self._text)
            frames = fastobo.iter(io.BytesIO(text), ordered=True)
            yield from (frame for frame in frames if isinstance(frame, fastobo.term.TermFrame))
        except SyntaxError as error:
            place = f"{self._name}:{error.lineno}" if error.lineno else self._name
            raise InputError(f"{place}: is not OBO: {error.msg}") from error
        except BaseException as error:
            # A panic of its Rust code is no Exception; its class cannot be imported.
            if isinstance(error, (ValueError, TypeError, OSError, RuntimeError)) or "Panic" in type(error).__name__:
                raise InputError(f"{self._name}: is not OBO: {' '.join(str(error).split())}") from error
            raise

    def _add(self, parsed: Any) -> None:
        go_id = str(parsed.id)
        if not GO_ID.fullmatch(go_id):
            return  # terms of other ontologies, which some editions of GO refer to
        if go_id in self._frames:
            raise self._error(go_id, "is defined twice", occurrence=2)
        frame = _Frame("", "", False, [], [], [], [])
        for clause in parsed:
            match clause.raw_tag():
                case "name":
                    frame.name = str(clause.name)
                case "namespace":
                    frame.aspect = _ASPECTS.get(clause.raw_value(), "")
                case "is_obsolete":
                    frame.obsolete = bool(clause.obsolete)
                case "is_a":
                    frame.is_a.append(str(clause.term))
                case "relationship":
                    if str(clause.typedef) in {"part_of", "BFO:0000050"}:
                        frame.part_of.append(str(clause.term))
                case "alt_id":
                    frame.alternatives.append(str(clause.alt_id))
                case "replaced_by":
                    frame.replacements.append(str(clause.term))
        self._frames[go_id] = frame

    def _term(self, go_id: str, index: dict[str, int]) -> Term:
        frame = self._frames[go_id]
        is_a = self._indices(go_id, "is_a", frame.is_a, index)
        part_of = self._indices(go_id, "part_of", frame.part_of, index)
        return Term(go_id, frame.name, frame.aspect, is_a, tuple(p for p in part_of if p not in is_a))

    def _indices(self, go_id: str, relation: str, parents: list[str], index: dict[str, int]) -> tuple[int, ...]:
        parents = [parent for parent in parents if GO_ID.fullmatch(parent)]
        for parent in parents:
            if parent not in index:
                what = "is obsolete" if parent in self._frames else "is not defined in the file"
                raise self._error(go_id, f"{relation} {parent}, which {what}")
        return tuple(sorted({index[parent] for parent in parents}))

    def _refuse_circles(self, terms: tuple[Term, ...]) -> None:
        below = set(range(len(terms))) - set(_parents_first(terms))
        if not below:
            return
        # Upwards from any term that is left, by way of others that are, until one comes again.
        at, path = min(below), list[int]()
        while at not in path:
            path.append(at)
            at = next(parent for parent in _parents(terms[at]) if parent in below)
        circle = [terms[i].id for i in [*path[path.index(at) :], at]]
        shown = circle if len(circle) <= 8 else [*circle[:7], "..."]
        raise self._error(circle[0], f"is its own ancestor: {' -> '.join(shown)}")

    def _other_ids(self, index: dict[str, int]) -> tuple[dict[str, int], list[str]]:
        synonyms: dict[str, int] = {}
        obsolete = []
        for go_id, frame in self._frames.items():
            for other in frame.alternatives:
                # An alternative id that is also a term of its own means that term.
                if not frame.obsolete and other not in index:
                    synonyms.setdefault(other, index[go_id])
        for go_id, frame in self._frames.items():
            if not frame.obsolete or go_id in synonyms:
                continue
            found = self._replacement(go_id, index, synonyms)
            if found is None:
                obsolete.append(go_id)
                continue
            for other in (go_id, *frame.alternatives):
                if other not in index:
                    synonyms.setdefault(other, found)
        return synonyms, obsolete

    def _replacement(self, go_id: str, index: dict[str, int], synonyms: dict[str, int]) -> int | None:
        """The term in use that an obsolete one was replaced by, over as many steps as it takes."""
        seen, waiting = {go_id}, [go_id]
        for at in waiting:  # grows meanwhile
            for other in self._frames[at].replacements:
                found = index.get(other, synonyms.get(other))
                if found is not None:
                    return found
                if other in self._frames and other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return None

    def _error(self, go_id: str, what: str, occurrence: int = 1) -> InputError:
        defined = re.finditer(rb"^id:\s*" + re.escape(go_id.encode()), self._text, re.MULTILINE)
        starts = [match.start() for match in defined]
        place = self._name
        if len(starts) >= occurrence:
            line = self._text.count(b"\n", 0, starts[occurrence - 1]) + 1
            place += f":{line}"
        return InputError(f"{place}: {go_id} {what}")
