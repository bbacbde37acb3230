"""The original's optimisers: its golden steps, its pickles, an independent float64 formula, PyTorch's conventions."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from proteinbert_fast import ProteinBert
from proteinbert_fast.checkpoints import read_official, write_official
from proteinbert_fast.checkpoints.layouts import weight_layouts
from proteinbert_fast.errors import InputError, NonFiniteError
from proteinbert_fast.pretraining import optimizers
from proteinbert_fast.pretraining.optimizers import (
    KerasAdam,
    Lamb,
    check_gradients,
    find_nonfinite,
    moments_of,
    with_moments,
)
from tests.test_golden import pretraining_losses

from ..conftest import GOLDEN

BOTH = pytest.mark.parametrize("kind", [Lamb, KerasAdam])


@pytest.mark.parametrize(("name", "kind"), [("lamb", Lamb), ("adam", KerasAdam)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden_three_steps(tiny_model, golden, name, kind, dtype):
    """Losses before each step, and the change of all 53 weights after each."""
    tiny_model.backend = "reference"
    model = tiny_model.to(dtype)
    layouts = weight_layouts(model.config)
    before = [layout.to_official(model.state_dict()[layout.key]).astype(np.float64).ravel() for layout in layouts]
    optimizer = kind(model.parameters(), lr=float(golden[f"{name}_lr"]))
    for step in range(3):
        token_loss, annotation_loss = pretraining_losses(model, golden)
        losses = [token_loss + annotation_loss, token_loss, annotation_loss]
        # The original's steps were made in float32, so its losses carry float32's rounding of weights and sums.
        np.testing.assert_allclose([loss.item() for loss in losses], golden[f"{name}_losses"][step], rtol=1e-6)
        optimizer.zero_grad()
        losses[0].backward()
        optimizer.step()
        for i, layout in enumerate(layouts):
            after = layout.to_official(model.state_dict()[layout.key]).astype(np.float64).ravel()
            delta = after - before[i]
            # Weights near 1 are rounded to 6e-8 in every entry; the first Adam steps are signs of gradients, and the
            # smallest gradients are float32 noise in the original.
            length = golden[f"{name}_step{step + 1}_delta_l2"][i]
            noise = 6e-8 * math.sqrt(delta.size) * (step + 1)
            np.testing.assert_allclose(
                np.sqrt((delta**2).sum()), length, rtol=2e-4, atol=noise, err_msg=layout.official_name
            )
            np.testing.assert_allclose(
                delta @ np.cos(np.arange(delta.size)),
                golden[f"{name}_step{step + 1}_delta_cosprobe"][i],
                atol=2e-4 * length + noise,
                rtol=0,
                err_msg=layout.official_name,
            )


def hand_step(kind, w, g, m, v, t, lr, beta1, beta2, eps, decay):
    """The published formulas in float64."""
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    if kind is Lamb:
        u = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps) + decay * w
        norms = np.linalg.norm(w), np.linalg.norm(u)
        return w - lr * (norms[0] / norms[1] if min(norms) > 0 else 1.0) * u, m, v
    step = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
    return w * (1 - lr * decay) - step * m / (np.sqrt(v) + eps), m, v


@BOTH
@pytest.mark.parametrize("decay", [0.0, 0.03])
def test_steps_equal_the_formula(kind, decay):
    rng = np.random.default_rng(0)
    shapes = [(5, 3), (7,), (1,), (2, 3, 4), (3,)]
    weights = [rng.normal(size=shape) for shape in shapes]
    weights[-1][:] = 0  # no norm: the trust ratio is 1
    scales = [1.0, 1e-4, 1e-7, 10.0, 1.0]  # around epsilon too
    params = [nn.Parameter(torch.tensor(w)) for w in weights]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3, "betas": (0.8, 0.95)}]
    optimizer = kind(groups, lr=1e-2, weight_decay=decay)
    eps = optimizer.param_groups[0]["eps"]
    assert eps == (1e-6 if kind is Lamb else 1e-7)
    states = [(w, np.zeros_like(w), np.zeros_like(w)) for w in weights]
    for t in range(1, 8):
        for i, (p, scale) in enumerate(zip(params, scales, strict=True)):
            g = rng.normal(size=p.shape) * scale
            p.grad = torch.tensor(g)
            options = (1e-2, 0.9, 0.999) if i < 2 else (3e-3, 0.8, 0.95)
            w, m, v = states[i]
            states[i] = hand_step(kind, w, g, m, v, t, *options, eps, decay)
        optimizer.step()
        for p, (w, _, _) in zip(params, states, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-12, atol=1e-15)


@BOTH
def test_resumed_from_a_state_dict_the_steps_are_the_same_bits(kind, small_model):
    gradients = [[torch.randn_like(p) for p in small_model.parameters()] for _ in range(4)]

    def steps(model, optimizer, several):
        for given in several:
            for p, g in zip(model.parameters(), given, strict=True):
                p.grad = g.clone()
            optimizer.step()

    optimizer = kind(small_model.parameters(), lr=1e-3)
    steps(small_model, optimizer, gradients[:2])
    model, saved = copy.deepcopy(small_model), copy.deepcopy(optimizer.state_dict())
    shared = optimizer.state_dict()
    resumed = kind(model.parameters(), lr=1.0)
    resumed.load_state_dict(shared)
    steps(model, resumed, gradients[2:])
    for number, state in shared["state"].items():
        assert all(torch.equal(state[name], saved["state"][number][name]) for name in state), "the source was changed"
    steps(small_model, optimizer, gradients[2:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small_model.parameters(), strict=True))
    assert str(resumed.state_dict()["param_groups"]) == str(optimizer.state_dict()["param_groups"])


def test_trust_ratios_on_a_gpu_are_tensors_like_those_they_scale():
    """Then one launch scales many; the numbers are those of the plain form."""
    torch.manual_seed(0)
    updates = [torch.randn(shape) for shape in [(3, 5), (1024,), (1025,), (0, 4), (), (700, 3, 2)]]
    ratios = torch.rand(len(updates))
    spread = optimizers._spread(ratios, updates)
    for number, found, update in zip(ratios, spread, updates, strict=True):
        assert (found == number).all()
        assert (found.shape, found.stride()) == (update.shape, update.stride())
    expected = [u * r for u, r in zip(updates, ratios, strict=True)]
    torch._foreach_mul_(updates, spread)
    assert all(torch.equal(a, b) for a, b in zip(updates, expected, strict=True))


@BOTH
def test_parameters_without_gradient_keep_still_and_age_apart(kind):
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = kind([a, b])
    a.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(b, torch.ones(3))
    assert not optimizer.state[b]
    b.grad, a.grad = torch.ones(3), None
    optimizer.step()
    assert torch.equal(a, b), "both have made one first step"


@BOTH
def test_closure(kind):
    p = nn.Parameter(torch.ones(3))
    optimizer = kind([p])

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert (p < 1).all()


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_moments_of_16_bit_parameters_are_float32_and_stay_so(kind, dtype):
    p = nn.Parameter(torch.ones(64, dtype=dtype))
    optimizer = kind([p], lr=0.1)
    p.grad = torch.full_like(p, 3e-4)
    optimizer.step()
    assert float(p.detach()[0]) < 1
    state = optimizer.state[p]
    assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.float32}
    assert float(state["exp_avg_sq"][0]) == pytest.approx(9e-11, rel=1e-2), "float16 has no such number"
    again = kind([p])
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[p]["exp_avg_sq"], state["exp_avg_sq"])
    assert again.state[p]["exp_avg_sq"].dtype == torch.float32


@BOTH
def test_with_a_gradient_scaler(kind):
    """Infinite gradients skip the step and lower the scale; finite ones are divided by it."""
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer, plain = kind([p]), kind([q])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((p * math.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, torch.ones(4))
    assert scaler.get_scale() == 512
    optimizer.zero_grad()
    scaler.scale((p * torch.arange(4.0)).sum()).backward()
    scaler.step(optimizer)
    (q * torch.arange(4.0)).sum().backward()
    plain.step()
    assert torch.equal(p, q)


@BOTH
def test_learning_rate_schedules_apply(kind):
    p = nn.Parameter(torch.ones(4))
    optimizer = kind([p], lr=1e-2)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    schedule.step(1.0)
    schedule.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 5e-3


@BOTH
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -1.0}, "lr must be a number from 0, got -1.0"),
        ({"lr": math.nan}, "lr must be a number from 0, got nan"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers from 0 to below 1"),
        ({"eps": -1e-6}, "eps must be a number from 0"),
        ({"weight_decay": math.inf}, "weight_decay must be a number from 0"),
    ],
)
def test_bad_options_are_refused(kind, options, says):
    p = nn.Parameter(torch.ones(1))
    with pytest.raises(InputError, match=says):
        kind([p], **options)
    with pytest.raises(InputError, match=says):
        kind([p]).add_param_group({"params": [nn.Parameter(torch.ones(1))], **options})


@BOTH
def test_sparse_gradients_and_complex_parameters_are_refused(kind):
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="takes no sparse gradients"):
        kind(table.parameters()).step()
    with pytest.raises(InputError, match=r"must be real floating-point tensors, got torch\.complex64"):
        kind([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


@pytest.mark.parametrize(("name", "kind"), [("lamb", Lamb), ("adam", KerasAdam)])
def test_the_original_s_training_goes_on_from_its_pickle(tmp_path, name, kind):
    """Steps after the third, from the moments that the original left; then the pickle is written and read again."""
    path = GOLDEN / f"nano_model_{name}_step3_proto4.pkl"
    checkpoint = read_official(path)
    model = ProteinBert.from_pretrained(path)
    optimizer = kind(model.parameters())
    optimizer.load_state_dict(with_moments(optimizer, model, checkpoint.optimizer_state))
    source = checkpoint.optimizer_state
    assert source.iteration == 3
    assert sum(int(m.count_nonzero()) for m in source.second_moments.values()) > 900
    assert moments_of(optimizer, model).iteration == 3
    write_official(tmp_path / "same.pkl", _with(checkpoint, moments_of(optimizer, model)))
    same = read_official(tmp_path / "same.pkl").optimizer_state
    for key in source.first_moments:
        assert torch.equal(same.first_moments[key], source.first_moments[key])
        assert torch.equal(same.second_moments[key], source.second_moments[key])

    torch.manual_seed(0)
    group, expected = optimizer.param_groups[0], {}
    for key, p in model.named_parameters():
        p.grad = torch.randn_like(p)
        w, g, m, v = (
            t.detach().double().numpy() for t in (p, p.grad, source.first_moments[key], source.second_moments[key])
        )
        expected[key] = hand_step(kind, w, g, m, v, 4, group["lr"], *group["betas"], group["eps"], 0.0)
    optimizer.step()
    after = moments_of(optimizer, model)
    assert after.iteration == 4
    for key, p in model.named_parameters():
        # Rounding of a float32 step and of weights up to 2.
        np.testing.assert_allclose(p.detach().numpy(), expected[key][0], rtol=2e-7, atol=1e-9)
        np.testing.assert_allclose(after.first_moments[key], expected[key][1], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(after.second_moments[key], expected[key][2], rtol=1e-6, atol=1e-9)


def _with(checkpoint, moments):
    return type(checkpoint)(**{**vars(checkpoint), "optimizer_state": moments})


def test_moments_that_do_not_fit_are_refused(small_model):
    checkpoint = read_official(GOLDEN / "nano_model_lamb_step3_proto4.pkl")
    with pytest.raises(InputError, match=r"moments of annotation_input\.weight are \(5, 8\), the parameter is"):
        with_moments(Lamb(small_model.parameters()), small_model, checkpoint.optimizer_state)
    stranger = nn.Parameter(torch.ones(1))
    for function in (moments_of, lambda o, m: with_moments(o, m, checkpoint.optimizer_state)):
        with pytest.raises(InputError, match="a parameter that is not one of the model's"):
            function(Lamb([stranger]), small_model)
    layer = nn.Linear(2, 2)
    with pytest.raises(InputError, match="the checkpoint has no moments of weight"):
        with_moments(Lamb(layer.parameters()), layer, checkpoint.optimizer_state)
    optimizer = Lamb(layer.parameters())
    layer.weight.grad = torch.ones(2, 2)
    optimizer.step()
    with pytest.raises(InputError, match="have made from 0 to 1 steps"):
        moments_of(optimizer, layer)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_no_numbers_are_named(small_model, value):
    for p in small_model.parameters():
        p.grad = torch.zeros_like(p)
    assert find_nonfinite(small_model) == []
    assert check_gradients(small_model)
    small_model.token_head.bias.grad[7] = value
    small_model.blocks[1].key.weight.grad[3, 5] = value
    bad = ["blocks.1.key.weight", "token_head.bias"]
    assert find_nonfinite(small_model) == bad
    with pytest.raises(NonFiniteError, match=r"of 2 parameters hold NaN or infinity: blocks\.1\.key\.weight, token_he"):
        check_gradients(small_model)
    assert not check_gradients(small_model, "skip")
    assert all(p.grad is None for p in small_model.parameters())
    assert check_gradients(small_model), "no gradients are no bad gradients"
    with pytest.raises(InputError, match="action 'ignore' is unknown; choose skip or stop"):
        check_gradients(small_model, "ignore")


def test_large_finite_gradients_are_fine():
    layer = nn.Linear(64, 64)
    layer.weight.grad = torch.full((64, 64), 3e38)
    assert find_nonfinite(layer) == []
    layer.half().weight.grad = torch.full((64, 64), 65504.0, dtype=torch.float16)
    assert find_nonfinite(layer) == []
