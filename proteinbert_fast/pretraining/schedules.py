"""Learning rates: of each step from its number, or from the loss so far."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from proteinbert_fast.pretraining.config import PretrainingConfig

# The original's epochs have 100 batches, whose mean loss must fall by Keras's usual 1e-4 within 20 epochs: the 20th
# without that lowers the rate, where PyTorch's schedule of that patience waits for a 21st.
PLATEAU_STEPS, _PATIENCE, _FACTOR, _MIN_DELTA = 100, 20, 0.8, 1e-4


class LearningRate:
    """Sets an optimiser's learning rate before each step.

    Args:
        optimizer: whose groups all have one learning rate.
        config: names the schedule.
    """

    def __init__(self, optimizer: Optimizer, config: PretrainingConfig) -> None:
        self._optimizer, self._config = optimizer, config
        self._sum, self._n = 0.0, 0
        self._plateau: ReduceLROnPlateau | None = None
        if config.schedule == "plateau":
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate
            self._plateau = ReduceLROnPlateau(
                optimizer, factor=_FACTOR, patience=_PATIENCE - 1, threshold=_MIN_DELTA, threshold_mode="abs",
                min_lr=config.lowest_learning_rate, eps=0.0,
            )  # fmt: skip
            self._rate = config.learning_rate

    def before(self, step: int) -> float:
        """Sets the learning rate of a step, counted from 0, and returns it."""
        rate = self._rate if self._plateau is not None else steady_rate(self._config, step)
        if step < self._config.warmup_steps:
            rate *= (step + 1) / self._config.warmup_steps
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate

    def after(self, loss: float) -> None:
        """Hears the training loss of a step. That of a step that was skipped, NaN or infinite, does not count."""
        if self._plateau is None or not math.isfinite(loss):
            return
        self._sum, self._n = self._sum + loss, self._n + 1
        if self._n == PLATEAU_STEPS:
            for group in self._optimizer.param_groups:
                group["lr"] = self._rate
            self._plateau.step(self._sum / self._n)
            self._rate = float(self._optimizer.param_groups[0]["lr"])
            self._sum, self._n = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Numbers that JSON can hold."""
        if self._plateau is None:
            return {}
        plateau = self._plateau
        return {
            "sum": self._sum, "n": self._n, "rate": self._rate, "best": plateau.best,
            "bad_epochs": plateau.num_bad_epochs,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken."""
        if self._plateau is not None:
            self._sum, self._n, self._rate = state["sum"], state["n"], state["rate"]
            self._plateau.best, self._plateau.num_bad_epochs = state["best"], state["bad_epochs"]


def steady_rate(config: PretrainingConfig, step: int) -> float:
    """The learning rate of a step, counted from 0, of a schedule that goes by the number of the step alone.

    Warm-up is not in it.
    """
    high, low = config.learning_rate, config.lowest_learning_rate
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
        return low + (high - low) * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
    if config.schedule == "wsd":
        left = config.steps - step
        return low + (high - low) * min(left / config.decay_steps, 1.0)
    return high
