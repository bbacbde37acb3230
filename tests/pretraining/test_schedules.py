"""Learning rates by the step and by the loss."""

import math

import pytest
import torch

from proteinbert_fast.pretraining.config import PretrainingConfig
from proteinbert_fast.pretraining.schedules import PLATEAU_STEPS, LearningRate


def schedule(**options: object) -> LearningRate:
    config = PretrainingConfig(**options)
    return LearningRate(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate), config)


def rates(rate: LearningRate, epochs: list[float], first: int = 0) -> list[float]:
    """The rate after each epoch of 100 steps, of these mean losses."""
    found = []
    for epoch, loss in enumerate(epochs, first):
        for i in range(PLATEAU_STEPS):
            rate.before(epoch * PLATEAU_STEPS + i)
            rate.after(loss)
        found.append(rate.before((epoch + 1) * PLATEAU_STEPS))
    return found


def test_plateau_is_that_of_keras():
    """The first epoch sets the mark; the 20th after it that is not lower by 1e-4 lowers the rate, and so on."""
    rate = schedule(schedule="plateau", learning_rate=2e-4, lowest_learning_rate=5e-5)
    found = rates(rate, [1.0] + [1.0 - 0.9e-4] * 60)
    assert found[:20] == [2e-4] * 20
    assert found[20:40] == [pytest.approx(1.6e-4)] * 20
    assert found[40:60] == [pytest.approx(1.28e-4)] * 20
    assert rates(schedule(schedule="plateau"), [1.0 - 2e-4 * i for i in range(60)])[-1] == 2e-4
    floor = rates(schedule(schedule="plateau", learning_rate=2e-4, lowest_learning_rate=1.9e-4), [1.0] * 45)
    assert floor[-1] == pytest.approx(1.9e-4)


@pytest.mark.parametrize("at", [1, 20, 21, 30])
def test_plateau_goes_on_where_it_was(at):
    losses = [1.0, 0.9, *[0.95] * 50]
    whole, first, second = (schedule(schedule="plateau") for _ in range(3))
    expected = rates(whole, losses)
    begun = rates(first, losses[:at])
    second.load_state_dict(first.state_dict())
    assert begun + rates(second, losses[at:], first=at) == expected
    assert len(set(expected)) > 1


def test_skipped_steps_do_not_count():
    rate = schedule(schedule="plateau")
    for _ in range(PLATEAU_STEPS):
        rate.after(math.nan)
    assert rate.state_dict()["n"] == 0
    assert rate.state_dict()["best"] == math.inf


def test_by_the_step():
    wsd = schedule(
        schedule="wsd", steps=100, decay_steps=20, warmup_steps=10, learning_rate=1.0, lowest_learning_rate=0.0
    )
    assert wsd.before(0) == pytest.approx(0.1)
    assert [wsd.before(step) for step in (9, 50, 80, 90, 99)] == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.05])
    cosine = schedule(schedule="cosine", steps=110, warmup_steps=10, learning_rate=1.0, lowest_learning_rate=0.2)
    assert [cosine.before(step) for step in (10, 60)] == pytest.approx([1.0, 0.6])
    assert cosine.before(109) == pytest.approx(0.2, abs=1e-3)
    assert schedule(schedule="constant", learning_rate=0.3).before(5000) == 0.3
