"""Small runs of pretraining, and what they leave behind."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from proteinbert_fast.pretraining.config import PretrainingConfig

SMALL = PretrainingConfig(
    d_local=16, d_global=32, n_blocks=2, n_heads=2, d_key=16, kernel_size=3, steps=12, tokens_per_batch=1500,
    window=200, precision="float32", learning_rate=2e-3, checkpoint_every=5, validate_every=6,
    validation_proteins=10, log_every=1,
)  # fmt: skip
MODERN = replace(
    SMALL, optimizer="adamw", schedule="cosine", warmup_steps=3, lowest_learning_rate=0.0, ema=0.9, clip=0.5,
    weight_decay=0.01, loss="weighted_mean", tokens_per_pass=600, save="inputs",
)  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log(folder: Path) -> list[dict[str, Any]]:
    """The log but for what depends on the clock."""
    clock = {"seconds", "residues_per_second", "share_of_matrix_peak"}
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


def stop_after(n: int):
    """Asked after each step: says stop after n of them."""
    asked = iter(range(1, n + 1))
    return lambda: next(asked) == n
