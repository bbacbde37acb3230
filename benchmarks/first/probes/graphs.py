"""CUDA graphs: the same bits as without, in every replay, and weights that change are seen."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.first.process import Context
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.outputs import ProteinBertOutput
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.tokenizer import Tokenizer

Forward = Callable[[PackedBatch], ProteinBertOutput]

# Residues of each call's proteins; some sizes come again after others, which take their graphs' memory.
CALLS = ((350,), (1,), (350,), (0, 13, 511), (2000, 5), (61, 62, 63, 64), (350,), tuple(range(1, 40)), (2000, 5))
STAND_IN = "a stand-in: the interpreter has no CUDA graphs"


def run(context: Context) -> None:
    """Lines for the first calls, for changed weights, and for the calls after that."""
    if not context.can_run():
        return
    bench = context.bench()
    model = bench.model(context.precision.name)
    calls = CALLS if context.on_gpu else CALLS[1:4]
    note = "" if context.on_gpu else STAND_IN
    forward = graphed(context, model)
    for name, change in (("same bits", None), ("changed weights", _change), ("moved weights", _move)):
        context.begin(name)
        if change is not None:
            change(model)
        found = differences(model, forward, calls, bench.device)
        context.emit(not found, check=f"graphs: {name}", found=found or f"equal in {len(calls)} calls", note=note)


def graphed(context: Context, model: ProteinBert) -> Forward:
    """What replays graphs; the model itself where there are none."""
    if not context.on_gpu:
        return lambda batch: _plain(model, batch)
    from proteinbert_fast.graphs import GraphedForward

    return GraphedForward(model)


def differences(model: ProteinBert, forward: Forward, calls: Sequence[Sequence[int]], device: torch.device) -> str:
    """The first call whose results differ from those of a copy of the model, or nothing."""
    twin = copy.deepcopy(model)  # in other memory: nothing that was kept for the model's weights is found for it
    for number, residues in enumerate(calls):
        batch = _batch(residues, number).to(device)
        with torch.no_grad():
            found, right = _results(forward(batch)), _results(_plain(twin, batch))
        for name, ours in found.items():
            if not bool(ours.isfinite().all()):
                return f"call {number}, residues {tuple(residues)}: {name} is not finite"
            if not torch.equal(ours, right[name]):
                return f"call {number}, residues {tuple(residues)}: {name} differs from a call without a graph"
    return ""


def _plain(model: ProteinBert, batch: PackedBatch) -> ProteinBertOutput:
    out: Any = model(batch)
    assert isinstance(out, ProteinBertOutput)
    return out


def _results(out: ProteinBertOutput) -> dict[str, torch.Tensor]:
    """Copied: the next replay may write where they lie."""
    return {"local_rows": out.local_rows.clone(), "global_state": out.global_state.clone(),
            "residue mean": out.residue_mean().clone(), "GO logits": out.go_logits.clone()}  # fmt: skip


def _batch(residues: Sequence[int], seed: int) -> PackedBatch:
    letters = b"ACDEFGHIKLMNPQRSTVWY"

    def sequence(k: int, n: int) -> bytes:
        return bytes(letters[(7 * i + i * i // 3 + 3 * k + seed) % 20] for i in range(n))

    return Tokenizer()([sequence(k, n) for k, n in enumerate(residues)])


@torch.no_grad()
def _change(model: ProteinBert) -> None:
    """In place, in a weight that kernels read as it is and in one that they rearrange."""
    block: Any = model.blocks[0]
    block.local_dense.bias.add_(0.25)
    block.narrow_conv.weight.mul_(0.5)


@torch.no_grad()
def _move(model: ProteinBert) -> None:
    """To other memory, with other numbers."""
    blocks: Any = model.blocks
    for block in blocks:
        block.local_dense.weight = torch.nn.Parameter(block.local_dense.weight * 0.75, requires_grad=False)
