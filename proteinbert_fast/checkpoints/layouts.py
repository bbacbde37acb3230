"""How the original's arrays and this package's ``state_dict`` name, order and lay out the same weights.

The original (nadavbra/protein_bert) stores a plain list of arrays in the order of Keras ``get_weights()``:
dense kernels as (in, out), convolutions as (tap, in, out), attention projections as (head, in, out of a
head). Here they are PyTorch's: ``Linear`` as (out, in), ``Conv1d`` as (out, in, tap), and heads stacked in
the rows of one ``Linear``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from proteinbert_fast.checkpoints.foreign import foreign_model
from proteinbert_fast.config import VOCABULARY_SIZE, ProteinBertConfig
from proteinbert_fast.errors import CheckpointError

FloatArray = npt.NDArray[np.float32]

ARRAYS_BEFORE_BLOCKS = 3
ARRAYS_PER_BLOCK = 23
ARRAYS_AFTER_BLOCKS = 4
MAX_ARRAYS = 10_000

# Every original file has this dilation; no array of it records the number.
OFFICIAL_WIDE_DILATION = 5


@dataclass(frozen=True)
class WeightLayout:
    """One weight: its two names, its shape in the original's list, and how the two layouts differ.

    Attributes:
        official_name: Keras layer and weight, such as ``narrow-conv-block1/kernel``.
        key: name in this package's ``state_dict``, such as ``blocks.0.narrow_conv.weight``.
        official_shape: shape in the original's list.
        kind: ``same``; ``dense`` (in, out); ``convolution`` (tap, in, out); ``heads`` (head, in, out of a
            head).
    """

    official_name: str
    key: str
    official_shape: tuple[int, ...]
    kind: Literal["same", "dense", "convolution", "heads"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the ``state_dict``."""
        if self.kind == "heads":
            heads, width, head_width = self.official_shape
            return heads * head_width, width
        return self.official_shape if self.kind == "same" else self.official_shape[::-1]

    def from_official(self, array: FloatArray) -> torch.Tensor:
        """A float32 tensor of ``shape`` with memory of its own, from an array of ``official_shape``."""
        if self.kind == "heads":
            array = array.transpose(0, 2, 1)
        elif self.kind != "same":
            array = array.T
        return torch.from_numpy(np.array(array, dtype=np.float32, order="C")).reshape(self.shape)

    def to_official(self, tensor: torch.Tensor) -> FloatArray:
        """A C-contiguous float32 array of ``official_shape``, from a tensor of ``shape`` and any type."""
        array = tensor.detach().to(device="cpu", dtype=torch.float32).numpy()
        if self.kind == "heads":
            heads, width, head_width = self.official_shape
            array = array.reshape(heads, head_width, width).transpose(0, 2, 1)
        elif self.kind != "same":
            array = array.T
        return np.array(array, dtype=np.float32, order="C")


def weight_layouts(config: ProteinBertConfig) -> list[WeightLayout]:
    """Every weight of a model of these sizes, in the order of the original's list."""
    local, wide, annotations = config.d_local, config.d_global, config.n_annotations
    layouts: list[WeightLayout] = []

    def dense(official: str, key: str, width_in: int, width_out: int) -> None:
        layouts.append(WeightLayout(f"{official}/kernel", f"{key}.weight", (width_in, width_out), "dense"))
        layouts.append(WeightLayout(f"{official}/bias", f"{key}.bias", (width_out,), "same"))

    def convolution(official: str, key: str) -> None:
        shape = (config.kernel_size, local, local)
        layouts.append(WeightLayout(f"{official}/kernel", f"{key}.weight", shape, "convolution"))
        layouts.append(WeightLayout(f"{official}/bias", f"{key}.bias", (local,), "same"))

    def norm(official: str, key: str, width: int) -> None:
        layouts.append(WeightLayout(f"{official}/gamma", f"{key}.weight", (width,), "same"))
        layouts.append(WeightLayout(f"{official}/beta", f"{key}.bias", (width,), "same"))

    # The annotation input is a sum of rows chosen by GO term, so it keeps the original's (term, channel).
    layouts.append(WeightLayout("dense-global-input/kernel", "annotation_input.weight", (annotations, wide), "same"))
    layouts.append(WeightLayout("dense-global-input/bias", "annotation_input.bias", (wide,), "same"))
    layouts.append(
        WeightLayout("embedding-seq-input/embeddings", "token_embedding.weight", (VOCABULARY_SIZE, local), "same")
    )
    for i in range(config.n_blocks):
        suffix, block = f"block{i + 1}", f"blocks.{i}"
        dense(f"global-to-seq-dense-{suffix}", f"{block}.broadcast", wide, local)
        convolution(f"narrow-conv-{suffix}", f"{block}.narrow_conv")
        convolution(f"wide-conv-{suffix}", f"{block}.wide_conv")
        norm(f"seq-merge1-norm-{suffix}", f"{block}.local_norm1", local)
        dense(f"seq-dense-{suffix}", f"{block}.local_dense", local, local)
        norm(f"seq-merge2-norm-{suffix}", f"{block}.local_norm2", local)
        dense(f"global-dense1-{suffix}", f"{block}.global_dense1", wide, wide)
        projections = (("Wq", "query", wide, config.d_key), ("Wk", "key", local, config.d_key))
        for name, part, width, head_width in (*projections, ("Wv", "value", local, config.d_value)):
            shape = (config.n_heads, width, head_width)
            layouts.append(WeightLayout(f"global-attention-{suffix}/{name}", f"{block}.{part}.weight", shape, "heads"))
        norm(f"global-merge1-norm-{suffix}", f"{block}.global_norm1", wide)
        dense(f"global-dense2-{suffix}", f"{block}.global_dense2", wide, wide)
        norm(f"global-merge2-norm-{suffix}", f"{block}.global_norm2", wide)
    dense("output-seq", "token_head", local, VOCABULARY_SIZE)
    dense("output-annotations", "annotation_head", wide, annotations)
    return layouts


def state_dict_shapes(config: ProteinBertConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the ``state_dict`` of a model of these sizes."""
    return {layout.key: layout.shape for layout in weight_layouts(config)}


def blocks_in(n_arrays: int) -> int | None:
    """Number of blocks of a model with this many arrays, or None where no model has so many."""
    blocks, rest = divmod(n_arrays - ARRAYS_BEFORE_BLOCKS - ARRAYS_AFTER_BLOCKS, ARRAYS_PER_BLOCK)
    return blocks if rest == 0 and blocks >= 1 and n_arrays <= MAX_ARRAYS else None


def official_names(n_blocks: int) -> list[str]:
    """The original's names of the arrays of a model of so many blocks, in order."""
    return [layout.official_name for layout in weight_layouts(ProteinBertConfig(n_blocks=n_blocks))]


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: ProteinBertConfig, where: str) -> None:
    """Check that tensors of these names and shapes are the ``state_dict`` of a model of these sizes.

    Raises:
        CheckpointError: a tensor is missing, unknown or of a wrong shape, or they are those of another model;
            the line starts with ``where``.
    """
    if other := foreign_model(shapes):
        raise CheckpointError(f"{where}: {other}")
    # Counted before the names are listed: a config from a stranger may ask for any number of blocks.
    n_expected = ARRAYS_BEFORE_BLOCKS + ARRAYS_PER_BLOCK * config.n_blocks + ARRAYS_AFTER_BLOCKS
    if len(shapes) > n_expected or n_expected > MAX_ARRAYS:
        raise CheckpointError(f"{where}: {len(shapes)} tensors, expected {n_expected:,} for {config.n_blocks:,} blocks")
    expected = state_dict_shapes(config)
    if missing := [key for key in expected if key not in shapes]:
        raise CheckpointError(f"{where}: {len(missing)} of {n_expected} tensors are missing, the first is {missing[0]}")
    for key, shape in expected.items():
        if tuple(shapes[key]) != shape:
            raise CheckpointError(f"{where}: {key} has shape {tuple(shapes[key])}, expected {shape}")


def check_finite(tensor: torch.Tensor, key: str, where: str) -> None:
    """Check that a tensor holds numbers only.

    Raises:
        CheckpointError: it holds NaN or infinity; the line starts with ``where`` and names ``key``.
    """
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise CheckpointError(f"{where}: {key} holds {bad:,} NaN or infinite values, expected numbers")


def state_dict_from_official(arrays: Sequence[FloatArray], config: ProteinBertConfig) -> dict[str, torch.Tensor]:
    """The original's arrays, in its order, as this package's ``state_dict``.

    Raises:
        CheckpointError: the number of arrays or a shape is not the one that ``config`` asks for.
    """
    layouts = weight_layouts(config)
    if len(arrays) != len(layouts):
        raise CheckpointError(f"official weights: {len(arrays)} arrays, expected {len(layouts)}")
    for layout, array in zip(layouts, arrays, strict=True):
        if array.shape != layout.official_shape:
            name, expected = layout.official_name, layout.official_shape
            raise CheckpointError(f"official weights: {name} has shape {array.shape}, expected {expected}")
    return {layout.key: layout.from_official(array) for layout, array in zip(layouts, arrays, strict=True)}


def official_from_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: ProteinBertConfig, where: str = "state_dict"
) -> list[FloatArray]:
    """This package's ``state_dict`` as the original's arrays, in its order; float32, C-contiguous.

    Raises:
        CheckpointError: a tensor is missing, unknown, not of the shape that ``config`` asks for, or not
            finite.
    """
    check_shapes({key: tuple(tensor.shape) for key, tensor in state_dict.items()}, config, where)
    for key, tensor in state_dict.items():
        check_finite(tensor, key, where)
    return [layout.to_official(state_dict[layout.key]) for layout in weight_layouts(config)]
