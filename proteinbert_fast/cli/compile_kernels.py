"""``proteinbert-fast compile-kernels``: the GPU kernels of a model, compiled into Triton's cache ahead of their use."""

import argparse
import re
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from proteinbert_fast.config import ProteinBertConfig

DTYPES = ("bfloat16", "float16", "float32")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "compile-kernels",
        help="compile the GPU kernels ahead, without a GPU too",
        description="Compile the GPU kernels of a model into Triton's cache (TRITON_CACHE_DIR, or ~/.triton/cache), so "
        "that a first call on a GPU need not. For a container image, say: no GPU is needed where it is built, only "
        "the Triton, Python and proteinbert_fast that will run.",
    )
    parser.add_argument(
        "--capability", metavar="X.Y", type=_capability, default=None,
        help="compute capability of the GPU, 9.0 for an H100; default: that of the GPU here",
    )  # fmt: skip
    parser.add_argument(
        "--model", default="proteinbert-swissprot",
        help="whose sizes count: a folder, a file or a name, as for embed; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="the dtype to compute in; default: %(default)s"
    )
    parser.add_argument(
        "--weights-dtype", choices=DTYPES, default="float32",
        help="the dtype of the weights; default: %(default)s, which is what embed and pretrain load",
    )  # fmt: skip
    parser.add_argument("--training", action="store_true", help="also compile the kernels of gradients")
    parser.add_argument("--threads", type=_positive, default=None, help="that compile; default: one per processor")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compile; returns the exit code.

    Raises:
        InputError: there is no GPU here and none was named, or the model cannot be read.
        BackendError: the kernels do not take these sizes on this GPU or do not compile for it, or triton is not
            installed.
    """
    import torch

    config = _config(args.model)
    dtype, weights = getattr(torch, args.dtype), getattr(torch, args.weights_dtype)
    capability = args.capability or _capability_here()
    _check(config, dtype, capability)
    import triton

    from proteinbert_fast.errors import BackendError, first_line
    from proteinbert_fast.ops.kernels import warm

    started = time.perf_counter()
    try:
        n = warm.compile_ahead(capability, config, dtype, weights, args.training, _said, args.threads)
    except Exception as error:  # whatever a compiler raises; what it prints stands above
        raise BackendError(
            f"triton {triton.__version__} does not compile the kernels for compute capability {capability / 10}: "
            f"{first_line(error)}"
        ) from error
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(f"{n} kernels for compute capability {capability / 10} in {args.dtype} are in the cache "
          f"({time.perf_counter() - started:.1f} s): {warm.cache_folder()}")  # fmt: skip
    return 0


def _said(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\rcompiling: {done} of {of} kernels", end="", file=sys.stderr, flush=True)


def _config(model: str) -> "ProteinBertConfig":
    from proteinbert_fast.checkpoints import load_pretrained

    return load_pretrained(model, optimizer=False).config


def _capability_here() -> int:
    import torch

    from proteinbert_fast.errors import InputError

    if not torch.cuda.is_available():
        raise InputError("there is no CUDA GPU here: name one, as in --capability 9.0")
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _check(config: "ProteinBertConfig", dtype: "torch.dtype", capability: int) -> None:
    import importlib.util

    import torch

    from proteinbert_fast.errors import BackendError

    if importlib.util.find_spec("triton") is None:
        raise BackendError("triton is not installed: pip install 'proteinbert-fast[kernels]'")
    from proteinbert_fast.ops import kernels
    from proteinbert_fast.ops.kernels.launching import compiling_for, is_interpreted

    if is_interpreted():
        raise BackendError("TRITON_INTERPRET is set: kernels are interpreted, and nothing is compiled; unset it")
    with compiling_for(capability):
        obstacle = kernels.unsupported(torch.device("cuda", 0), config, dtype)
    if obstacle:
        raise BackendError(f"the kernels cannot run there: {obstacle}")


def _capability(text: str) -> int:
    match = re.fullmatch(r"(\d{1,2})\.(\d)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no compute capability: write it as 9.0")
    return 10 * int(match[1]) + int(match[2])


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)
