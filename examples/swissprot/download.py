"""Get Swiss-Prot with GO terms, and the Gene Ontology, from Debian's package of a function predictor's data.

    python download.py swissprot_data

The package is metastudent-data 2.0.1 (225 MB): three BLAST databases of Swiss-Prot proteins of January 2014, one for
each aspect of the Gene Ontology, the GO terms that each protein was given there (electronic annotations too), and the
ontology's graph. Needs apt-get and dpkg-deb; with --package FILE.deb, dpkg-deb alone. Takes about a minute.

Writes into the output folder

    swissprot_2014.tsv   accession, go_bp, go_mf, go_cc (GO ids joined by ";"), sequence; 516,371 proteins
    swissprot_2014.fasta the same sequences, for clustering
    go.obo               the ontology as OBO 1.2: terms, names, is_a and part_of
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

PACKAGE = "metastudent-data"
ASPECTS = {"BPO": "biological_process", "MFO": "molecular_function", "CCO": "cellular_component"}
ROOTS = {"GO:0008150": "biological_process", "GO:0003674": "molecular_function", "GO:0005575": "cellular_component"}
RESIDUES = "-ABCDEFGHIKLMNPQRSTVWXYZU*OJ"  # letter of each code in NCBI's files of proteins ("ncbistdaa")
TITLE = bytes.fromhex("3080 3080 a080 1a")  # sets, a definition, its title: a VisibleString


class DownloadError(Exception):
    """The package is not what it was."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    parser = argparse.ArgumentParser(description="Get Swiss-Prot of January 2014 with GO terms from a Debian package.")
    parser.add_argument("output", type=Path, help="folder to write to")
    parser.add_argument("--package", type=Path, metavar="FILE.deb", help=f"{PACKAGE}, if it is here already")
    args = parser.parse_args(argv)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.output) as folder:
            unpack(args.package, Path(folder))
            sequences, terms = read_proteins(one(folder, "dataset_201401"))
            write_proteins(args.output, sequences, terms)
            write_ontology(args.output / "go.obo", one(folder, "goGraph.txt"), one(folder, "nameMapping.txt"))
    except (DownloadError, OSError) as error:
        print(f"download.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def unpack(package: Path | None, folder: Path) -> None:
    """Fetches the package, if it is not here, and unpacks it."""
    if package is None:
        command(["apt-get", "-q", "download", PACKAGE], folder)
        package = one(folder, f"{PACKAGE}_*.deb")
    command(["dpkg-deb", "-x", str(package.resolve()), "."], folder)


def command(words: list[str], folder: Path) -> None:
    """Runs a program there."""
    try:
        subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise DownloadError(f"{words[0]} is not installed: this needs Debian, or a system like it") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()
        raise DownloadError(f"{' '.join(words)}: {said[-1] if said else f'exit code {error.returncode}'}") from error


def one(folder: str | Path, pattern: str) -> Path:
    """The first file or folder of this name, anywhere below."""
    found = sorted(Path(folder).rglob(pattern))
    if not found:
        raise DownloadError(f"{PACKAGE}: no {pattern} in it: another version than 2.0.1?")
    return found[0]


def read_proteins(folder: Path) -> tuple[dict[str, str], dict[str, dict[str, set[str]]]]:
    """Sequences by accession, and GO ids by accession and aspect."""
    sequences: dict[str, str] = {}
    terms: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for aspect in ASPECTS:
        for title, residues in blast_database(folder / aspect / "goasp.fasta"):
            accession = title.split("|")[0].strip()
            if sequences.setdefault(accession, residues) != residues:
                raise DownloadError(f"{PACKAGE}: {accession} has two sequences")
        with open(folder / aspect / "goasp_annot.dat") as file:
            for line in file:
                if words := line.split():
                    terms[words[0]][aspect].update(words[1:])
    if not sequences:
        raise DownloadError(f"{PACKAGE}: its databases are empty")
    return sequences, terms


def blast_database(base: Path) -> Iterator[tuple[str, str]]:
    """Title and residues of each protein of a BLAST database, version 4: files .pin (places), .phr, .psq."""
    places = base.with_name(f"{base.name}.pin").read_bytes()
    headers = base.with_name(f"{base.name}.phr").read_bytes()
    residues = base.with_name(f"{base.name}.psq").read_bytes()
    at = 0

    def number() -> int:
        nonlocal at
        at += 4
        return int.from_bytes(places[at - 4 : at], "big")

    version, is_protein = number(), number()
    if (version, is_protein) != (4, 1):
        raise DownloadError(f"{base.name}.pin: is no database of proteins of version 4")
    for _ in ("title", "date"):
        length = number()
        at += length
    n = number()
    at += 8  # residues of all
    number()  # of the longest
    header_starts = [number() for _ in range(n + 1)]
    residue_starts = [number() for _ in range(n + 1)]
    letters = bytes(ord(RESIDUES[code]) if code < len(RESIDUES) else ord("?") for code in range(256))
    text = residues.translate(letters).decode("ascii")
    for i in range(n):
        title = title_of(headers[header_starts[i] : header_starts[i + 1]])
        yield title, text[residue_starts[i] : residue_starts[i + 1] - 1]  # a zero byte ends each sequence


def title_of(header: bytes) -> str:
    """The title of a sequence, in ASN.1: tag, length in one byte or in as many as the first one says, text."""
    if not header.startswith(TITLE):
        raise DownloadError(f"{PACKAGE}: a sequence without a title")
    at = len(TITLE)
    length = header[at]
    at += 1
    if length >= 128:
        bytes_of_length = length - 128
        length = int.from_bytes(header[at : at + bytes_of_length], "big")
        at += bytes_of_length
    return header[at : at + length].decode("ascii")


def write_proteins(folder: Path, sequences: Mapping[str, str], terms: Mapping[str, Mapping[str, set[str]]]) -> None:
    """Writes the table and the FASTA file, by accession."""
    rows, records, n_terms = ["accession\tgo_bp\tgo_mf\tgo_cc\tsequence\n"], [], 0
    for accession in sorted(sequences):
        own = terms.get(accession, {})
        columns = [";".join(sorted(own.get(aspect, ()))) for aspect in ASPECTS]
        rows.append("\t".join([accession, *columns, sequences[accession]]) + "\n")
        records.append(f">{accession}\n{sequences[accession]}\n")
        n_terms += any(columns)
    write(folder / "swissprot_2014.tsv", rows)
    write(folder / "swissprot_2014.fasta", records)
    n_residues = sum(map(len, sequences.values()))
    print(f"{folder}: {len(sequences):,} proteins, {n_residues:,} residues, {n_terms:,} with GO terms")


def write_ontology(path: Path, graph: Path, names: Path) -> None:
    """Writes the ontology as OBO, of its edges (parent, child, weight, relation) and the names of its terms."""
    parents: dict[str, list[tuple[str, str]]] = defaultdict(list)
    obsolete: set[str] = set()
    for line in graph.read_text().splitlines():
        parent, child, _, relation = line.split("\t")
        if parent.startswith("obsolete"):
            obsolete.add(child)
        elif relation in {"is_a", "part_of"}:
            parents[child].append((relation, parent))
    named = dict(line.split("\t")[:2] for line in names.read_text().splitlines() if line)
    aspects = aspect_of_each(parents)
    used = sorted(aspects)
    names_of = {go_id: named[go_id].replace("{", "\\{") for go_id in [*used, *obsolete]}  # bare, it opens a qualifier
    lines = ["format-version: 1.2\n", "ontology: go\n", f"remark: made of goGraph.txt of {PACKAGE} 2.0.1\n"]
    for go_id in used:
        lines += ["\n[Term]\n", f"id: {go_id}\n", f"name: {names_of[go_id]}\n", f"namespace: {aspects[go_id]}\n"]
        for relation, parent in sorted(parents[go_id]):
            lines.append(f"is_a: {parent}\n" if relation == "is_a" else f"relationship: part_of {parent}\n")
    for go_id in sorted(obsolete - set(used)):
        lines += ["\n[Term]\n", f"id: {go_id}\n", f"name: {names_of[go_id]}\n", "is_obsolete: true\n"]
    lines += ["\n[Typedef]\n", "id: part_of\n", "name: part of\n"]
    write(path, lines)
    print(f"{path}: {len(used):,} terms in use, {len(obsolete - set(used)):,} obsolete")


def aspect_of_each(parents: Mapping[str, Iterable[tuple[str, str]]]) -> dict[str, str]:
    """The aspect of each term: that of the root that its is_a relations lead to."""
    children: dict[str, list[str]] = defaultdict(list)
    for child, above in parents.items():
        for relation, parent in above:
            if relation == "is_a":
                children[parent].append(child)
    aspects = dict(ROOTS)
    waiting = list(ROOTS)
    while waiting:
        term = waiting.pop()
        for child in children[term]:
            if child not in aspects:
                aspects[child] = aspects[term]
                waiting.append(child)
    return aspects


def write(path: Path, lines: Iterable[str]) -> None:
    """Writes a file under its name when it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.writelines(lines)
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
