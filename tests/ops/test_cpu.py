"""The CPU back end against the float64 reference: every dtype, odd lengths, poisoned memory, gradients, bits."""

import os
import random
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proteinbert_fast import ProteinBert, ProteinBertConfig, Tokenizer, _cpu_kernels
from proteinbert_fast.model import Block
from proteinbert_fast.ops import cpu, reference
from proteinbert_fast.ops.reference import Embedded, LocalBlockWeights

# float32: rounding in 1,152-term sums of numbers near 1, then a norm. bfloat16: 2^-8 relative for each of the four
# rounded intermediates that meet in a norm's output of size up to 5.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06}
SIZES = {
    "small": ProteinBertConfig(n_annotations=3, d_local=16, d_global=64, n_blocks=1, n_heads=4, d_key=16),
    "odd": ProteinBertConfig(n_annotations=3, d_local=48, d_global=96, n_blocks=1, n_heads=2, d_key=32),
    "published": ProteinBertConfig(n_annotations=3, n_blocks=1),
}
LENGTHS = [
    (0,),
    (1, 1),
    (2,),
    (13, 0, 7),
    (255, 256, 257),
    (300, 1, 509),
    (511,),
    (2047,),
    (2600, 3),
    tuple(range(40)),
]


def make(config: ProteinBertConfig, residues, seed: int = 0):
    torch.manual_seed(seed)
    block = Block(config)
    for name, p in block.named_parameters():
        torch.nn.init.normal_(p, std=1.0 if "norm" in name else 0.3 if p.dim() == 1 else p[0].numel() ** -0.5)
    batch = Tokenizer()(["M" * n for n in residues])
    x = torch.randn(batch.n_rows, config.d_local) * (batch.segments >= 0).unsqueeze(-1)
    query = torch.tanh(torch.randn(len(batch), config.n_heads * config.d_key))
    return block, batch, x, torch.randn(len(batch), config.d_local), query


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("residues", LENGTHS, ids=str)
def test_local_block_equals_the_reference(residues, size, dtype):
    block, batch, x, broadcast, _ = make(SIZES[size], residues)
    x, broadcast = x.to(dtype), broadcast.to(dtype)
    block = block.to(dtype)
    with torch.no_grad():
        hidden, local = cpu.local_block(x, broadcast, batch, block.local_weights(), 5, keep_hidden=True)
        alone = cpu.local_block(x, broadcast, batch, block.local_weights(), 5)
        exact = reference.local_block(
            x.double(),
            broadcast.double(),
            batch.segments,
            LocalBlockWeights(*(w.double() for w in block.local_weights())),
            5,
        )
    close(hidden, exact.hidden, TOLERANCE[dtype])
    close(local, exact.local, TOLERANCE[dtype])
    assert alone[0] is None
    assert torch.equal(alone[1], local)
    gaps = batch.segments < 0
    assert not hidden[gaps].any()
    assert not local[gaps].any()
    assert hidden.dtype == local.dtype == dtype


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("residues", LENGTHS, ids=str)
def test_global_attention_equals_the_reference(residues, size, dtype):
    config = SIZES[size]
    block, batch, local, _, query = make(config, residues)
    weights = [w.to(dtype) for w in (block.key.weight, block.value.weight)]
    local, query = local.to(dtype), query.to(dtype)
    with torch.no_grad():
        ours = cpu.global_attention(local, query, batch, *weights, config.n_heads, True)
        exact = reference.global_attention(
            local.double(),
            query.double(),
            batch.segments,
            *(w.double() for w in weights),
            config.n_heads,
            True,
        )
        unweighted = cpu.global_attention(local, query, batch, *weights, config.n_heads)
    close(ours.pooled, exact.pooled, TOLERANCE[dtype])
    close(ours.weights, exact.weights, TOLERANCE[dtype])
    assert unweighted.weights is None
    assert torch.equal(unweighted.pooled, ours.pooled)


def test_lengths_1_to_300_tokens_densely():
    """Every length in one batch and each protein's place in a tile and a piece a different one."""
    block, batch, x, broadcast, query = make(SIZES["small"], range(298))
    with torch.no_grad():
        _, local = cpu.local_block(x, broadcast, batch, block.local_weights(), 5)
        exact = reference.local_block(
            x.double(),
            broadcast.double(),
            batch.segments,
            LocalBlockWeights(*(w.double() for w in block.local_weights())),
            5,
        )
        weights = (block.key.weight, block.value.weight)
        pooled = cpu.global_attention(x, query, batch, *weights, 4).pooled
        exact_pooled = reference.global_attention(
            x.double(), query.double(), batch.segments, *(w.double() for w in weights), 4
        ).pooled
    close(local, exact.local, TOLERANCE[torch.float32])
    close(pooled, exact_pooled, TOLERANCE[torch.float32])


def gradients(operations, config: ProteinBertConfig, made, dtype, save="preactivations", everything=True):
    """Of all inputs and weights of a local block and attention behind it, by name; of all four results, or of two."""
    block, batch, x, broadcast, query = made
    inside = (batch.segments >= 0).unsqueeze(-1)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, broadcast, query)]
    b = Block(config).to(dtype)
    b.load_state_dict(block.state_dict())
    rows, word, g = leaves
    if operations is cpu:
        hidden, local = cpu.local_block(rows * inside, word, batch, b.local_weights(), 5, everything, save)
        where = batch
    else:
        hidden, local = reference.local_block(rows * inside, word, batch.segments, b.local_weights(), 5)
        where = batch.segments
    attended = operations.global_attention(local, g, where, b.key.weight, b.value.weight, config.n_heads, everything)
    torch.manual_seed(1)
    parts = [local, attended.pooled, *([hidden, attended.weights] if everything else [])]
    sum((part * torch.randn(part.shape, dtype=torch.float64)).sum() for part in parts).backward()
    named = {name: p.grad for name, p in b.named_parameters() if p.grad is not None}
    assert len(named) == 12
    return named | {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}


def assert_gradients_close(ours, exact, dtype) -> None:
    assert ours.keys() == exact.keys()
    for name, gradient in exact.items():
        assert ours[name].dtype == dtype
        ours_64 = ours[name].double()
        assert ours_64.isfinite().all(), name
        if dtype == torch.float32:
            close(ours_64 / gradient.abs().max(), gradient / gradient.abs().max(), 2e-5)
        else:
            # States, pre-activations and gradients are rounded by 2^-9 each, a few times in a row; the gradient
            # of a logit is a difference of two such numbers, which doubles its share.
            assert (ours_64 - gradient).norm() < 0.04 * gradient.norm(), name


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("everything", [True, False], ids=["everything", "states"])
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("residues", [(0, 5, 300), (1,), (255, 0, 700)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_the_reference(size, residues, dtype, everything):
    made = make(SIZES[size], residues)
    ours = gradients(cpu, SIZES[size], made, dtype, everything=everything)
    exact = gradients(reference, SIZES[size], made, torch.float64, everything=everything)
    assert_gradients_close(ours, exact, dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_gradients_have_the_same_bits_whatever_is_saved(dtype):
    made = make(SIZES["odd"], (700, 3, 40))
    kept = gradients(cpu, SIZES["odd"], made, dtype, "preactivations")
    again = gradients(cpu, SIZES["odd"], made, dtype, "inputs")
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize(("save", "rows_kept"), [("preactivations", 3), ("inputs", 1)])
def test_what_training_keeps_of_a_local_block(save, rows_kept):
    block, batch, x, broadcast, _ = make(SIZES["small"], (100, 200))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cpu.local_block(x, broadcast, batch, block.local_weights(), 5, save=save)
    assert [t.shape for t in kept].count(x.shape) == rows_kept


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_same_bits_with_gradients_and_without(dtype):
    block, batch, x, broadcast, query = make(SIZES["odd"], (700, 3, 40))
    x, broadcast, query, block = x.to(dtype), broadcast.to(dtype), query.to(dtype), block.to(dtype)

    def states():
        hidden, local = cpu.local_block(x, broadcast, batch, block.local_weights(), 5, keep_hidden=True)
        return hidden, local, cpu.global_attention(local, query, batch, block.key.weight, block.value.weight, 2).pooled

    with_gradients = states()
    assert all(t.requires_grad for t in with_gradients)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(with_gradients, states(), strict=True))


def make_first(config: ProteinBertConfig, residues):
    """As ``make``, of all tokens: those of a batch and their states."""
    block, _, _, _, query = make(config, residues)
    rng = random.Random(0)
    batch = Tokenizer()(["".join(rng.choices("ACDEFGHIKLMNPQRSTUVWXY*", k=n)) for n in residues])
    return block, batch, torch.randn(26, config.d_local), torch.randn(len(batch), config.d_local), query


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("residues", [(0,), (1, 30, 2), (255, 0, 700)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_first_block_from_tokens_equals_the_reference(size, residues, dtype):
    block, batch, table, broadcast, _ = make_first(SIZES[size], residues)

    def first(dtype, local_block):
        states = table.detach().to(dtype, copy=True).requires_grad_()
        word = broadcast.detach().to(dtype, copy=True).requires_grad_()
        b = Block(SIZES[size]).to(dtype)
        b.load_state_dict(block.state_dict())
        hidden, local = local_block(Embedded(batch.tokens, states), word, b)
        torch.manual_seed(1)
        sum((part * torch.randn(part.shape, dtype=torch.float64)).sum() for part in (hidden, local)).backward()
        gradients = {name: p.grad for name, p in b.named_parameters() if p.grad is not None}
        assert len(gradients) == 10
        return hidden, local, gradients | {"table": states.grad, "word": word.grad}

    def plain(x, word, b):
        rows = reference.embed_tokens(*x)
        return reference.local_block(rows, word, batch.segments, b.local_weights(), 5)

    def ours(save):
        return lambda x, word, b: cpu.local_block(x, word, batch, b.local_weights(), 5, True, save)

    hidden, local, gradients = first(dtype, ours("preactivations"))
    exact_hidden, exact_local, exact = first(torch.float64, plain)
    close(hidden, exact_hidden, TOLERANCE[dtype])
    close(local, exact_local, TOLERANCE[dtype])
    assert not local[batch.segments < 0].any()
    assert_gradients_close(gradients, exact, dtype)
    again = first(dtype, ours("inputs"))[2]
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_first_block_from_tokens_has_the_same_bits_in_any_batch(dtype):
    block, batch, table, broadcast, _ = make_first(SIZES["odd"], [*range(30), 700])
    table, broadcast, block = table.to(dtype), broadcast.to(dtype), block.to(dtype)
    before = torch.get_num_threads()
    with torch.no_grad():
        _, local = cpu.local_block(Embedded(batch.tokens, table), broadcast, batch, block.local_weights(), 5)
        for i in (0, 7, 29, 30):
            one = batch[i]
            _, alone = cpu.local_block(Embedded(one.tokens, table), broadcast[i : i + 1], one, block.local_weights(), 5)
            assert torch.equal(one.unpack(alone)[0], batch.unpack(local)[i])
        try:
            torch.set_num_threads(3)
            _, shared = cpu.local_block(Embedded(batch.tokens, table), broadcast, batch, block.local_weights(), 5)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(local, shared)


def test_frozen_parts_of_a_first_block_get_no_gradient():
    block, batch, table, broadcast, _ = make_first(SIZES["small"], (40,))
    block.requires_grad_(False)
    states = table.requires_grad_()
    cpu.local_block(Embedded(batch.tokens, states), broadcast, batch, block.local_weights(), 5)[1].sum().backward()
    assert states.grad.any()
    assert all(p.grad is None for p in block.parameters())
    block.local_dense.requires_grad_(True)
    frozen = Embedded(batch.tokens, table.detach())
    cpu.local_block(frozen, broadcast, batch, block.local_weights(), 5)[1].sum().backward()
    assert block.local_dense.weight.grad.any()
    assert block.narrow_conv.weight.grad is None


def test_no_gradient_flows_where_none_is_asked_for():
    block, batch, x, broadcast, query = make(SIZES["small"], (5,))
    block.requires_grad_(False)
    word = broadcast.requires_grad_()
    _, local = cpu.local_block(x, word, batch, block.local_weights(), 5)
    local.sum().backward()
    assert word.grad is not None
    assert all(p.grad is None for p in block.parameters())
    asked = query.requires_grad_()
    cpu.global_attention(x, asked, batch, block.key.weight, block.value.weight, 4).pooled.sum().backward()
    assert asked.grad.any()
    assert all(p.grad is None for p in block.parameters())


@pytest.mark.usefixtures("poisoned_memory")
def test_gradients_of_nothing():
    """No protein at all: zeros, not what lay in the memory."""
    block, _, _, _, _ = make(SIZES["small"], (5,))
    batch = Tokenizer()([])
    x = torch.zeros(batch.n_rows, 16, requires_grad=True)
    _, local = cpu.local_block(x, torch.zeros(0, 16), batch, block.local_weights(), 5)
    pooled = cpu.global_attention(local, torch.zeros(0, 64), batch, block.key.weight, block.value.weight, 4).pooled
    (local.sum() + pooled.sum()).backward()
    assert not x.grad.any()
    assert not any(p.grad.any() for p in [*block.local_weights(), block.key.weight, block.value.weight])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_numbers_that_are_none_stay_in_their_protein(value, dtype):
    block, batch, x, broadcast, query = make(SIZES["small"], (50, 50))
    x[int(batch.starts[1]) + 7, 3] = value
    with torch.no_grad():
        _, local = cpu.local_block(x.to(dtype), broadcast.to(dtype), batch, block.to(dtype).local_weights(), 5)
        weights = (block.key.weight, block.value.weight)
        pooled = cpu.global_attention(local, query.to(dtype), batch, *weights, 4).pooled
    assert local[int(batch.starts[1]) + 7].isnan().all()
    assert batch.unpack(local)[0].isfinite().all()
    assert pooled[1].isnan().all()
    assert pooled[0].isfinite().all()


def test_activations_to_float32_precision():
    """GELU and tanh of the kernels, seen through a norm-free path: one channel block, unit weights."""
    batch = Tokenizer()(["M" * 3998])
    steps = torch.linspace(-12, 12, 4000 * 16).view(4000, 16)
    local = torch.zeros(batch.n_rows, 16)
    local[batch.segments >= 0] = steps
    # Zero queries weigh all rows alike: the pooled values are the mean of gelu.
    eye = torch.eye(16)
    pooled = cpu.global_attention(local, torch.zeros(1, 16), batch, eye, eye, 1).pooled[0]
    expected = torch.nn.functional.gelu(steps.double()).mean(0)
    torch.testing.assert_close(pooled.double(), expected, atol=5e-7, rtol=1e-6)
    attended = cpu.global_attention(local, torch.full((1, 16), 0.75), batch, eye, eye, 1, True)
    logits = (torch.tanh(steps.double()) * 0.75).sum(1) / 4
    torch.testing.assert_close(
        attended.weights[batch.segments >= 0][:, 0].double(), logits.softmax(0), atol=0, rtol=3e-6
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100), st.integers(1, 7))
def test_in_groups_is_the_function_row_by_row(n, size):
    rows = torch.arange(2 * n, dtype=torch.float32).view(n, 2)
    assert torch.equal(cpu.in_groups(lambda a, b: a * 2 + b, rows, rows, size=size), rows * 3)


@pytest.fixture
def threads():
    """Sets their number; it is as before in the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_number_of_threads_leaves_no_trace(dtype, threads):
    block, batch, x, broadcast, query = make(SIZES["odd"], (700, 3, 1200))
    _, first, table, word, _ = make_first(SIZES["odd"], (700, 3, 1200))
    block = block.to(dtype)
    results = []
    for n in (1, 2, 3, 40):
        threads(n)
        with torch.no_grad():
            _, local = cpu.local_block(x.to(dtype), broadcast.to(dtype), batch, block.local_weights(), 5)
            weights = (block.key.weight, block.value.weight)
            pooled = cpu.global_attention(local, query.to(dtype), batch, *weights, 2).pooled
        found = gradients(cpu, SIZES["odd"], (block, batch, x, broadcast, query), dtype, everything=False)
        states = table.to(dtype).requires_grad_()
        block.zero_grad()
        cpu.local_block(Embedded(first.tokens, states), word.to(dtype), first, block.local_weights(), 5)[
            1
        ].sum().backward()
        of_first = [p.grad for p in (*block.local_weights(), states)]
        results.append((local, pooled, *found.values(), *of_first))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_default_dtype_of_torch_leaves_no_trace(default):
    made = make(SIZES["small"], (300, 7))
    block, batch, x, broadcast, query = made
    weights = block.key.weight, block.value.weight
    results = []
    for dtype in (torch.float32, default):
        x, broadcast, query = (t.detach().requires_grad_() for t in (x, broadcast, query))
        block.zero_grad()
        torch.set_default_dtype(dtype)
        try:
            _, local = cpu.local_block(x, broadcast, batch, block.local_weights(), 5)
            pooled = cpu.global_attention(local, query, batch, *weights, 4).pooled
            (local.sum() + pooled.square().sum()).backward()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([local, pooled, *(t.grad for t in (x, broadcast, query, *weights, *block.local_weights()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (3, 2), (9, 5), (9, 1)])
@pytest.mark.parametrize("rows", [1, 37, 256, 513])
def test_gradient_of_weights(instruction_set, threads, rows, taps, dilation, dtype):
    """Odd and even numbers of rows, both widths of panels, inputs that fill no tile, more threads than pieces."""
    gap = taps // 2 * dilation
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows + 2 * gap, 48, generator=generator).to(dtype)
    gradient = torch.randn(rows + 2 * gap, 80, generator=generator).to(dtype)
    gradient[:gap] = gradient[rows + gap :] = 0
    inside = gradient[gap : rows + gap].double()
    exact = torch.stack([inside.t() @ x[t * dilation :][:rows].double() for t in range(taps)], dim=2)
    found = []
    for n in (1, 2, 64):
        threads(n)
        found.append(cpu._weight_gradient(gradient, x, gap, taps, dilation))
        assert found[-1].dtype == torch.float32
        # Whole groups of three taps go by F(4, 3), whose rounding is more than twice as large: 7e-7 of the length.
        close(found[-1].double() / rows**0.5, exact / rows**0.5, 2e-6 if taps % 3 else 1e-5)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("taps", [1, 3])
def test_gradient_of_weights_over_many_rows(taps):
    """Products of one sign, whose sum grows large beside each of them: blocks are summed apart."""
    gap = taps // 2
    x = torch.full((300_000 + 2 * gap, 16), 0.1)
    gradient = x.clone()
    gradient[:gap] = gradient[len(x) - gap :] = 0
    found = cpu._weight_gradient(gradient, x, gap, taps)
    exact = 300_000 * x[0, 0].double() ** 2
    assert ((found.double() - exact).abs() / exact).max() < 3e-5


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_every_instruction_set_equals_the_reference(instruction_set, dtype):
    assert _cpu_kernels.instruction_set() == instruction_set
    test_local_block_equals_the_reference((300, 1, 509), "odd", dtype)
    test_global_attention_equals_the_reference((300, 1, 509), "odd", dtype)
    test_gradients_are_those_of_the_reference("odd", (300, 1, 509), dtype, False)
    test_first_block_from_tokens_equals_the_reference("odd", (300, 1, 509), dtype)
    test_numbers_that_are_none_stay_in_their_protein(float("nan"), dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_gelu_equals_the_reference(instruction_set, dtype):
    """Vectors of every width, with and without a rest; strided; the gradient is that of the plain operation."""
    for n in (0, 1, 3, 8, 15, 16, 17, 96, 511):
        x = torch.linspace(-9, 9, 2 * n).to(dtype)[::2].requires_grad_()
        found, exact = cpu.gelu(x), reference.gelu(x.detach().double())
        torch.testing.assert_close(found.double(), exact, atol=1e-7, rtol=2**-23 if dtype == torch.float32 else 2**-8)
        with torch.no_grad():
            assert torch.equal(cpu.gelu(x), found)
        (gradient,) = torch.autograd.grad(found, x, torch.ones_like(x))
        assert torch.equal(gradient, torch.autograd.grad(reference.gelu(x), x, torch.ones_like(x))[0])
    strange = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0], dtype=dtype)
    assert torch.equal(cpu.gelu(strange).isnan(), torch.tensor([False, True, True, False]))


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_same_bits_in_every_tile(instruction_set, dtype):
    """Register tiles of every height, units of work that end in a protein, panels of both widths."""
    block, batch, x, broadcast, query = make(SIZES["odd"], [*range(30), 700])
    x, broadcast, query, block = x.to(dtype), broadcast.to(dtype), query.to(dtype), block.to(dtype)
    weights = (block.key.weight, block.value.weight)
    with torch.no_grad():
        _, local = cpu.local_block(x, broadcast, batch, block.local_weights(), 5)
        pooled = cpu.global_attention(local, query, batch, *weights, 2).pooled
        for i in range(len(batch)):
            rows = slice(int(batch.starts[i]) - batch.gap, int(batch.starts[i] + batch.lengths[i]) + batch.gap)
            word, asked = broadcast[i : i + 1], query[i : i + 1]
            _, alone = cpu.local_block(x[rows], word, batch[i], block.local_weights(), 5)
            assert torch.equal(alone, local[rows])
            assert torch.equal(cpu.global_attention(alone, asked, batch[i], *weights, 2).pooled[0], pooled[i])


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("isa", _cpu_kernels.instruction_sets())
def test_the_environment_forces_an_isa(isa):
    code = "from proteinbert_fast.ops import cpu; print(cpu.kernels_in_use())"
    assert in_a_process(code, PROTEINBERT_FAST_ISA=isa).stdout == f"{isa}, version {cpu.KERNELS_VERSION}\n"


def test_an_isa_that_this_cpu_has_not_is_one_line():
    done = in_a_process(
        "from proteinbert_fast.cli.main import main; raise SystemExit(main(['doctor']))", PROTEINBERT_FAST_ISA="sse9"
    )
    assert done.returncode == 1
    known = ", ".join(_cpu_kernels.instruction_sets())
    assert done.stderr == (
        f"proteinbert-fast: error: PROTEINBERT_FAST_ISA is 'sse9' in the environment: this CPU has {known}\n"
    )


def test_doctor_says_which_isa_runs():
    code = "from proteinbert_fast.cli import doctor; print(dict(doctor._machine())['instruction set'])"
    known, failure = ", ".join(_cpu_kernels.instruction_sets()), _cpu_kernels.amx_failure()
    end = f"of {known}; not amx_bf16: {failure}\n" if failure else f"of {known}\n"
    assert in_a_process(code, PROTEINBERT_FAST_ISA="").stdout == f"{_cpu_kernels.instruction_sets()[-1]}, {end}"
    forced = in_a_process(code, PROTEINBERT_FAST_ISA="baseline").stdout
    assert forced == f"baseline (PROTEINBERT_FAST_ISA=baseline), {end}"


def test_a_switch_of_amx_that_says_nothing_is_one_line():
    done = in_a_process(
        "from proteinbert_fast.cli.main import main; raise SystemExit(main(['doctor']))", PROTEINBERT_FAST_AMX="never"
    )
    assert done.returncode == 1
    assert done.stderr == (
        "proteinbert-fast: error: PROTEINBERT_FAST_AMX is 'never' in the environment: "
        "set 0 to turn these kernels off, 1 for the default\n"
    )


def test_weights_packed_for_one_isa_run_with_it(instruction_set):
    """Also after another one was chosen: kernels never read what is packed for others."""
    block, batch, x, broadcast, _ = make(SIZES["published"], (70, 3))
    with torch.no_grad():
        before = cpu.local_block(x, broadcast, batch, block.local_weights(), 5)[1]
        packed = cpu.packed_local_block(block.local_weights(), x, False, 5, backward=False)
        _cpu_kernels.use_instruction_set("baseline")
        after = torch.zeros_like(x)
        _cpu_kernels.local_block(
            packed, x.data_ptr(), 0, broadcast.data_ptr(), batch.segments.data_ptr(), 0, after.data_ptr(), 0, 0,
            batch.starts.data_ptr(), batch.lengths.data_ptr(), len(batch), batch.gap, batch.n_rows, 1,
        )  # fmt: skip
    assert torch.equal(before, after)
    with pytest.raises(ValueError, match="these weights are packed for another kernel"):
        _cpu_kernels.attention(packed, 0, 0, 0, 0, 0, 0, 0, 0, 1)


def test_packed_weights_are_kept_and_made_again():
    """Once per weights: packing takes longer than a short protein."""
    model = ProteinBert(SIZES["published"]).eval()
    batch = Tokenizer()(["MKTAYIAKQRQISFVKSHFSRQ"])
    made = []
    pack = _cpu_kernels.pack_local_block
    with torch.no_grad(), patch.object(_cpu_kernels, "pack_local_block", lambda *a: made.append(1) or pack(*a)):
        first = model(batch).local_rows
        assert len(made) == 1
        assert torch.equal(model(batch).local_rows, first)
        assert len(made) == 1
        model.blocks[0].narrow_conv.weight.mul_(1.5)
        second = model(batch).local_rows
        assert len(made) == 2
        assert not torch.equal(first, second)
        model.blocks[0].local_norm1.weight.data.mul_(1.5)  # not counted by PyTorch
        assert not torch.equal(model.eval()(batch).local_rows, second)
        with torch.enable_grad():
            model(batch)
            model(batch)
        assert len(made) == 5, "with gradients, in every call"


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="instruction set 'mmx' is unavailable on this CPU; the best is"):
        _cpu_kernels.use_instruction_set("mmx")


def test_kernels_run_on_the_threads_of_torch():
    assert _cpu_kernels.shares_threads()


def test_sizes_that_do_not_fit_are_refused_by_the_kernels_too():
    with pytest.raises(ValueError, match="channels must be a multiple of 16 up to 4096, got 12"):
        _cpu_kernels.pack_local_block([0] * 10, 0, 12, 9, 5, False, False, 1)
    with pytest.raises(ValueError, match="taps must be odd, and the dilation at least 1"):
        _cpu_kernels.pack_local_block([0] * 10, 0, 16, 8, 5, False, False, 1)
    with pytest.raises(ValueError, match="d_key must be a multiple of 16 up to 4096, got 12"):
        _cpu_kernels.pack_attention(0, 0, 16, 1, 12, 16, True, False, 1)
    with pytest.raises(ValueError, match="columns must be a multiple of 16 up to 4096, got 12"):
        _cpu_kernels.weight_gradient(0, 0, 0, 0, 0, 16, 12, 9, 5, False, 1)
