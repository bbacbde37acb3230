"""What a run says as it runs: a line for a person, rows for a file, curves for TensorBoard."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from proteinbert_fast.config import VOCABULARY_SIZE, ProteinBertConfig
from proteinbert_fast.data.loader import Step
from proteinbert_fast.errors import InputError
from proteinbert_fast.pretraining.config import PretrainingConfig


class Log:
    """Rows of JSON, one on each line. Rows beyond the step that a run goes on from are taken away first.

    Args:
        path: of the file.
        step: that the run goes on from.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = 0
        if path.exists():
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n") or _step_of(line, path, number) > step:
                        break
                    kept += len(line)
        self._file = path.open("ab")
        self._file.truncate(kept)

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        self._file.write((json.dumps(row) + "\n").encode())
        self._file.flush()

    def flush(self) -> None:
        """Returns when all rows are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step_of(line: bytes, path: Path, number: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}:{number}: is no row of a pretraining log; move the file away to go on") from None


class TensorBoard:
    """The log's numbers as curves.

    Args:
        folder: of the run.
        step: that the run goes on from; later points of an earlier run are dropped.

    Raises:
        InputError: the package tensorboard is missing.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError("TensorBoard's files need the package tensorboard: pip install tensorboard") from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Adds the numbers of a row of the log."""
        for name, value in _flat(row, row["kind"]):
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the files."""
        self._writer.close()


def _flat(row: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in row.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and name not in {"step", "is_best"}:
            found.append((f"{prefix}/{name}", float(value)))
    return found


class Meter:
    """Speed and losses since the last row, and a line of progress.

    Args:
        config: of the run.
        sizes: of the model.
        device: that it runs on.
        n_ranks: that share a batch, each on such a device.
        shows: whether to show the line.
        step: that the run goes on from.
    """

    def __init__(
        self,
        config: PretrainingConfig,
        sizes: ProteinBertConfig,
        device: torch.device,
        n_ranks: int,
        shows: bool,
        step: int,
    ) -> None:
        self._config, self._flops = config, training_flops_per_token(sizes)
        self._per_protein = training_flops_per_protein(sizes)
        self._peak = n_ranks * matrix_rate(device, config.precision)
        self._started = self._since = time.monotonic()
        self._tokens = self._residues = self._proteins = self._n = 0
        self._losses = [0.0, 0.0]
        self._bar: Any = None
        if shows:
            from tqdm import tqdm

            self._bar = tqdm(
                total=config.steps, initial=step, unit="step", file=sys.stderr, dynamic_ncols=True, mininterval=1.0
            )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def add(self, step: Step, token_loss: float, annotation_loss: float, is_made: bool) -> None:
        """Hears of a step; the losses of one that was skipped do not count."""
        self._tokens += step.n_tokens
        self._residues += step.n_residues
        self._proteins += step.n_proteins
        if is_made and math.isfinite(token_loss + annotation_loss):
            self._n += 1
            self._losses = [self._losses[0] + token_loss, self._losses[1] + annotation_loss]
        if self._bar is not None:
            self._bar.update()

    def row(self) -> dict[str, float | None]:
        """Means since the last row, None where no step of it was made; starts anew."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        rate = self._residues / seconds
        flops = (self._tokens * self._flops + self._proteins * self._per_protein) / seconds
        token_loss, annotation_loss = (total / self._n if self._n else None for total in self._losses)
        row = {
            "token_loss": token_loss,
            "annotation_loss": annotation_loss,
            "residues_per_second": round(rate, 1),
            "share_of_matrix_peak": round(flops / self._peak, 4),
        }
        if self._bar is not None:
            losses = f"loss {token_loss or math.nan:.3f} + {annotation_loss or math.nan:.4f}"
            self._bar.set_postfix_str(f"{losses}, {rate:,.0f} residues/s, {flops / self._peak:.0%} of peak")
        self._since = time.monotonic()
        self._tokens = self._residues = self._proteins = self._n = 0
        self._losses = [0.0, 0.0]
        return row

    def leave_out(self, seconds: float) -> None:
        """Time that went to something else than training, such as a validation."""
        self._since += seconds

    def state_dict(self) -> dict[str, Any]:
        """What the next row's means need, as JSON can hold it; not the speed, which begins anew."""
        return {"losses": self._losses, "n": self._n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken."""
        self._losses, self._n = list(state["losses"]), state["n"]

    def close(self) -> None:
        """Ends the line."""
        if self._bar is not None:
            self._bar.close()


def training_flops_per_token(sizes: ProteinBertConfig) -> float:
    """Of products forward and twice as many backward; recomputed ones are not counted."""
    d = sizes.d_local
    block = 2 * sizes.kernel_size * d * d + d * d + d * (sizes.n_heads * sizes.d_key + sizes.d_global)
    return 6.0 * (sizes.n_blocks * block + d * VOCABULARY_SIZE)


def training_flops_per_protein(sizes: ProteinBertConfig) -> float:
    """Of the global track's products, forward and backward."""
    g = sizes.d_global
    block = 2 * g * g + g * (sizes.d_local + sizes.n_heads * sizes.d_key)
    return 6.0 * (sizes.n_blocks * block + g * sizes.n_annotations)


def matrix_rate(device: torch.device, precision: str, n: int = 0) -> float:
    """Flops per second of a large matrix product now: the best of a few. CPUs multiply float16 in float32."""
    n = n or (8192 if device.type == "cuda" else 1024)
    dtype = torch.float32 if (device.type, precision) == ("cpu", "float16") else getattr(torch, precision)
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * n**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
