"""The definitions: against independent float64 arithmetic, and their gradients against finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from proteinbert_fast import Tokenizer
from proteinbert_fast.ops import reference
from proteinbert_fast.ops.reference import GlobalBlockWeights, LocalBlockWeights, MessageWeights

D, G, H, K, TAPS = 6, 8, 2, 3, 9


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def local_weights(d: int = D) -> LocalBlockWeights:
    return LocalBlockWeights(
        random(d, d, TAPS) / 5, random(d), random(d, d, TAPS, seed=1) / 5, random(d, seed=1), random(d, seed=2),
        random(d, seed=3), random(d, d), random(d, seed=4), random(d, seed=5), random(d, seed=6),
    )  # fmt: skip


def batch_of(*residues: int):
    return Tokenizer()(["M" * n for n in residues])


def states(batch, d: int) -> torch.Tensor:
    return random(batch.n_rows, d) * (batch.segments >= 0).unsqueeze(-1)


def convolution_by_loops(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dilation: int) -> torch.Tensor:
    out = bias.repeat(len(x), 1)
    for row in range(len(x)):
        for tap in range(weight.shape[-1]):
            source = row + (tap - weight.shape[-1] // 2) * dilation
            if 0 <= source < len(x):
                out[row] += weight[:, :, tap] @ x[source]
    return out


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def norm_by_hand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-3).sqrt() * weight + bias


@pytest.mark.parametrize("residues", [(0,), (1,), (3, 0, 17), (41, 2)])
def test_local_block_is_the_formula_of_each_protein_alone(residues):
    batch, w = batch_of(*residues), local_weights()
    x, broadcast = states(batch, D), random(len(batch), D, seed=9)
    hidden, local = reference.local_block(x, broadcast, batch.segments, w, wide_dilation=5)
    for i, rows in enumerate(batch.unpack(x)):
        narrow = exact_gelu(convolution_by_loops(rows, w.narrow_weight, w.narrow_bias, 1))
        wide = exact_gelu(convolution_by_loops(rows, w.wide_weight, w.wide_bias, 5))
        h = norm_by_hand(rows + broadcast[i] + narrow + wide, w.norm1_weight, w.norm1_bias)
        y = norm_by_hand(h + exact_gelu(h @ w.dense_weight.T + w.dense_bias), w.norm2_weight, w.norm2_bias)
        torch.testing.assert_close(batch.unpack(hidden)[i], h)
        torch.testing.assert_close(batch.unpack(local)[i], y)
    gaps = batch.segments < 0
    assert not hidden[gaps].any()
    assert not local[gaps].any()


@pytest.mark.parametrize("residues", [(0,), (1,), (3, 0, 17), (41, 2)])
def test_global_attention_is_the_formula_of_each_protein_alone(residues):
    batch = batch_of(*residues)
    local, global_state = states(batch, D), random(len(batch), G)
    wq, wk, wv = random(H * K, G), random(H * K, D), random(G, D)
    spoken = reference.message(global_state, MessageWeights(wq, random(D, G, seed=2), random(D)))
    attended = reference.global_attention(local, spoken.query, batch.segments, wk, wv, H, return_weights=True)
    torch.testing.assert_close(spoken.broadcast, exact_gelu(global_state @ random(D, G, seed=2).T + random(D)))
    for i, rows in enumerate(batch.unpack(local)):
        heads = []
        for h in range(H):
            q = torch.tanh(wq[h * K : (h + 1) * K] @ global_state[i])
            k = torch.tanh(rows @ wk[h * K : (h + 1) * K].T)
            v = exact_gelu(rows @ wv[h * G // H : (h + 1) * G // H].T)
            softmax = torch.softmax(k @ q / math.sqrt(K), 0)
            torch.testing.assert_close(batch.unpack(attended.weights)[i][:, h], softmax)
            heads.append(softmax @ v)
        torch.testing.assert_close(attended.pooled[i], torch.cat(heads))
    assert not attended.weights[batch.segments < 0].any()


def test_global_block_is_the_formula():
    g, pooled = random(3, G), random(3, G, seed=1)
    w = GlobalBlockWeights(
        random(G, G), random(G), random(G, seed=1), random(G, seed=2),
        random(G, G, seed=1), random(G, seed=3), random(G, seed=4), random(G, seed=5),
    )  # fmt: skip
    hidden, out = reference.global_block(g, pooled, w)
    h = norm_by_hand(g + exact_gelu(g @ w.dense1_weight.T + w.dense1_bias) + pooled, w.norm1_weight, w.norm1_bias)
    torch.testing.assert_close(hidden, h)
    expected = norm_by_hand(h + exact_gelu(h @ w.dense2_weight.T + w.dense2_bias), w.norm2_weight, w.norm2_bias)
    torch.testing.assert_close(out, expected)


def test_annotations_dense_sparse_and_none_agree():
    weight, bias = random(11, G), random(G)
    dense = torch.zeros(3, 11, dtype=torch.float64)
    dense[0, [2, 5, 7]] = 1
    dense[2, 10] = 1
    sparse = (torch.tensor([7, 2, 5, 10]), torch.tensor([0, 3, 3]))
    expected = exact_gelu(dense @ weight + bias)
    torch.testing.assert_close(reference.embed_annotations(dense, weight, bias, 3), expected)
    torch.testing.assert_close(reference.embed_annotations(sparse, weight, bias, 3), expected)
    torch.testing.assert_close(reference.embed_annotations(None, weight, bias, 3)[1], expected[1])


def test_residue_mean_leaves_out_first_and_last_token():
    batch = batch_of(0, 1, 5)
    rows = random(batch.n_rows, D)
    means = reference.residue_mean(rows, batch.segments, batch.starts, batch.lengths)
    assert not means[0].any()
    for i, protein in enumerate(batch.unpack(rows)[1:], start=1):
        torch.testing.assert_close(means[i], protein[1:-1].mean(0))
    assert reference.residue_mean(rows.bfloat16(), batch.segments, batch.starts, batch.lengths).dtype == torch.float32


def test_gap_rows_embed_to_zeros():
    batch = batch_of(2)
    embedded = reference.embed_tokens(batch.tokens, random(26, D))
    assert not embedded[batch.segments < 0].any()
    torch.testing.assert_close(embedded[20], random(26, D)[23])


def test_embedding_gradients_are_summed_in_float32():
    """One token many times: a sum in bfloat16 would stop at 256, where adding 1 rounds to nothing."""
    weight = random(26, D).bfloat16().requires_grad_()
    rows = reference.embed_tokens(torch.full((5000,), 3, dtype=torch.uint8), weight)
    assert rows.dtype == torch.bfloat16
    rows.sum(0, dtype=torch.float32).sum().backward()
    assert (weight.grad[3] == torch.tensor(5000.0).bfloat16()).all()
    assert not weight.grad[:3].any()


def test_gradcheck_local_block():
    batch = batch_of(1, 4)
    inputs = [states(batch, 2), random(2, 2, seed=9), *local_weights(2)]
    inside = (batch.segments >= 0).unsqueeze(-1)

    def block(x, broadcast, *weights):
        return reference.local_block(x * inside, broadcast, batch.segments, LocalBlockWeights(*weights), 5)

    assert torch.autograd.gradcheck(block, [t.requires_grad_() for t in inputs])


def test_gradcheck_global_attention():
    batch = batch_of(1, 4)
    message = [random(2, G), random(H * K, G), random(D, G, seed=1), random(D)]
    inputs = [states(batch, D), *message, random(H * K, D), random(G, D)]

    def attention(local, global_state, *weights):
        query, broadcast = reference.message(global_state, MessageWeights(*weights[:3]))
        return *reference.global_attention(local, query, batch.segments, *weights[3:], H, True), broadcast

    assert torch.autograd.gradcheck(attention, [t.requires_grad_() for t in inputs])


def test_gradcheck_global_block():
    square, vector = (G, G), (G,)
    shapes = (square, vector, vector, vector, square, vector, vector, vector)
    inputs = [random(2, G), random(2, G, seed=8), *(random(*shape, seed=i) for i, shape in enumerate(shapes))]

    def block(global_state, pooled, *weights):
        return tuple(reference.global_block(global_state, pooled, GlobalBlockWeights(*weights)))

    assert torch.autograd.gradcheck(block, [t.requires_grad_() for t in inputs])


def test_gradcheck_embedding_and_means():
    batch = batch_of(1, 4, 0)
    terms = torch.tensor([2, 0, 2]), torch.tensor([0, 2, 2])
    annotations = [random(3, G), random(G, seed=1)]
    for given in (terms, random(3, 3, seed=2), None):
        if given is None:
            annotations = annotations[1:]

        def embedded(*weights, given=given):
            weight = weights[0] if given is not None else random(3, G)
            return reference.embed_annotations(given, weight, weights[-1], 3)

        assert torch.autograd.gradcheck(embedded, [t.detach().requires_grad_() for t in annotations])
    assert torch.autograd.gradcheck(lambda w: reference.embed_tokens(batch.tokens, w), random(26, D).requires_grad_())
    places = batch.segments, batch.starts, batch.lengths
    rows = states(batch, D).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: reference.residue_mean(r, *places), rows)


def test_convolution_is_torch_conv1d():
    x, weight, bias = random(50, D), random(D, D, TAPS), random(D)
    for dilation in (1, 5):
        expected = F.conv1d(x.T[None], weight, bias, padding=4 * dilation, dilation=dilation)[0].T
        torch.testing.assert_close(reference.convolution(x, weight, bias, dilation), expected)


@pytest.mark.usefixtures("two_threads")
def test_gradients_are_summed_in_one_order():
    """Of what many rows share: the same bits every time, however many threads there are."""
    segments = torch.arange(3).repeat_interleave(20_000).int()
    values = torch.randn(3, 64, requires_grad=True)
    gradient = torch.randn(60_000, 64)
    found = [torch.autograd.grad(reference.of_each_row(values, segments), values, gradient)[0] for _ in range(10)]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.allclose(found[0], gradient.view(3, -1, 64).sum(1), rtol=1e-3, atol=1e-2)
