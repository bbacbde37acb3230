"""``proteinbert-fast corpus``: look at a corpus, check it, write it as the original's dataset."""

import argparse
import json
import os
import sys
from pathlib import Path

PROJECTED = 106_000_000  # records of the UniRef90 release that the original was trained on


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "corpus",
        help="look at a corpus, or check it",
        description="Look at a pretraining corpus, check it, or write it as a dataset of the original.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    info = actions.add_parser("info", help="what is in it", description="Show what is in a corpus, and its size.")
    info.add_argument("corpus", metavar="CORPUS", type=Path)
    info.add_argument("--json", action="store_true", help="the whole report")
    verify = actions.add_parser(
        "verify",
        help="check every value",
        description="Compare every value with its digest. Names what is broken; the exit code is 1 then.",
    )
    verify.add_argument("corpus", metavar="CORPUS", type=Path)
    export = actions.add_parser(
        "export",
        help="write it as a dataset of the original",
        description="Write a small corpus as a dense dataset of the original: a byte for each protein and term.",
    )
    export.add_argument("corpus", metavar="CORPUS", type=Path)
    export.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="HDF5 file to write")
    export.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit code.

    Raises:
        ProteinBertError: the corpus cannot be read, or the output not be written.
    """
    actions = {"info": _info, "verify": _verify, "export": _export}
    return actions[args.action](args)


def _info(args: argparse.Namespace) -> int:
    from proteinbert_fast.cli.build_corpus import summary
    from proteinbert_fast.data.corpus import Corpus

    with Corpus(args.corpus) as corpus:
        if args.json:
            print(json.dumps(corpus.report | {"fingerprint": corpus.fingerprint}, indent=2))
            return 0
        size = os.path.getsize(args.corpus)
        print(f"{args.corpus}: {size:,} bytes, {size / max(len(corpus), 1):,.1f} per protein")
        print(summary(corpus.report, corpus.fingerprint))
        projected = size / max(len(corpus), 1) * PROJECTED
        print(f"  at this rate {PROJECTED:,} proteins take {projected / 1e9:,.1f} GB")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from proteinbert_fast.data.corpus import Corpus, verify_corpus

    with tqdm(desc="verifying", unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as bar:
        broken = verify_corpus(args.corpus, bar.update)
    for line in broken:
        print(f"proteinbert-fast: error: {args.corpus}: {line}", file=sys.stderr)
    if broken:
        return 1
    with Corpus(args.corpus) as corpus:
        print(f"{args.corpus}: whole: {len(corpus):,} proteins, fingerprint {corpus.fingerprint}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from proteinbert_fast.data.corpus import Corpus, write_dense

    with Corpus(args.corpus) as corpus:
        write_dense(corpus, args.output, overwrite=args.overwrite)
        print(f"wrote {args.output}: {len(corpus):,} proteins, {len(corpus.terms):,} terms")
    return 0
