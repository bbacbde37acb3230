"""ProteinBert as an ordinary nn.Module: call forms, shapes, copying, compiling, mixed precision, errors."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch

from proteinbert_fast import (
    BackendError,
    InputError,
    PackedBatch,
    PaddedOutput,
    ProteinBert,
    ProteinBertConfig,
    ProteinBertOutput,
    Tokenizer,
)
from proteinbert_fast.config import VOCABULARY_SIZE
from proteinbert_fast.tokenizer import PAD

SEQUENCES = ["MKTAYIAKQR" * 5, "", "M", "MSDNGPQNQRNAPRITFGG"]


def test_published_sizes_have_the_published_number_of_parameters():
    model = ProteinBert()
    assert model.config == ProteinBertConfig()
    assert sum(p.numel() for p in model.parameters()) == 15_981_321 == model.config.n_parameters


def test_widths_of_the_original_concatenations():
    with torch.no_grad():
        out = ProteinBert()(Tokenizer()(["MKV"]), hidden_states=True)
    assert out.original_local(0).shape == (5, 1562)
    assert out.original_global().shape == (1, 15_599)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_shapes(small_model, tokenizer, backend):
    small_model.backend = backend
    batch = tokenizer(SEQUENCES)
    with torch.no_grad():
        out = small_model(batch, hidden_states=True, attentions=True)
    assert isinstance(out, ProteinBertOutput)
    assert out.batch is batch
    rows, n = batch.n_rows, len(SEQUENCES)
    assert out.local_rows.shape == (rows, 32)
    assert out.global_state.shape == (n, 64)
    assert [h.shape for h in out.hidden_local] == [(rows, 32)] * 4
    assert [h.shape for h in out.hidden_global] == [(n, 64)] * 5
    assert [a.shape for a in out.attentions] == [(rows, 4)] * 2
    assert out.token_logits.shape == (rows, VOCABULARY_SIZE)
    assert out.go_logits.shape == (n, 30)
    assert len(out.local) == n
    for i, sequence in enumerate(SEQUENCES):
        assert out.local[i].shape == (len(sequence) + 2, 32)
        assert out.residues(i).shape == (len(sequence), 32)
        assert torch.equal(out.residues(i), out.local[i][1:-1])
    assert [states.shape for states in out.local] == [states.shape for states in out.local[:]]
    assert torch.equal(out.local[-1], out.local[n - 1])
    with pytest.raises(IndexError):
        out.local[n]
    assert torch.equal(out.hidden_local[-1], out.local_rows)
    assert torch.equal(out.hidden_global[-1], out.global_state)
    for attention in out.attentions:
        for weights in batch.unpack(attention):
            torch.testing.assert_close(weights.sum(0), torch.ones(4))
    torch.testing.assert_close(out.token_probabilities.sum(-1), torch.ones(rows))
    torch.testing.assert_close(out.residue_mean()[0], out.residues(0).mean(0))
    assert not out.residue_mean()[1].any()


def test_what_was_not_asked_for_is_not_kept(small_model, tokenizer):
    out = small_model(tokenizer(SEQUENCES))
    assert out.hidden_local is out.hidden_global is out.attentions is None
    with pytest.raises(InputError, match="hidden_states=True"):
        out.original_local(0)
    with pytest.raises(InputError, match="hidden_states=True"):
        out.original_global()


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "float32"), ("cpu", "bfloat16"), ("reference", "float64")])
def test_attention_weights_are_read_in_parts(small_model, tokenizer, monkeypatch, backend, dtype):
    """With parts of 70 rows; the long protein is one of its own."""
    monkeypatch.setattr("proteinbert_fast.model._ROWS_READ", 70)
    small_model.backend = backend
    model, sequences = small_model.to(getattr(torch, dtype)), ["M", "MK", *SEQUENCES, "MKTAYIAKQR" * 20, "MSDN"]
    batch, read = tokenizer(sequences), {}
    assert [first for first, _, _ in batch.parts(70)] == [0, 2, 3, 5, 6, 7]
    with torch.no_grad():
        plain = model(batch, attentions=True)
    model(batch, attentions=lambda block, protein, weights: read.update({(block, protein): weights}))
    assert list(read) == [(block, protein) for block in range(2) for protein in range(len(sequences))]
    for block, attention in enumerate(plain.attentions):
        for protein, weights in enumerate(batch.unpack(attention)):
            assert not read[block, protein].requires_grad
            if backend == "cpu":
                assert torch.equal(read[block, protein], weights)
            torch.testing.assert_close(read[block, protein], weights)


def test_reading_attention_weights_leaves_the_answer_alone(small_model, tokenizer):
    batch, lengths = tokenizer(SEQUENCES), []

    def gradients(**wanted):
        small_model.zero_grad()
        out = small_model(batch, **wanted)
        assert out.attentions is None
        out.global_state.square().sum().backward()
        return [out.global_state.detach(), *(p.grad for p in small_model.blocks.parameters())]

    plain, reading = gradients(), gradients(attentions=lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(plain, reading, strict=True))
    with torch.no_grad():
        out = small_model(batch.to_padded(), lengths=batch.lengths, attentions=lambda *a: lengths.append(a[2].shape))
    assert out.attentions is None
    assert lengths == [(52, 4), (2, 4), (3, 4), (21, 4)] * 2
    small_model(tokenizer([]), attentions=lambda *_: pytest.fail("no protein"))


MEMORY = """
import torch
from proteinbert_fast import ProteinBert, ProteinBertConfig, Tokenizer
from proteinbert_fast.benchmark.peak import peak_bytes

torch.manual_seed(0)
sizes = dict(d_local=16, d_global=128, n_blocks=8, n_heads=8, d_key=16, kernel_size=3)
model = ProteinBert(ProteinBertConfig(n_annotations=3, **sizes))
batch = Tokenizer(gap=5)(["MKTAYIAKQR" * 50] * 400)


def peak(attentions):
    with torch.inference_mode():
        model(batch, attentions=attentions)
    return peak_bytes()


print(batch.n_rows * 8 * 8 * 4, peak(False), peak(lambda *_: None), peak(True))
"""


@pytest.mark.slow
def test_attention_weights_that_are_read_need_no_memory():
    # What is freed is given back, so that peaks count what is in use.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stderr == ""
    kept, without, reading, keeping = map(int, done.stdout.split())
    assert keeping - reading > 0.8 * kept, (without, reading, keeping)
    # Of 16,384 rows at a time: a block's weights, and what the second run of its global track works with.
    assert reading - without < 0.1 * kept, (without, reading, keeping)


def test_padded_tensor_is_taken_literally_without_lengths(small_model, tokenizer):
    """PAD is an ordinary token: the answer is that of a protein that ends in PAD tokens."""
    padded = tokenizer(SEQUENCES).to_padded(length=60)
    with torch.no_grad():
        out = small_model(padded.long(), hidden_states=True, attentions=True)
        packed = small_model(PackedBatch.from_padded(padded), hidden_states=True)
        natural = small_model(padded, mask=padded != PAD)
    assert isinstance(out, PaddedOutput)
    assert out.local.shape == (4, 60, 32)
    assert out.token_logits.shape == (4, 60, VOCABULARY_SIZE)
    assert [a.shape for a in out.attentions] == [(4, 4, 60)] * 2
    assert [h.shape for h in out.hidden_local] == [(4, 60, 32)] * 4
    assert out.original_local().shape == (4, 60, 4 * 32 + VOCABULARY_SIZE)
    assert out.original_global().shape == (4, 5 * 64 + 30)
    assert torch.equal(out.local[3], packed.local[3])
    assert not torch.allclose(out.local[2, :3], natural.local[2, :3], atol=1e-3)


def test_annotations_dense_sparse_and_none(small_model, tokenizer):
    batch = tokenizer(SEQUENCES)
    dense = torch.zeros(4, 30)
    dense[0, 3] = dense[0, 5] = dense[3, 29] = 1
    sparse = (torch.tensor([3, 5, 29]), torch.tensor([0, 2, 2, 2]))
    with torch.no_grad():
        a, b = small_model(batch, dense), small_model(batch, sparse)
        none, zeros = small_model(batch), small_model(batch, torch.zeros(4, 30))
        integers = small_model(batch, dense.to(torch.uint8))
    torch.testing.assert_close(a.global_state, b.global_state, atol=1e-6, rtol=1e-5)
    assert torch.equal(a.global_state, integers.global_state)
    torch.testing.assert_close(none.global_state, zeros.global_state)
    assert not torch.allclose(a.global_state[0], none.global_state[0], atol=1e-3)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (torch.zeros(4, 31), r"\(4, 31\) where 4 proteins of 30 terms are \(4, 30\)"),
        (torch.zeros(3, 30), r"\(3, 30\) where"),
        ((torch.tensor([1]), torch.tensor([0])), r"offsets \(1,\) where \(k,\) and \(4,\) are wanted"),
        ((torch.tensor([30]), torch.zeros(4, dtype=torch.long)), r"must lie in 0\.\.29"),
        ((torch.tensor([-1]), torch.zeros(4, dtype=torch.long)), r"must lie in 0\.\.29"),
        ("GO:0005524", "give a .* tensor or a pair"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(small_model, tokenizer, annotations, message):
    with pytest.raises(InputError, match=message):
        small_model(tokenizer(SEQUENCES), annotations)


def test_inputs_that_do_not_fit_are_refused(small_model, tokenizer):
    with pytest.raises(InputError, match="record 1 holds 26 in column 0"):
        small_model(torch.tensor([[23, 24], [26, 24]]))
    with pytest.raises(InputError, match=r"gaps of 5 rows, the model needs 20: make it with Tokenizer\(gap=20\)"):
        small_model(Tokenizer(gap=5)(SEQUENCES))
    with pytest.raises(InputError, match="give no lengths"):
        small_model(tokenizer(SEQUENCES), lengths=[1])
    with pytest.raises(InputError, match=r"batch is on meta, the model on cpu: use batch\.to\(device\)"):
        small_model(tokenizer(SEQUENCES).to("meta"))


def test_empty_batch(small_model, tokenizer):
    with torch.no_grad():
        out = small_model(tokenizer([]), hidden_states=True, attentions=True)
    assert out.global_state.shape == (0, 64)
    assert out.go_probabilities.shape == (0, 30)
    assert len(out.local) == 0


def test_wider_gaps_change_no_bit(small_model):
    with torch.no_grad():
        narrow, wide = (small_model(Tokenizer(gap=gap)(SEQUENCES)) for gap in (20, 33))
    for a, b in zip(narrow.local, wide.local, strict=True):
        assert torch.equal(a, b)


def test_backends(small_config, small_model, tokenizer):
    assert small_model.backend_report() == "cpu (the device is cpu, and sizes and dtype fit)"
    assert ProteinBert(small_config, backend="reference").backend_report() == "reference (asked for)"
    assert small_model.double().backend_report() == "reference (the dtype is float64, not float32 or bfloat16)"
    with pytest.raises(BackendError, match=r"'triton'(: triton is not installed| cannot run this: the device is cpu)"):
        ProteinBert(small_config, backend="triton")(tokenizer(SEQUENCES))
    with pytest.raises(InputError, match="'fast' is unknown; choose one of auto"):
        ProteinBert(small_config, backend="fast")
    insists = ProteinBert(small_config, backend="cpu").double()
    with pytest.raises(BackendError, match="cannot run this: the dtype is float64"):
        insists(tokenizer(SEQUENCES))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_bf16(small_model, tokenizer, backend):
    small_model.backend = backend
    batch = tokenizer(SEQUENCES)
    with torch.no_grad():
        exact = small_model(batch, hidden_states=True)
        with torch.autocast("cpu", torch.bfloat16):
            rough = small_model(batch, hidden_states=True)
    # Read outside of autocast: computed as inside.
    assert rough.token_logits.dtype == rough.go_logits.dtype == torch.bfloat16
    assert not rough.token_logits.requires_grad
    # Two blocks of bf16 states of size up to 5: a few steps of 2^-8 relative.
    for a, b in zip(rough.hidden_local, exact.hidden_local, strict=True):
        torch.testing.assert_close(a.float(), b, atol=0.06, rtol=0.02)
    torch.testing.assert_close(rough.global_state.float(), exact.global_state, atol=0.06, rtol=0.02)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bf16_training_step_under_autocast_has_the_gradients_of_float32(small_model, tokenizer, backend):
    batch = tokenizer(SEQUENCES)
    small_model.backend = backend

    def gradients(dtype):
        small_model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = small_model(batch)
            loss = (
                out.token_logits[batch.segments >= 0].float().logsumexp(-1).mean()
                + out.go_logits.float().square().mean()
            )
        loss.backward()
        return {n: p.grad.clone() for n, p in small_model.named_parameters() if p.grad is not None}

    exact, rough = gradients(torch.float32), gradients(torch.bfloat16)
    assert exact.keys() == rough.keys()
    assert len(exact) == len(list(small_model.parameters())) - 1  # no annotations were given
    for name, gradient in exact.items():
        assert rough[name].dtype == torch.float32
        torch.testing.assert_close(rough[name], gradient, atol=0.1 * float(gradient.abs().max()) + 1e-6, rtol=0)


def same_answer(a: ProteinBert, b: ProteinBert, batch: PackedBatch) -> bool:
    with torch.no_grad():
        x, y = a(batch), b(batch)
    return torch.equal(x.local_rows, y.local_rows) and torch.equal(x.go_logits, y.go_logits)


def test_deepcopy_and_pickle(small_model, tokenizer):
    batch = tokenizer(SEQUENCES)
    assert same_answer(small_model, copy.deepcopy(small_model), batch)
    assert same_answer(small_model, pickle.loads(pickle.dumps(small_model)), batch)


def test_state_dict_into_another_model(small_config, small_model, tokenizer):
    other = ProteinBert(small_config)
    other.load_state_dict(small_model.state_dict())
    assert same_answer(small_model, other, tokenizer(SEQUENCES))


def test_save_and_load(small_model, tokenizer, tmp_path):
    small_model.save_pretrained(tmp_path / "model")
    loaded = ProteinBert.from_pretrained(tmp_path / "model")
    assert loaded.is_pretrained
    assert not loaded.training
    assert loaded.checkpoint_source is not None
    assert loaded.checkpoint_sha256 is not None
    assert len(loaded.checkpoint_sha256) == 64
    assert same_answer(small_model, loaded, tokenizer(SEQUENCES))
    assert (
        ProteinBert.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).token_head.weight.dtype == torch.bfloat16
    )


@pytest.mark.parametrize("fullgraph", [True, False])
def test_torch_compile(small_model, tokenizer, fullgraph):
    """The packed call is one graph; other lengths neither break it nor change what it computes."""
    compiled = torch.compile(small_model, fullgraph=fullgraph, dynamic=True, backend="aot_eager")
    for sequences in (SEQUENCES, SEQUENCES[:2], ["MKV" * 30, "WW", "A", "CD", "E"]):
        batch = tokenizer(sequences)
        with torch.no_grad():
            expected, ours = small_model(batch), compiled(batch)
        torch.testing.assert_close(ours.local_rows, expected.local_rows, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(ours.global_state, expected.global_state, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(ours.go_logits, expected.go_logits, atol=2e-5, rtol=1e-5)


def test_torch_compile_training_step(small_model, tokenizer):
    batch = tokenizer(SEQUENCES)
    local_weights, global_weights = torch.randn(batch.n_rows, 32), torch.randn(4, 64)

    def gradients(model):
        small_model.zero_grad()
        out = model(batch)
        ((out.local_rows * local_weights).sum() + (out.global_state * global_weights).sum()).backward()
        return [p.grad.clone() for p in small_model.blocks.parameters()]

    expected = gradients(small_model)
    ours = gradients(torch.compile(small_model, backend="aot_eager"))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-3)


DISTRIBUTED = """
import os, sys
import torch
from torch.nn.parallel import DistributedDataParallel
from proteinbert_fast import ProteinBert, ProteinBertConfig, Tokenizer

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
model = ProteinBert(ProteinBertConfig(n_annotations=30, d_local=32, d_global=64, n_blocks=2, n_heads=4, d_key=16))
wrapped = DistributedDataParallel(model)
batch = Tokenizer()(["MKTAYIAKQR" * 5, "", "M"])
for _ in range(2):
    model.zero_grad()
    out = wrapped(batch, torch.ones(3, 30))
    (out.token_logits.square().mean() + out.go_logits.square().mean()).backward()
    assert all(p.grad is not None for p in model.parameters())
print("both steps done", flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    """In a process of its own that ends at once: gloo's threads now and then never end by themselves."""
    command = [sys.executable, "-c", DISTRIBUTED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "both steps done\n"), done.stderr


def test_hooks_and_parameter_groups(small_model, tokenizer):
    seen = []
    small_model.blocks[1].register_forward_hook(lambda *_: seen.append("block 1"))
    optimiser = torch.optim.AdamW([{"params": small_model.blocks.parameters()}], lr=1e-2)
    batch = tokenizer(SEQUENCES)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = small_model(batch).global_state.square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert seen == ["block 1"] * 5


def test_a_batch_used_in_inference_mode_can_be_trained_on(small_model, tokenizer):
    batch = tokenizer(SEQUENCES)
    with torch.inference_mode():
        small_model(batch)
    small_model(batch).global_state.sum().backward()
    assert small_model.blocks[0].key.weight.grad is not None


def test_initial_weights_are_those_of_keras():
    """Glorot-uniform kernels, zero biases, unit norms, embeddings within 0.05."""
    torch.manual_seed(0)
    model = ProteinBert()
    block = model.blocks[0]
    for weight, fans in [
        (block.narrow_conv.weight, 9 * 128 + 9 * 128),
        (block.global_dense1.weight, 512 + 512),
        (block.query.weight, 4 * 512 + 4 * 64),
        (block.value.weight, 4 * 128 + 4 * 128),
        (model.annotation_input.weight, 8943 + 512),
    ]:
        bound = (6 / fans) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
    assert 0.049 < model.token_embedding.weight.abs().max() <= 0.05
    assert not block.narrow_conv.bias.any()
    assert (block.local_norm1.weight == 1).all()
    assert not block.local_norm1.bias.any()


def test_two_models_from_one_seed_are_equal():
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(ProteinBert(ProteinBertConfig(n_annotations=5, n_blocks=1)))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"d_local": 0}, "d_local must be a positive integer, got 0"),
        ({"n_heads": True}, "n_heads must be a positive integer, got True"),
        ({"n_heads": 3}, r"d_global \(512\) must be a multiple of n_heads \(3\)"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        ProteinBertConfig(**sizes)


def test_config_from_dict_is_strict():
    sizes = ProteinBertConfig(n_blocks=2).to_dict()
    assert ProteinBertConfig.from_dict(sizes) == ProteinBertConfig(n_blocks=2)
    with pytest.raises(InputError, match="unknown d_locale; known are"):
        ProteinBertConfig.from_dict(sizes | {"d_locale": 3})
    del sizes["d_key"]
    with pytest.raises(InputError, match="missing d_key"):
        ProteinBertConfig.from_dict(sizes)
