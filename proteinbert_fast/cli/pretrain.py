"""``proteinbert-fast pretrain``: a corpus to a trained model, in a folder that remembers how far it came."""

import argparse
import importlib
import logging
import os
import signal
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from proteinbert_fast.errors import InputError

if TYPE_CHECKING:
    from proteinbert_fast.pretraining.config import PretrainingConfig


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the command to the program's parser."""
    from proteinbert_fast.pretraining.config import PretrainingConfig

    parser = subparsers.add_parser(
        "pretrain",
        help="pretrain a model on a corpus",
        description="Pretrain a model on a corpus. A run lives in a folder: checkpoints, log.jsonl, and at the end the "
        "model, which embed and every other command take. SIGTERM and Ctrl-C stop it with a checkpoint; --resume goes "
        "on to the very bits of a run that was never stopped. Under torchrun it trains on many GPUs.",
        epilog="Every option of a run can stand in the --config file, its name with _ for -; a flag wins over it.",
    )
    parser.add_argument("corpus", metavar="CORPUS", type=Path, help="file of build-corpus")
    parser.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True, help="folder of the run")
    parser.add_argument("--config", metavar="TOML", type=Path, help="options of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in FOLDER, or start it")
    parser.add_argument(
        "--allow-different-kernels",
        action="store_true",
        help="continue also where CPU kernels of another instruction set or version have trained, and let ranks run "
        "different ones; bits differ from there on, and checkpoints name all that took part",
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: the GPU if there is one")
    parser.add_argument(
        "--backend", choices=("auto", "cpu", "triton", "reference"), default="auto", help="default: auto"
    )
    parser.add_argument(
        "--hidden-annotations",
        metavar="FILE",
        type=Path,
        help="ids, one per line, of proteins whose GO terms are neither shown nor learned",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary; warnings stay")
    options = parser.add_argument_group("options of the run")
    hints = get_type_hints(PretrainingConfig)
    for field in fields(PretrainingConfig):
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        shown = f"default: {field.default}"
        if get_origin(kind) is Literal:
            options.add_argument(flag, choices=get_args(kind), help=shown)
        elif kind is bool:
            options.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=shown)
        else:
            options.add_argument(flag, type=kind, metavar="N" if kind is int else "X", help=shown)
    return parser


def run(args: argparse.Namespace) -> int:
    """Pretrain; returns the exit code.

    Raises:
        ProteinBertError: corpus, options or folder cannot be used, or training failed.
    """
    from proteinbert_fast.pretraining.config import PretrainingConfig, read_config

    given = {f.name: getattr(args, f.name) for f in fields(PretrainingConfig) if getattr(args, f.name) is not None}
    config = read_config(args.config, **given) if args.config else PretrainingConfig(**given)
    if args.quiet:
        logging.getLogger("proteinbert_fast").setLevel(logging.WARNING)
    with _ranks(args.device) as rank, _stoppable() as stop:
        return _train(args, config, rank, stop)


def _train(args: argparse.Namespace, config: "PretrainingConfig", rank: int, stop: "_Stop") -> int:
    from proteinbert_fast.pretraining.trainer import pretrain

    done = pretrain(
        args.corpus,
        args.output,
        config,
        hidden_ids=_ids(args.hidden_annotations),
        device=args.device,
        backend=args.backend,
        resume=args.resume,
        allow_different_kernels=args.allow_different_kernels,
        should_stop=lambda: stop.wanted,
        progress=not args.quiet and sys.stderr.isatty(),
    )
    if rank == 0 and not args.quiet:
        print(_summary(args.output, config, done))
    if stop.by == signal.SIGINT:
        return 130
    return 0


def _summary(folder: Path, config: "PretrainingConfig", done: Any) -> str:
    lines = [f"{folder}: step {done.step:,} of {config.steps:,}"]
    if found := done.validation:
        lines[0] += f", validation loss {found['token_loss']:.4f} + {found['annotation_loss']:.6f}"
        if "go" in found:
            fmax = ", ".join(f"{a} {f:.3f}" for a, f in found["go"]["fmax"].items() if f is not None)
            lines.append(f"  Fmax of GO terms from the sequence alone: {fmax}")
    if done.best_folder is not None:
        lines.append(f"  model of the lowest validation loss: {done.best_folder}")
    if done.model_folder is None:
        lines.append(f"  stopped with a checkpoint, {done.checkpoint}: --resume goes on")
    else:
        lines.append(f"  model: {done.model_folder}")
    return "\n".join(lines)


def _ids(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text") from None
    return [word for line in lines if (word := line.partition("#")[0].strip())]


class _Stop:
    """Whether a signal asked to stop. A second Ctrl-C does not wait; a second SIGTERM is torchrun's, passing it on."""

    by: int | None = None

    @property
    def wanted(self) -> bool:
        return self.by is not None


@contextmanager
def _stoppable() -> Iterator[_Stop]:
    stop = _Stop()

    def hear(number: int, frame: types.FrameType | None) -> None:
        if stop.by == number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.by = number

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _ranks(device: str | None) -> Iterator[int]:
    """This process's rank; under torchrun, the others are met first."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield 0
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from proteinbert_fast.devices import checked_device

    # Before there is a group: some of what the trainer imports takes it as a default, and would hold it for ever; and
    # a group's thread that lets go of a tensor while the interpreter ends aborts the process.
    importlib.import_module("proteinbert_fast.pretraining.trainer")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(checked_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}"))
    store, rank, n_ranks = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun keeps its store when it starts ranks again, and in it the addresses of those that are gone. Its count
        # of attempts tells them apart; on several nodes that may differ from node to node.
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=n_ranks)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
