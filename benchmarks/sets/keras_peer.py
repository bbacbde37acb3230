"""The original Keras model as a case: an environment of its own, made once, and a process in it that runs on demand."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from proteinbert_fast.benchmark.cases import Case, Check, Ready, Unavailable
from proteinbert_fast.benchmark.groups import forward
from proteinbert_fast.benchmark.setup import Setup
from proteinbert_fast.config import ProteinBertConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "keras-venv"
SCRIPT = Path(__file__).with_name("keras_model.py")
NAME = "Keras"
VERSION = "1.0.1"
PACKAGE = f"protein-bert=={VERSION}"
# The package names no versions. Of what it requires, the model itself imports these; without --no-deps it would bring
# TensorFlow's GPU build, tensorflow-addons, lxml and pyfaidx, which it needs for training data only.
_TENSORFLOW = "tensorflow-cpu==2.15.1" if platform.machine() in {"x86_64", "AMD64"} else "tensorflow==2.15.1"
REQUIREMENTS = (_TENSORFLOW, "numpy==1.26.4", "pandas==2.2.3")
FEATURES = "To enable the following instructions: "


def environment(say: Callable[[str], None], folder: Path = FOLDER) -> str:
    """The Python of the environment, which is made if it is not there.

    Args:
        say: is told what goes on, a line each.
        folder: for it.

    Raises:
        Unavailable: it cannot be made.
    """
    python, mark = folder / "bin" / "python", folder / ".made"
    wanted = "\n".join((*REQUIREMENTS, PACKAGE))
    if mark.exists() and mark.read_text() == wanted:
        return str(python)
    say(f"making an environment for the original Keras model: {folder}")
    try:
        subprocess.run([_python_311(), "-m", "venv", "--clear", folder], check=True, capture_output=True, text=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *REQUIREMENTS], check=True, capture_output=True, text=True)
        subprocess.run([*pip, "--no-deps", PACKAGE], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        raise Unavailable(f"no environment for the Keras model: {' '.join(last)}") from error
    mark.write_text(wanted)
    return str(python)


def _python_311() -> str:
    """TensorFlow 2.15 is the last with Keras 2, which the package was written for; it runs on Python 3.9 to 3.11."""
    return sys.executable if sys.version_info[:2] == (3, 11) else "python3.11"


class KerasPeer:
    """A process that runs the model.

    Args:
        python: of its environment.
        folder: for its standard error.
        script: that it runs.
    """

    def __init__(self, python: str, folder: Path, script: Path = SCRIPT) -> None:
        self.python, self.script = python, script
        descriptor, name = tempfile.mkstemp(prefix="keras-", suffix=".log", dir=folder)
        os.close(descriptor)
        self.log = Path(name)
        self.process: subprocess.Popen[str] | None = None

    def cases(self, setup: Setup) -> Sequence[Case]:
        """The model on the batch of real lengths."""
        config = setup.settings.config
        return [
            Case(
                table=forward.MANY,
                name=NAME,
                what="the original model, padded to 512, 1,024, ... tokens without a mask",
                owner=PACKAGE.replace("==", " "),
                ours=False,
                work=setup.work(range(len(setup.proteins)), "float32"),
                unit="tokens/s",
                prepare=lambda: self._prepare(setup, config),
                dtype="float32",
            )
        ]

    def _prepare(self, setup: Setup, config: ProteinBertConfig) -> Ready[dict[str, Any]]:
        sequences = [protein.sequence.decode() for protein in setup.proteins]
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [self.python, str(self.script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # Its own packages only, and oneDNN, which heeds DNNL_MAX_CPU_ISA as PyTorch's does.
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TF_ENABLE_ONEDNN_OPTS": "1"},
            )
        chosen = self._ask(
            {
                "threads": torch.get_num_threads(),
                "n_annotations": config.n_annotations,
                "sequences": sequences,
                "sizes": {
                    "d_hidden_seq": config.d_local,
                    "d_hidden_global": config.d_global,
                    "n_blocks": config.n_blocks,
                    "n_heads": config.n_heads,
                    "d_key": config.d_key,
                    "conv_kernel_size": config.kernel_size,
                    "wide_conv_dilation_rate": config.wide_dilation,
                },
            }
        )
        lengths = ", ".join(f"{n} of {int(length):,} tokens" for length, n in chosen["lengths"].items())
        note = (
            f"TensorFlow {chosen['tensorflow']}, batches of {chosen['batch']} at 512 tokens; padded: {lengths}; "
            f"{eigen(self.log.read_text(errors='replace'))}, random weights"
        )

        def run() -> dict[str, Any]:
            return self._ask({}) | chosen

        widths = [config.d_local, config.d_global]
        return Ready(run, lambda found: check(found, widths), note)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            lines = self.log.read_text(errors="replace").strip().splitlines() or [str(error)]
            raise Unavailable(f"its process ended: {lines[-1][:200]}") from error
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self.process:
            self.process.kill()
            self.process.communicate()


def check(found: dict[str, Any], widths: list[int]) -> Check:
    """Its weights are its own and its states depend on the padding: only their form can be looked at."""
    if found["widths"] != widths:
        return Check(False, f"states of widths {found['widths']} where {widths} are right")
    return Check(bool(found["finite"]), "finite" if found["finite"] else "states are not finite")


def eigen(log: str) -> str:
    """What Eigen's kernels are built without, in TensorFlow's own words."""
    line = next((line for line in log.splitlines() if line.startswith(FEATURES)), None)
    if line is None:
        return "TensorFlow does not say what its Eigen kernels are built for"
    return f"Eigen kernels built without {line.removeprefix(FEATURES).partition(', in other')[0]}, not held otherwise"
