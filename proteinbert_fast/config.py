"""The sizes of a ProteinBERT model, checked."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from proteinbert_fast.errors import InputError

VOCABULARY_SIZE = 26
LAYER_NORM_EPS = 1e-3


@dataclass(frozen=True)
class ProteinBertConfig:
    """Sizes of the model; the defaults are those of the published one (15,981,321 parameters).

    Attributes:
        n_annotations: GO terms read and predicted.
        d_local: channels of the state of each residue.
        d_global: channels of the state of each protein.
        n_blocks: blocks of local and global track.
        n_heads: heads of global attention; must divide ``d_global``.
        d_key: channels of each head's queries and keys.
        kernel_size: taps of both convolutions; odd.
        wide_dilation: rows between the taps of the wide convolution.

    Raises:
        InputError: a size is not a positive integer, or two sizes do not fit each other.
    """

    n_annotations: int = 8943
    d_local: int = 128
    d_global: int = 512
    n_blocks: int = 6
    n_heads: int = 4
    d_key: int = 64
    kernel_size: int = 9
    wide_dilation: int = 5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise InputError(f"config: {name} must be a positive integer, got {value!r}")
        if self.d_global % self.n_heads:
            raise InputError(f"config: d_global ({self.d_global}) must be a multiple of n_heads ({self.n_heads})")
        if self.kernel_size % 2 == 0:
            raise InputError(f"config: kernel_size must be odd, got {self.kernel_size}")

    @property
    def d_value(self) -> int:
        """Channels of each head's values."""
        return self.d_global // self.n_heads

    @property
    def reach(self) -> int:
        """Rows that the wide convolution sees on each side; gaps between proteins are at least as long."""
        return self.kernel_size // 2 * self.wide_dilation

    @property
    def n_parameters(self) -> int:
        """Trainable numbers in a model of these sizes."""
        d, g, n = self.d_local, self.d_global, self.n_annotations
        qkv = self.n_heads * self.d_key * (g + d) + g * d
        convolutions = 2 * (self.kernel_size * d * d + d)
        local = (g * d + d) + convolutions + (d * d + d) + 4 * d
        per_block = local + qkv + 2 * (g * g + g) + 4 * g
        heads = (d * VOCABULARY_SIZE + VOCABULARY_SIZE) + (g * n + n)
        return (n * g + g) + VOCABULARY_SIZE * d + self.n_blocks * per_block + heads

    def to_dict(self) -> dict[str, int]:
        """The sizes by name, as ``config.json`` holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, sizes: dict[str, Any]) -> "ProteinBertConfig":
        """The configuration with exactly these sizes.

        Raises:
            InputError: a size is missing, unknown or not a positive integer.
        """
        known = {field.name for field in fields(cls)}
        if missing := sorted(known - sizes.keys()):
            raise InputError(f"config: missing {', '.join(missing)}")
        if unknown := sorted(sizes.keys() - known):
            raise InputError(f"config: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**sizes)
