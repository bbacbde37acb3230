"""``proteinbert-fast build-corpus``: public files in, a corpus for pretraining out."""

import argparse
import logging
from pathlib import Path
from typing import Any

EPILOG = """\
The formats of IN are told by their content: UniRef XML, UniProtKB XML or flat text, FASTA, a dataset of the original;
plain, .gz or .zst. An interrupted build keeps what it has read in OUT.partial; --resume goes on with it.
docs/corpus.md describes the corpus and the report.

examples:
  proteinbert-fast build-corpus uniref90.xml.gz -o uniref90.h5 --ontology go.obo --test 0.001 --resume
  proteinbert-fast build-corpus uniprot_sprot.dat.gz -o swissprot.h5 --ontology go.obo --min-count 50
  proteinbert-fast build-corpus mine.fasta -o mine.h5 --ontology go.obo --annotations goa_human.gaf.gz
  proteinbert-fast build-corpus mine.fasta -o sequences.h5
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "build-corpus",
        help="build a corpus from UniRef, UniProtKB or FASTA files",
        description="Build a pretraining corpus: proteins in a shuffled order, GO terms, held-out sets.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("proteins", metavar="IN", nargs="+", type=Path, help="files of proteins")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="HDF5 file to write")

    more = parser.add_argument_group("more about the proteins")
    more.add_argument(
        "--sequences", metavar="FASTA", nargs="+", type=Path, default=[], help="sequences of the entries of UniRef XML"
    )
    more.add_argument(
        "--annotations",
        metavar="FILE",
        nargs="+",
        type=Path,
        default=[],
        help="GO terms: GAF, or a table",
    )

    terms = parser.add_argument_group("GO terms")
    terms.add_argument("--ontology", metavar="OBO", type=Path, help="the Gene Ontology; without it: no GO terms")
    terms.add_argument(
        "--ancestors",
        choices=("part_of", "is_a", "none"),
        default="part_of",
        help="add ancestors by is_a and part_of (default), by is_a alone, or none, as the original in effect did",
    )
    terms.add_argument(
        "--min-count", metavar="N", type=int, default=100, help="proteins that a kept term has; default: %(default)s"
    )

    order = parser.add_argument_group("order and held-out sets")
    order.add_argument("--seed", type=int, default=0, help="of the order and of draws; default: %(default)s")
    order.add_argument("--validation", metavar="P", type=float, default=0.0, help="probability of a protein")
    order.add_argument("--test", metavar="P", type=float, default=0.0, help="the same for the test set")
    order.add_argument(
        "--clusters", metavar="TSV", nargs="+", type=Path, default=[], help="draw clusters: representative, member"
    )
    order.add_argument("--validation-ids", metavar="FILE", nargs="+", type=Path, default=[], help="ids, one per line")
    order.add_argument("--test-ids", metavar="FILE", nargs="+", type=Path, default=[], help="the same for the test set")

    records = parser.add_argument_group("records")
    records.add_argument(
        "--duplicates", choices=("refuse", "first"), default="refuse", help="an id that came before; default: refuse"
    )
    records.add_argument(
        "--unmatched",
        choices=("refuse", "drop"),
        default="refuse",
        help="entries without a sequence in --sequences, and the reverse; default: refuse",
    )

    run = parser.add_argument_group("the run")
    run.add_argument("--workers", metavar="N", type=int, help="files at a time, threads; default: all")
    again = run.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with an interrupted build, or start")
    again.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    run.add_argument("--quiet", action="store_true", help="no progress and no summary; warnings stay")
    return parser


def run(args: argparse.Namespace) -> int:
    """Build and print a summary; returns the exit code.

    Raises:
        ProteinBertError: an input, an option or the output cannot be used.
    """
    from proteinbert_fast.data.corpus import build_corpus

    if args.quiet:
        logging.getLogger("proteinbert_fast").setLevel(logging.WARNING)
    built = build_corpus(
        args.proteins,
        args.output,
        ontology=args.ontology,
        sequences=args.sequences,
        annotations=args.annotations,
        ancestors=args.ancestors,
        min_count=args.min_count,
        seed=args.seed,
        validation=args.validation,
        test=args.test,
        clusters=args.clusters,
        validation_ids=args.validation_ids,
        test_ids=args.test_ids,
        duplicates=args.duplicates,
        unmatched=args.unmatched,
        workers=args.workers,
        resume=args.resume,
        overwrite=args.overwrite,
        progress=False if args.quiet else None,
    )
    if not args.quiet:
        took = f"in {built.seconds:,.1f} s" if built.seconds else "is complete already"
        print(f"{args.output}: {took}, {args.output.stat().st_size:,} bytes")
        print(summary(built.report, built.fingerprint))
    return 0


def summary(report: dict[str, Any], fingerprint: str) -> str:
    """A report in a few lines for a person."""
    lengths, split, go = report["lengths"], report["split"], report.get("go")
    lines = [
        f"  proteins     {report['records']:,}, of {lengths['min']:,} to {lengths['max']:,} residues, "
        f"mean {lengths['mean']:,}, median {lengths['p50']:,}",
        f"  residues     {report['residues']:,}, {report['unknown_residues']:,} of them unknown",
        f"  sets         train {split['train']:,}, validation {split['validation']:,}, test {split['test']:,}",
    ]
    if go is None:
        lines.append("  GO terms     none")
    else:
        lines.append(
            f"  GO terms     {go['terms']:,} kept, {go['terms_below_min_count']:,} too rare; "
            f"{go['annotations']:,} annotations of {go['records_with_terms']:,} proteins"
        )
        for what in ("unknown", "obsolete"):
            found = go[f"{what}_ids"]
            if found["ids"]:
                most = ", ".join(f"{go_id} ({n:,})" for go_id, n in list(found["counts"].items())[:3])
                lines.append(
                    f"  {what + ' ids':<12} {found['ids']:,}, in {found['annotations']:,} annotations: {most} ..."
                )
        if go["malformed_ids"]:
            lines.append(f"  malformed    {go['malformed_ids']:,} words where a GO id was expected")
    for what, n in report["left_out"].items():
        if n:
            lines.append(f"  left out     {n:,} {what.replace('_', ' ')}")
    for what, n in report["ids_without_protein"].items():
        if n:
            lines.append(f"  no protein   for {n:,} ids of {what.replace('_', ' ')}")
    if report["proteins_without_cluster"]:
        lines.append(f"  no cluster   for {report['proteins_without_cluster']:,} proteins: each is its own")
    return "\n".join([*lines, f"  fingerprint  {fingerprint}"])
