"""The options of a pretraining run, checked; from TOML, flags, or Python."""

import math
import tomllib
from dataclasses import asdict, dataclass, fields
from os import PathLike, fspath
from typing import Any, Literal, get_args, get_origin, get_type_hints

from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.data.sampling import Cutting, Episodes, TokenBudget
from proteinbert_fast.errors import InputError

Optimizer = Literal["lamb", "adamw", "keras-adam"]
Schedule = Literal["plateau", "cosine", "wsd", "constant"]
Batches = Literal["tokens", "episodes"]
LossForm = Literal["original", "weighted_mean"]
Precision = Literal["float32", "bfloat16", "float16"]
Nonfinite = Literal["stop", "skip"]

# Options that change no weight: a run may be resumed with others.
FREE = frozenset(
    {
        "checkpoint_every", "checkpoint_minutes", "keep_last", "keep_every", "keep_best", "log_every", "validate_every",
        "validation_proteins", "max_minutes", "tensorboard", "nonfinite",
    }
)  # fmt: skip


@dataclass(frozen=True)
class PretrainingConfig:
    """Options of a run. The defaults are the paper's objective, noise and optimiser in batches of mixed lengths.

    Attributes:
        d_local, d_global, n_blocks, n_heads, d_key, kernel_size, wide_dilation: sizes of the model, see
            ProteinBertConfig. The corpus's terms are its annotations.
        seed: of the weights, the order of proteins, windows and corruption.
        steps: batches of the whole run.
        batches: "tokens" (mixed lengths up to a budget of rows) or "episodes" (the paper's: one length at a time).
        tokens_per_batch: rows of a batch of all ranks together, gaps included; for "tokens".
        window: longer proteins are cut to a random window of so many tokens, anew in each epoch; 0 for whole proteins.
        episode_batches: batches of an episode.
        tokens_per_pass: most rows that a device takes at a time; more are accumulated. 0 for no limit.
        loss: form of both losses, see ``losses``.
        annotation_weight: of the GO loss.
        replace_probability: of a token. 0.05 in the paper.
        remove_probability: of a true GO term. 0.25 in the paper.
        add_probability: of a GO term that is not true. 1e-4 in the paper.
        hide_probability: that a protein is shown without any term. 0.5 in the paper.
        optimizer: "lamb" (the paper's), "adamw", or "keras-adam".
        learning_rate: the highest.
        beta1, beta2, epsilon, weight_decay: of the optimiser. Biases and norms do not decay.
        schedule: of the learning rate: "plateau" (the paper's: 0.8 times after 20 times 100 batches without a better
            loss), "cosine" (to the lowest at the last step), "wsd" (constant, then straight down in the last
            ``decay_steps``) or "constant".
        warmup_steps: steps of rising learning rate.
        decay_steps: of "wsd".
        lowest_learning_rate: that the schedule ends at.
        clip: largest norm of the gradients; 0 for none.
        ema: share of the old in a running mean of the weights, which is validated and saved then; 0 for none.
        precision: that products are computed in: "float32", "bfloat16", or "float16" (with loss scaling).
        save: what is kept of each block for the backward pass, see ProteinBert.
        nonfinite: what to do when gradients are not finite: "stop", or "skip" the step.
        validate_every: steps between validations; 0 for none but the last.
        validation_proteins: at most so many of the validation set.
        checkpoint_every: steps between checkpoints.
        checkpoint_minutes: a checkpoint at least so often, too; 0 for no such limit.
        keep_last: checkpoints that are kept.
        keep_every: and every one whose step is a multiple of this; 0 for none.
        keep_best: also keep the one of the lowest validation loss.
        log_every: steps between rows of the log.
        max_minutes: stop with a checkpoint after this time; 0 for none.
        tensorboard: also write TensorBoard's files.

    Raises:
        InputError: an option is out of range.
    """

    d_local: int = 128
    d_global: int = 512
    n_blocks: int = 6
    n_heads: int = 4
    d_key: int = 64
    kernel_size: int = 9
    wide_dilation: int = 5
    seed: int = 0
    steps: int = 100_000
    batches: Batches = "tokens"
    tokens_per_batch: int = 65_536
    window: int = 1024
    episode_batches: int = 100
    tokens_per_pass: int = 0
    loss: LossForm = "original"
    annotation_weight: float = 1.0
    replace_probability: float = 0.05
    remove_probability: float = 0.25
    add_probability: float = 1e-4
    hide_probability: float = 0.5
    optimizer: Optimizer = "lamb"
    learning_rate: float = 2e-4
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6
    weight_decay: float = 0.0
    schedule: Schedule = "plateau"
    warmup_steps: int = 0
    decay_steps: int = 0
    lowest_learning_rate: float = 5e-5
    clip: float = 0.0
    ema: float = 0.0
    precision: Precision = "bfloat16"
    save: Literal["preactivations", "inputs"] = "preactivations"
    nonfinite: Nonfinite = "stop"
    validate_every: int = 1000
    validation_proteins: int = 2000
    checkpoint_every: int = 1000
    checkpoint_minutes: float = 15.0
    keep_last: int = 2
    keep_every: int = 0
    keep_best: bool = True
    log_every: int = 10
    max_minutes: float = 0.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            self._check_type(field.name, hints[field.name])
        self._at_least(1, "steps", "tokens_per_batch", "episode_batches", "checkpoint_every", "keep_last", "log_every")
        self._at_least(
            0, "seed", "window", "tokens_per_pass", "warmup_steps", "decay_steps", "validate_every", "keep_every",
            "validation_proteins", "annotation_weight", "learning_rate", "lowest_learning_rate", "epsilon",
            "weight_decay", "clip", "checkpoint_minutes", "max_minutes",
        )  # fmt: skip
        for name, most in (
            ("replace_probability", 1), ("remove_probability", 1), ("hide_probability", 1), ("add_probability", 0.5),
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"{name} must be from 0 to {most}, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise InputError(f"seed must be below 2^63, got {self.seed}")
        if self.lowest_learning_rate > self.learning_rate:
            raise InputError(
                f"lowest_learning_rate ({self.lowest_learning_rate}) is above learning_rate ({self.learning_rate})"
            )
        if self.schedule == "wsd" and not 0 < self.decay_steps <= self.steps - self.warmup_steps:
            raise InputError(
                f"schedule wsd needs decay_steps from 1 to {self.steps - self.warmup_steps}, the steps after the "
                f"warm-up, got {self.decay_steps}"
            )
        if self.warmup_steps >= self.steps:
            raise InputError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        self.model(1)

    def _check_type(self, name: str, wanted: Any) -> None:
        value = getattr(self, name)
        if get_origin(wanted) is Literal:
            if value not in get_args(wanted):
                raise InputError(f"{name} {value!r} is unknown; choose one of {', '.join(get_args(wanted))}")
        elif wanted is float:
            if type(value) not in {int, float} or not math.isfinite(value):
                raise InputError(f"{name} must be a number, got {value!r}")
        elif type(value) is not wanted:
            kind = {int: "a whole number", bool: "true or false"}[wanted]
            raise InputError(f"{name} must be {kind}, got {value!r}")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise InputError(f"{name} must be from {least}, got {getattr(self, name)}")

    def model(self, n_terms: int) -> ProteinBertConfig:
        """Sizes of the model for a corpus of so many terms; without any, it has one annotation that is never set."""
        return ProteinBertConfig(
            max(n_terms, 1), self.d_local, self.d_global, self.n_blocks, self.n_heads, self.d_key, self.kernel_size,
            self.wide_dilation,
        )  # fmt: skip

    def cutting(self) -> Cutting:
        """How the stream of proteins becomes batches."""
        if self.batches == "episodes":
            return Episodes(batches=self.episode_batches)
        return TokenBudget(self.tokens_per_batch, self.window or None, self.model(1).reach)

    def to_dict(self) -> dict[str, Any]:
        """The options by name."""
        return asdict(self)

    def difference(self, other: "PretrainingConfig", step: int) -> str | None:
        """An option by which a run that has made ``step`` steps as ``other`` cannot go on as this one; None if none.

        The end may be moved while it has not been heard of: at any time where the learning rate does not depend on it,
        and before the decay of "wsd".
        """
        free = set(FREE)
        if self.schedule == other.schedule == "wsd" and step <= min(c.steps - c.decay_steps for c in (self, other)):
            free |= {"steps", "decay_steps", "lowest_learning_rate"}
        if self.schedule in {"plateau", "constant"}:
            free.add("steps")
        for name, value in self.to_dict().items():
            if name not in free and value != (theirs := getattr(other, name)):
                return f"{name} is {value}, was {theirs}"
        return None

    @classmethod
    def from_dict(cls, options: dict[str, Any], where: str) -> "PretrainingConfig":
        """Options by name; those that are not given have their defaults.

        Raises:
            InputError: an option is unknown or out of range; says where.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(options.keys() - set(known)):
            raise InputError(f"{where}: unknown option {unknown[0]}; known are {', '.join(known)}")
        try:
            return cls(**options)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def read_config(path: str | PathLike[str], **changes: Any) -> PretrainingConfig:
    """A TOML file of options, some of them changed.

    Raises:
        InputError: the file is no TOML, or an option is unknown or out of range.
    """
    name = fspath(path)
    try:
        with open(path, "rb") as file:
            options = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: is not TOML: {error}") from None
    return PretrainingConfig.from_dict(options | changes, name)
