"""Training from one seed: the same bits twice, and with any number of data workers."""

import functools

import pytest
import torch
from torch.utils.data import DataLoader

from proteinbert_fast import ProteinBert, ProteinBertConfig, Tokenizer
from proteinbert_fast.pretraining.corruption import corrupt_annotations, corrupt_tokens
from proteinbert_fast.pretraining.losses import annotation_loss, token_loss
from proteinbert_fast.pretraining.optimizers import Lamb

SIZES = {"n_annotations": 12, "d_local": 16, "d_global": 32, "n_blocks": 2, "n_heads": 2, "d_key": 16, "kernel_size": 3}
STEPS, BATCH = 50, 3


def together(sequences: list[str], records: list[int]):
    """Runs in a data worker."""
    return Tokenizer(gap=5)([sequences[r] for r in records]), records


def trained(sequences: list[str], backend: str, workers: int, dtype: torch.dtype, steps: int = STEPS):
    """Weights and losses of a model trained from seed 0."""
    torch.manual_seed(0)
    model = ProteinBert(ProteinBertConfig(**SIZES), backend=backend).train()
    optimizer = Lamb(model.parameters(), lr=2e-3)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(1)).tolist()
    chosen = [[order[(step * BATCH + i) % len(order)] for i in range(BATCH)] for step in range(steps)]
    loader = DataLoader(
        range(len(sequences)), batch_sampler=chosen, num_workers=workers,
        collate_fn=functools.partial(together, sequences), multiprocessing_context="spawn" if workers else None,
    )  # fmt: skip
    losses = []
    for step, (clean, records) in enumerate(loader):
        terms = torch.tensor([r % 12 for r in records]), torch.arange(BATCH)
        noisy = corrupt_tokens(clean, records, seed=0, step=step)
        shown = corrupt_annotations(terms, 12, records, seed=0, step=step)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = model(noisy, annotations=shown)
            loss = token_loss(out, clean) + annotation_loss(out, terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return [p.detach().clone() for p in model.parameters()], losses


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("backend", "dtype", "steps"),
    [("cpu", torch.float32, 50), ("cpu", torch.bfloat16, 50), ("reference", torch.float32, 10)],
    ids=str,
)
def test_reproducible_twice(real_sequences, backend, dtype, steps):
    sequences = [s[:60] for s in real_sequences[:40]]
    weights, losses = trained(sequences, backend, 0, dtype, steps)
    again, same_losses = trained(sequences, backend, 0, dtype, steps)
    assert losses == same_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    assert sum(losses[-5:]) < sum(losses[:5]), "training gets somewhere"


@pytest.mark.slow
def test_reproducible_with_any_number_of_data_workers(real_sequences):
    sequences = [s[:60] for s in real_sequences[:40]]
    weights, losses = trained(sequences, "cpu", 0, torch.float32)
    for workers in (1, 2):
        others, other_losses = trained(sequences, "cpu", workers, torch.float32)
        assert losses == other_losses
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
