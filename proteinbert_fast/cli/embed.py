"""``proteinbert-fast embed``: FASTA in, HDF5 out."""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from proteinbert_fast.errors import CheckpointError
from proteinbert_fast.weights import DEFAULT_MODEL

if TYPE_CHECKING:
    from proteinbert_fast.model import ProteinBert

EPILOG = """\
The result is one HDF5 file: ids, lengths and embeddings in the order of the input (docs/embed.md shows how to
read it). An interrupted run keeps what it has done in OUT.partial; --resume goes on with it.

examples:
  proteinbert-fast embed proteome.fasta.gz -o proteome.h5
  proteinbert-fast embed proteome.fasta.gz -o residues.h5 --per residue --resume
  zcat *.fa.gz | proteinbert-fast embed - -o all.h5 --pooling both --layers all
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "embed",
        help="embed the proteins of FASTA files to an HDF5 file",
        description="Embed every protein of one or more FASTA files (plain, .gz, .zst, or - for stdin).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("fasta", metavar="FASTA", nargs="+", type=Path, help="FASTA files; - is standard input")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="HDF5 file to write")

    what = parser.add_argument_group("what to write")
    what.add_argument("--per", choices=("protein", "residue"), default="protein", help="default: protein")
    what.add_argument(
        "--pooling",
        choices=("global", "mean", "both"),
        help="per protein: the global state (default), the mean of the residues, or both",
    )
    what.add_argument(
        "--layers",
        type=_layers,
        default="last",
        metavar="LAYERS",
        help="last block (default), all blocks, the original's concatenation (original), or numbers (2,4,6)",
    )
    what.add_argument("--storage-dtype", choices=("float16", "float32"), default="float16", help="default: float16")
    what.add_argument(
        "--layout",
        choices=("flat", "uniprot"),
        default="flat",
        help="flat arrays (default), or a dataset per accession as in UniProt's embedding files",
    )

    model = parser.add_argument_group("model").add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        default=DEFAULT_MODEL,
        help=f"{DEFAULT_MODEL} (default), which comes with this package; proteinbert, the official weights, fetched "
        "once; a directory, .safetensors or official .pkl file, or a hub name",
    )
    model.add_argument("--untrained", action="store_true", help="random weights: to try things out, no biology in it")
    parser.add_argument("--seed", type=int, default=0, help="of --untrained; default: 0")

    speed = parser.add_argument_group("how to compute")
    speed.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto (default) is bfloat16 on GPUs and float32 on CPUs",
    )
    speed.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    speed.add_argument("--tokens-per-batch", type=int, metavar="N", help="fewer need less memory")

    records = parser.add_argument_group("records")
    records.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="cut longer proteins to N residues; default: never",
    )
    records.add_argument(
        "--lowercase",
        choices=("other", "upper"),
        default="other",
        help="lower-case letters are unknown residues as for the original (other), or residues (upper)",
    )
    records.add_argument(
        "--duplicates",
        choices=("refuse", "keep", "first"),
        default="refuse",
        help="an id that came before: refuse it (default), keep both, or keep the first",
    )

    run = parser.add_argument_group("the run")
    again = run.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with an interrupted run, or start")
    again.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    run.add_argument(
        "--allow-different-kernels",
        action="store_true",
        help="with --resume: continue also where CPU kernels of another instruction set or version have begun; bits "
        "differ from there on, and OUT names all that took part",
    )
    run.add_argument("--quiet", action="store_true", help="no progress and no summary; warnings stay")
    return parser


def run(args: argparse.Namespace) -> int:
    """Embed and print a summary; returns the exit code.

    Raises:
        ProteinBertError: the input, the model or the output cannot be used.
    """
    from proteinbert_fast.embedding import embed

    logger = logging.getLogger("proteinbert_fast")
    if args.quiet:
        logger.setLevel(logging.WARNING)
    try:
        summary = embed(
            args.fasta,
            args.output,
            model=_untrained(args.seed) if args.untrained else args.model,
            per=args.per,
            pooling=args.pooling,
            layers=args.layers,
            dtype=args.dtype,
            storage_dtype=args.storage_dtype,
            device=args.device,
            tokens_per_batch=args.tokens_per_batch,
            max_length=args.max_length,
            layout=args.layout,
            lowercase=args.lowercase,
            duplicates=args.duplicates,
            resume=args.resume,
            overwrite=args.overwrite,
            allow_different_kernels=args.allow_different_kernels,
            progress=False if args.quiet else None,
        )
    except CheckpointError as error:
        if args.model != "proteinbert":  # the one that is fetched from where its authors keep it
            raise
        raise CheckpointError(f"{error}. Without --model, {DEFAULT_MODEL} is used, which needs no network") from error
    if args.untrained:
        _say_untrained()
    if not args.quiet:
        print(summary)
    return 0


def _layers(text: str) -> "str | list[int]":
    if text in {"last", "all", "original"}:
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        known = "last, all, original or block numbers like 2,4,6"
        raise argparse.ArgumentTypeError(f"{text!r} is not {known}") from None


def _untrained(seed: int) -> "ProteinBert":
    import torch

    from proteinbert_fast.model import ProteinBert

    _say_untrained()
    torch.manual_seed(seed)
    model = ProteinBert()
    model.checkpoint_source = f"untrained (seed {seed})"
    return model


def _say_untrained() -> None:
    print(
        "proteinbert-fast: warning: *** NOT TRAINED: the weights are random (--untrained). "
        "These embeddings hold no biology. ***",
        file=sys.stderr,
    )
