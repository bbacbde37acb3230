"""What a self-check compares: it sees wrong numbers, wrong gradients and bits that change."""

import itertools

import pytest
import torch

from proteinbert_fast import ProteinBertConfig
from proteinbert_fast.errors import ProteinBertError
from proteinbert_fast.ops import backends, reference
from proteinbert_fast.self_check.compare import (
    ALONE,
    LENGTHS,
    TOLERANCES,
    Kind,
    Measured,
    difference,
    failure_in,
    gradient_difference,
    measure,
)

CONFIG = ProteinBertConfig(n_annotations=5)
CPU = torch.device("cpu")
FLOAT32 = Kind(CPU, CONFIG, torch.float32, torch.float32, True, True)
SHORT = (1, 7, 131, 40)


def test_several_programs_run_on_every_multiprocessor():
    gap = CONFIG.reach
    assert gap + sum(n + 2 + gap for n in LENGTHS) > 50_000
    assert {n % 2 for n in LENGTHS} == {0, 1}
    assert len(SHORT) > ALONE


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_back_end_passes(parameters):
    kind = Kind(CPU, CONFIG, torch.bfloat16, parameters, True, True)
    measured = measure(kind, "cpu", SHORT)
    assert failure_in(measured, kind) is None
    assert measured.error > 1e-3, "was computed in bfloat16"


def test_checking_leaves_no_trace_in_generators(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(3)
    seeded.clear()
    state = torch.get_rng_state()
    measure(FLOAT32, "cpu", SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    assert not seeded


@pytest.mark.parametrize(
    ("measured", "kind", "says"),
    [
        (Measured(1e-4, 1e-4), FLOAT32, None),
        (Measured(1e-3, 1e-4), FLOAT32, "results are off by 1.0e-03, allowed 0.0002"),
        (Measured(1e-4, 1e-2), FLOAT32, "gradients are off by 1.0e-02 of their length, allowed 0.001"),
        (Measured(1e-3, 1e-2), Kind(CPU, CONFIG, torch.float32, torch.float32, False, True), None),  # TF32
        (Measured(float("nan"), 1e-4), FLOAT32, "results are off by nan, allowed 0.0002"),
        (Measured(1e-4, float("nan")), FLOAT32, "gradients are off by nan of their length, allowed 0.001"),
        (Measured(1e-4, None), FLOAT32, "gradients were not checked"),
        (Measured(1e-4, None), Kind(CPU, CONFIG, torch.float32, torch.float32, True, False), None),
    ],
)
def test_judgments(measured, kind, says):
    assert failure_in(measured, kind) == says


def planted(monkeypatch, name, wrong):
    """The CPU back end with a wrong operation, its blocks run one by one so that the model calls it."""
    operations = {**vars(backends.CPU), name: wrong, "run_blocks": None}
    monkeypatch.setattr(backends, "CPU", backends.Operations(**operations))


def test_other_numbers_in_a_second_run_are_seen(monkeypatch):
    right, calls = backends.CPU.message, itertools.count()

    def wrong(*arguments):
        found = right(*arguments)
        return found._replace(broadcast=found.broadcast * (1 + 1e-6 * next(calls)))

    planted(monkeypatch, "message", wrong)
    with pytest.raises(ProteinBertError, match="the same batch has other numbers in a second run"):
        difference(FLOAT32, "cpu", SHORT)
    with pytest.raises(ProteinBertError, match="the same batch has other numbers in a second run"):
        gradient_difference(FLOAT32, "cpu", SHORT)


def test_other_numbers_alone_than_in_a_batch_are_seen(monkeypatch):
    right = backends.CPU.message

    def wrong(global_state, weights):
        found = right(global_state, weights)
        return found._replace(broadcast=found.broadcast * (1 + 1e-6 * len(global_state)))

    planted(monkeypatch, "message", wrong)
    with pytest.raises(ProteinBertError, match="a protein has other numbers alone than in a batch"):
        difference(FLOAT32, "cpu", SHORT)


@pytest.mark.parametrize("unused", ["wide_bias", "norm1_weight", "norm2_bias", "dense_bias"])
def test_every_bias_and_norm_shows(monkeypatch, unused):
    right = backends.CPU.local_block

    def wrong(x, broadcast, batch, weights, *rest):
        left_out = getattr(weights, unused)
        plain = torch.ones_like(left_out) if unused.endswith("weight") else torch.zeros_like(left_out)
        return right(x, broadcast, batch, weights._replace(**{unused: plain}), *rest)

    planted(monkeypatch, "local_block", wrong)
    assert difference(FLOAT32, "cpu", SHORT) > 0.01


def test_gradients_of_the_cpu_back_end_pass(monkeypatch):
    assert gradient_difference(FLOAT32, "cpu", SHORT) < 1e-4
    planted(monkeypatch, "message", lambda *a: _half(cpu_message(*a)))
    assert gradient_difference(FLOAT32, "cpu", SHORT) > 0.01


def cpu_message(*arguments):
    return reference.message(*arguments)


def _half(message):
    return reference.Message(message.query, 0.5 * message.broadcast)


def test_the_check_itself_sees_a_wrong_back_end(monkeypatch):
    exact = difference(FLOAT32, "cpu", SHORT)
    assert exact < TOLERANCES[torch.float32]
    right = backends.CPU.global_track

    def wrong(local, global_state, *rest):
        track = right(local, global_state, *rest)
        return track._replace(global_state=track.global_state + 0.01)

    planted(monkeypatch, "global_track", wrong)
    assert difference(FLOAT32, "cpu", SHORT) > 0.005


def test_blocks_run_at_once_are_checked(monkeypatch):
    right = backends.CPU.run_blocks

    def wrong(*arguments):
        local, global_state = right(*arguments)
        return local, global_state + 0.01

    monkeypatch.setattr(backends, "CPU", backends.Operations(**{**vars(backends.CPU), "run_blocks": wrong}))
    assert difference(FLOAT32, "cpu", SHORT) > 0.005
