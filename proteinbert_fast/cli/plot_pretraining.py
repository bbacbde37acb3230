"""``proteinbert-fast plot-pretraining``: the log of a run as a picture."""

import argparse
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "plot-pretraining",
        help="draw the losses of a pretraining run",
        description="Draw both losses of a pretraining run against what it has seen, by length of the proteins. "
        "A run that is not finished can be drawn too.",
    )
    parser.add_argument("log", metavar="RUN", type=Path, help="folder of a run, or its log.jsonl")
    parser.add_argument(
        "-o", "--output", metavar="OUT", type=Path, required=True, help="picture to write: .png, .svg, .pdf"
    )
    parser.add_argument(
        "--by", choices=("records", "residues"), default="records", help="what was seen; default: records"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Draw; returns the exit code.

    Raises:
        InputError: the log cannot be read, or matplotlib is not installed.
    """
    from proteinbert_fast.pretraining.picture import draw, read_log

    rows = read_log(args.log)
    draw(rows, args.output, args.by, title=_title(args.log, rows))
    print(f"wrote {args.output}: {len(rows):,} rows")
    return 0


def _title(log: Path, rows: list[dict[str, int]]) -> str:
    name = (log if log.is_dir() else log.parent).resolve().name
    if not rows:
        return name
    return f"{name}: {rows[-1]['records']:,} records, {rows[-1]['residues']:,} residues seen"
