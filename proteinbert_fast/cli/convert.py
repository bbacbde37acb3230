"""``proteinbert-fast convert``: checkpoints from and to the original's pickle."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from proteinbert_fast.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch

    from proteinbert_fast.checkpoints import LoadedCheckpoint

EPILOG = """\
The form of OUT follows from its name: weights.pkl is the original's pickle, weights.safetensors a single file
without optimiser state, and a name without suffix a directory with config.json and model.safetensors.

examples:
  proteinbert-fast convert epoch_92400_sample_23500000.pkl proteinbert/
  proteinbert-fast convert my_model/ my_model.pkl        # for the original Keras code
  proteinbert-fast convert proteinbert proteinbert.safetensors
  proteinbert-fast convert run/model my_model/ --dtype float16     # half the size
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "convert",
        help="convert checkpoints from and to the original's pickle",
        description="Convert a checkpoint: nothing in it is run, all is checked, the result is read back.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "input",
        metavar="IN",
        help="official .pkl, directory, .safetensors, hub name, proteinbert or proteinbert-swissprot",
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="NAME.pkl, NAME.safetensors, or a directory")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    parser.add_argument("--no-optimizer", action="store_true", help="leave out the optimiser state")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="round the weights, and leave out the optimiser state, which is not theirs then; default: as they are",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Convert ``args.input`` to ``args.output`` and print a summary; returns the exit code.

    Raises:
        CheckpointError: the input cannot be read or used, or the output cannot be written.
        InputError: the output exists and ``--overwrite`` is not given, or its name says no known form.
    """
    output: Path = args.output.expanduser()
    form = output_form(output)
    check_free(output, form, args.overwrite)
    if form == "pickle" and args.dtype not in (None, "float32"):
        raise InputError(f"{output}: the original's pickle holds float32 only, not {args.dtype}")
    if output.exists() and Path(args.input).exists() and output.samefile(args.input):
        raise InputError(f"{output}: IN and OUT are the same")

    from proteinbert_fast.checkpoints import (
        load_pretrained,
        write_directory,
        write_official,
        write_single_file,
    )

    checkpoint = load_pretrained(args.input, optimizer=not args.no_optimizer)
    print(summary(checkpoint))
    left_out = []
    if args.dtype is not None:
        checkpoint, rounded = rounded_weights(checkpoint, args.dtype)
        if rounded and checkpoint.optimizer_state is not None:
            left_out.append("optimiser state (it belongs to the weights before rounding)")
            checkpoint = replace(checkpoint, optimizer_state=None)
    if form != "directory":
        if form == "safetensors" and checkpoint.optimizer_state is not None:
            left_out.append("optimiser state (a directory or .pkl keeps it)")
            checkpoint = replace(checkpoint, optimizer_state=None)
        if checkpoint.go_terms is not None:
            left_out.append("GO terms (a directory keeps them)")
            checkpoint = replace(checkpoint, go_terms=None)

    if form == "directory":
        digests = {output / name: digest for name, digest in write_directory(output, checkpoint).items()}
    elif form == "pickle":
        digests = {output: write_official(output, checkpoint)}
    else:
        digests = {output: write_single_file(output, checkpoint)}

    written = load_pretrained(output)
    check_same(checkpoint, written, output)
    for path, digest in digests.items():
        print(f"wrote {path} ({path.stat().st_size:,} bytes)")
        print(f"  sha256      {digest}")
    print("read back: the same")
    for what in left_out:
        print(f"left out: {what}", file=sys.stderr)
    return 0


_OTHER_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".h5", ".hdf5", ".keras", ".onnx", ".npz", ".npy", ".json"}


def output_form(output: Path) -> Literal["pickle", "safetensors", "directory"]:
    """What to write at a path of this name.

    Raises:
        InputError: the suffix is that of a form that is not written.
    """
    if output.suffix == ".pkl":
        return "pickle"
    if output.suffix == ".safetensors":
        return "safetensors"
    if output.suffix in _OTHER_SUFFIXES and not output.is_dir():
        raise InputError(f"{output}: {output.suffix} is not written; use .pkl, .safetensors or a directory")
    return "directory"


def check_free(output: Path, form: str, overwrite: bool) -> None:
    """Refuse to write over something.

    Raises:
        InputError: the path is taken, and ``overwrite`` is not given or cannot help.
    """
    if form == "directory" and output.is_file():
        raise InputError(f"{output}: a file is in the way of the directory")
    if form != "directory" and output.is_dir():
        raise InputError(f"{output}: a directory is in the way of the file")
    taken = any(output.iterdir()) if output.is_dir() else output.exists()
    if taken and not overwrite:
        raise InputError(f"{output}: exists already; --overwrite replaces it")


def summary(checkpoint: "LoadedCheckpoint") -> str:
    """What a checkpoint that was read holds, in a few lines for a person."""
    config, state = checkpoint.config, checkpoint.optimizer_state
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.state_dict.values()}
    lines = [
        f"read {checkpoint.source}",
        f"  sizes       {config.n_annotations:,} GO terms, local {config.d_local}, global {config.d_global}, "
        f"{config.n_blocks} blocks, {config.n_heads} heads of {config.d_key}, "
        f"{config.kernel_size} taps (dilations 1 and {config.wide_dilation})",
        f"  weights     {len(checkpoint.state_dict)} tensors, {config.n_parameters:,} parameters, "
        f"{', '.join(sorted(types))}",
        f"  optimiser   {'none' if state is None else f'state after {state.iteration:,} steps'}",
        f"  GO terms    {'not named' if checkpoint.go_terms is None else f'{len(checkpoint.go_terms):,} named'}",
        f"  sha256      {checkpoint.sha256}",
    ]
    return "\n".join(lines)


def rounded_weights(checkpoint: "LoadedCheckpoint", dtype: str) -> "tuple[LoadedCheckpoint, bool]":
    """The checkpoint with its weights in a type, and whether any of them changed; says by how much."""
    import torch

    weights = {key: tensor.to(getattr(torch, dtype)) for key, tensor in checkpoint.state_dict.items()}
    worst = max(float((checkpoint.state_dict[key].float() - weights[key].float()).abs().max()) for key in weights)
    print(f"  rounded     to {dtype}, by at most {worst:.1e}")
    return replace(checkpoint, state_dict=weights), worst != 0


def check_same(wanted: "LoadedCheckpoint", written: "LoadedCheckpoint", output: Path) -> None:
    """Compare what was written, read back, with what was to be written.

    Raises:
        CheckpointError: they differ.
    """
    pairs: list[tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]] = [
        (wanted.state_dict, written.state_dict)
    ]
    before, after = wanted.optimizer_state, written.optimizer_state
    same = wanted.config == written.config and wanted.go_terms == written.go_terms
    if before is not None and after is not None:
        same = same and before.iteration == after.iteration
        pairs += [(before.first_moments, after.first_moments), (before.second_moments, after.second_moments)]
    elif before is not after:
        same = False
    if not same or not all(_equal(left, right) for left, right in pairs):
        raise CheckpointError(f"{output}: reads back different from what was written")


def _equal(left: "Mapping[str, torch.Tensor]", right: "Mapping[str, torch.Tensor]") -> bool:
    # Compared as float32, which holds every value of the three types that weights have.
    return left.keys() == right.keys() and all(bool((left[key].float() == right[key].float()).all()) for key in left)
