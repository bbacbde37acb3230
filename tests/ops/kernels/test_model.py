"""The whole model on the Triton kernels: golden numbers, same bits, compiled, refused where it cannot run."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint

from proteinbert_fast import ProteinBert, ProteinBertConfig, Tokenizer, self_check
from proteinbert_fast.errors import BackendError
from proteinbert_fast.ops import backends
from proteinbert_fast.self_check import apart
from proteinbert_fast.self_check.apart import Outcome
from tests import test_export
from tests.test_golden import UNPADDED, check_forward

from .conftest import IS_INTERPRETED

SMALL = ProteinBertConfig(n_annotations=30, d_local=32, d_global=64, n_blocks=2, n_heads=4, d_key=16)
REPOSITORY = Path(__file__).parents[3]
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "M", "", "ACDEFGHIKLMNPQRSTVWY" * 20]


@pytest.fixture
def model(device) -> ProteinBert:
    torch.manual_seed(0)
    return ProteinBert(SMALL, backend="triton").to(device).eval()


def everything(out, i: int) -> list[torch.Tensor]:
    rows = slice(int(out.batch.host_starts[i]), int(out.batch.host_starts[i] + out.batch.host_lengths[i]))
    packed = [*out.hidden_local, *out.attentions, out.token_logits]
    found = [r[rows] for r in packed] + [g[i] for g in (*out.hidden_global, out.go_logits, out.residue_mean())]
    if out.local_rows.is_cuda:  # on CPUs, PyTorch computes the last few numbers of an array by another formula
        found += [out.token_probabilities[rows], out.go_probabilities[i]]
    return found


def run(model: ProteinBert, sequences, annotations=None):
    device = model.token_embedding.weight.device
    with torch.inference_mode():
        return model(Tokenizer()(sequences).to(device), annotations, hidden_states=True, attentions=True)


def test_equals_the_reference(model, device):
    annotations = torch.zeros(4, 30, device=device)
    annotations[0, 3] = annotations[0, 5] = annotations[3, 29] = 1
    terms = (torch.tensor([3, 5, 29], device=device), torch.tensor([0, 2, 2, 2], device=device))
    exact = ProteinBert(SMALL, backend="reference").to(device, torch.float64).eval()
    exact.load_state_dict(model.state_dict())
    right = run(exact, SEQUENCES, annotations.double())
    for given in (annotations, terms):
        out = run(model, SEQUENCES, given)
        for i in range(4):
            for a, b in zip(everything(out, i), everything(right, i), strict=True):
                torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", ["pad", *UNPADDED])
def test_golden(tiny_model, golden, case, device):
    tiny_model.backend = "triton"
    check_forward(tiny_model.to(device), golden, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits(model, dtype):
    model = model.to(dtype)
    together = run(model, SEQUENCES)
    backwards = run(model, SEQUENCES[::-1])
    for i, sequence in enumerate(SEQUENCES):
        numbers = everything(together, i)
        for other in (everything(run(model, [sequence]), 0), everything(backwards, len(SEQUENCES) - 1 - i)):
            assert all(torch.equal(a, b) for a, b in zip(numbers, other, strict=True))


def test_attention_weights_that_are_read_have_the_same_bits(model, device, monkeypatch):
    monkeypatch.setattr("proteinbert_fast.model._ROWS_READ", 80)
    read = {}
    kept = run(model, SEQUENCES)
    with torch.inference_mode():
        model(kept.batch, attentions=lambda block, protein, weights: read.update({(block, protein): weights}))
    right = {(i, j): w for i, rows in enumerate(kept.attentions) for j, w in enumerate(kept.batch.unpack(rows))}
    assert read.keys() == right.keys()
    assert all(torch.equal(read[place], weights) for place, weights in right.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(model, device, dtype):
    batch = Tokenizer()(SEQUENCES).to(device)
    with torch.inference_mode():
        exact = model(batch)
        with torch.autocast(device.type, dtype):
            out = model(batch)
    assert out.local_rows.dtype == dtype
    torch.testing.assert_close(out.local_rows.float(), exact.local_rows, atol=0.2, rtol=0.1)
    torch.testing.assert_close(out.go_probabilities.float(), exact.go_probabilities, atol=0.05, rtol=0.1)


def test_compiles_as_one_graph(model, device):
    batch = Tokenizer()(SEQUENCES).to(device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        a, b = model(batch), compiled(batch)
    assert torch.equal(a.local_rows, b.local_rows)
    assert torch.equal(a.global_state, b.global_state)


@pytest.mark.slow
def test_exports_with_dynamic_sizes(model, device, tmp_path):
    operators = test_export.check(model, device, tmp_path / "program.pt2")
    assert operators.count("proteinbert_fast.local_block.default") == SMALL.n_blocks
    assert operators.count("proteinbert_fast.global_track.default") == SMALL.n_blocks


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a GPU: 17 million rows")
def test_more_than_2_31_elements_in_one_batch(device):
    if torch.cuda.mem_get_info(device)[0] < 24 << 30:
        pytest.skip("needs a GPU with 24 GiB of free memory")
    model = ProteinBert(ProteinBertConfig(n_annotations=3, n_blocks=2), backend="triton").to(device, torch.bfloat16)
    tail = "MKTAYIAKQRQISFVKSHFSRQ"
    both, alone = run(model, ["ACDEFGHIKLMNPQRSTVWY" * 850_000, tail]), run(model, [tail])
    assert both.local_rows.numel() > 2**31
    assert torch.equal(both.local[1], alone.local[0])
    assert torch.equal(both.global_state[1], alone.global_state[0])
    # Periodic residues have periodic states, far from the ends: any wrong offset would show.
    middle = both.local[0][1001:16_001_001].view(-1, 20, 128)
    assert (middle == middle[0]).all()


@pytest.mark.slow
def test_auto_chooses_the_kernels_on_a_gpu_after_a_check(model, device, monkeypatch, tmp_path):
    if IS_INTERPRETED:
        monkeypatch.setattr(backends, "_is_gpu", lambda _: True)
        monkeypatch.setattr(apart, "check", lambda *_: Outcome(None, True))  # test_self_check.py runs it
    monkeypatch.setenv("PROTEINBERT_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(self_check, "_failures", {})
    model.backend = "auto"
    assert model.backend_report() == "triton (the device is a CUDA GPU, and sizes and dtype fit)"
    assert list(self_check._failures.values()) == [None]
    batch = Tokenizer()(SEQUENCES[:2]).to(device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(model(batch).local_rows, compiled(batch).local_rows)


def test_trains(model, device):
    batch = Tokenizer()(SEQUENCES).to(device)
    out = model.train()(batch)
    (out.token_logits.square().mean() + out.go_logits.square().mean()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.backend = "reference"
    model.zero_grad(set_to_none=True)
    out = model(batch)
    (out.token_logits.square().mean() + out.go_logits.square().mean()).backward()
    for name, p in model.named_parameters():
        if p.grad is None:
            assert gradients[name] is None, name
        else:
            # Both are float32: each is off by a few 1e-5 of the largest.
            size = p.grad.abs().max().clamp(min=1e-12)
            torch.testing.assert_close(gradients[name] / size, p.grad / size, atol=2e-4, rtol=0)


def weight_gradients(model, run, batch):
    model.zero_grad(set_to_none=True)
    out = run(batch)
    (out.token_logits.float().square().mean() + out.go_logits.float().square().mean()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_training_on_no_protein(model, device):
    """As a rank without a share of a batch might: gradients are there, and 0."""
    batch = Tokenizer()([]).to(device)
    model.zero_grad(set_to_none=True)
    out = model(batch)
    (out.local_rows.float().sum() + out.global_state.float().sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "head" not in name}
    del gradients["annotation_input.weight"]  # no term is given
    assert [name for name, g in gradients.items() if g is None or g.any()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        # Its own imports are deprecated, and on a GPU it advises TF32.
        pytest.param("inductor", marks=pytest.mark.filterwarnings("ignore")),
    ],
)
def test_training_compiles_as_one_graph(model, device, backend):
    batch = Tokenizer()(SEQUENCES).to(device)
    plain = weight_gradients(model, model, batch)
    compiled = weight_gradients(model, torch.compile(model, backend=backend, fullgraph=True), batch)
    assert plain.keys() == compiled.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(model, device, reentrant):
    batch = Tokenizer()(SEQUENCES).to(device)

    def checkpointed(batch):
        # A tensor that wants gradients, which the older of the two ways needs.
        flag = torch.zeros((), device=device, requires_grad=True)

        def states(_):
            out = model(batch)
            return out.local_rows, out.global_state

        local, state = torch.utils.checkpoint.checkpoint(states, flag, use_reentrant=reentrant)
        return SimpleNamespace(token_logits=model.token_head(local), go_logits=model.annotation_head(state))

    plain = weight_gradients(model, model, batch)
    for name, gradient in weight_gradients(model, checkpointed, batch).items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_training(model, device, dtype):
    """float32 weights under autocast, accumulated over two batches; float16 with its loss scaled."""
    batches = [Tokenizer()(SEQUENCES[:2]).to(device), Tokenizer()(SEQUENCES[2:]).to(device)]
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def step(scaled: bool) -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        for batch in batches:
            with torch.autocast(device.type, dtype, enabled=scaled):
                out = model(batch)
                loss = out.token_logits.float().square().mean() + out.go_logits.float().square().mean()
            (scaler.scale(loss) if scaled else loss).backward()
        if scaled:
            scaler.unscale_(optimizer)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    exact, mixed = step(False), step(True)
    for name, gradient in exact.items():
        assert mixed[name].dtype == torch.float32
        error = (mixed[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01), f"{name}: {error:.3f}"
    before = model.blocks[0].narrow_conv.weight.detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(model.blocks[0].narrow_conv.weight, before)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"d_local": 48}, "d_local is 48, not one of 32, 64, 128, 256"),
        ({"d_global": 2048}, "d_global is 2048, not a multiple of 16 up to 1024"),
        ({"d_key": 144}, "d_key is 144, not a multiple of 16 up to 128"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message, device):
    config = ProteinBertConfig(**{**SMALL.to_dict(), **sizes})
    model = ProteinBert(config, backend="triton").to(device)
    with pytest.raises(BackendError, match=message):
        model(Tokenizer()(["MK"]).to(device))
    with pytest.raises(BackendError, match="the dtype is float64"):
        ProteinBert(SMALL, backend="triton").double().to(device)(Tokenizer()(["MK"]).to(device))


RANK = """
import os, sys
import torch
from torch.nn.parallel import DistributedDataParallel
from tests.ops.kernels import interpreter
from tests.ops.kernels.test_model import IS_INTERPRETED, SMALL, loss_of
from proteinbert_fast import ProteinBert

if IS_INTERPRETED:
    interpreter.mend()
rank, device = int(sys.argv[2]), torch.device(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=rank, world_size=2)
torch.manual_seed(0)
model = ProteinBert(SMALL, backend="triton").to(device)
wrapped = DistributedDataParallel(model)
heard = []
model.blocks[0].key.weight.register_post_accumulate_grad_hook(lambda p: heard.append(p.grad.shape))
for _ in range(2):
    model.zero_grad()
    loss_of(wrapped, rank).backward()
assert len(heard) == 2
if rank == 0:
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{sys.argv[1]}/gradients.pt")
os._exit(0)
"""


def loss_of(run, rank):
    """Of a rank's share: each has other proteins."""
    device = next(run.parameters()).device
    batch = Tokenizer()([["MKTAYIAKQR" * 3, "MSILV"], ["ACDEFGHIKL"]][rank]).to(device)
    out = run(batch, torch.ones(len(batch), SMALL.n_annotations, device=device))
    return out.token_logits.square().sum() + out.go_logits.square().sum()


@pytest.mark.slow
def test_gradients_of_ranks_are_averaged(device, tmp_path):
    """DistributedDataParallel's hooks on the kernels' operators; gloo takes tensors of a GPU, too."""
    command = [sys.executable, "-W", "ignore", "-c", RANK, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank), str(device)], cwd=REPOSITORY) for rank in (0, 1)]
    try:
        assert [rank.wait(300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    found = torch.load(tmp_path / "gradients.pt")
    torch.manual_seed(0)
    model = ProteinBert(SMALL, backend="triton").to(device)
    ((loss_of(model, 0) + loss_of(model, 1)) / 2).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6 * float(p.grad.abs().max()), rtol=1e-5)
