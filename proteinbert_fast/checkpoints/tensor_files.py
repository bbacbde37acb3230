"""safetensors files: the weights of a model, and the state of its optimiser.

``model.safetensors`` carries the sizes in its metadata, so that the file alone is a complete checkpoint. The
same tensors always give the same bytes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from proteinbert_fast.checkpoints.files import one_line, read_beginning
from proteinbert_fast.checkpoints.foreign import foreign_model, refuse_foreign_file
from proteinbert_fast.checkpoints.layouts import check_finite, check_shapes
from proteinbert_fast.checkpoints.restricted_pickle import shown
from proteinbert_fast.checkpoints.values import OptimizerState
from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.errors import CheckpointError, InputError

# safetensors' names of the types that weights may have.
WEIGHT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def parse_config(text: str, where: str, extra_keys: frozenset[str] = frozenset()) -> ProteinBertConfig:
    """Sizes from a JSON object that holds exactly them, and perhaps some of ``extra_keys``.

    Raises:
        CheckpointError: it is not such an object, or a size is missing, unknown or impossible.
    """
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: holds no JSON object, expected the sizes of a model")
    model_type = content.get("model_type", "proteinbert")
    if model_type != "proteinbert":
        model_type = shown(model_type) if isinstance(model_type, str) else "no text"
        raise CheckpointError(f"{where}: model_type is {model_type}, this is another model than ProteinBERT")
    try:
        return ProteinBertConfig.from_dict({key: content[key] for key in content.keys() - extra_keys})
    except InputError as error:
        raise CheckpointError(f"{where}: {one_line(error)}") from error


def sizes_in_model_file(path: Path) -> ProteinBertConfig | None:
    """The sizes in a weights file's metadata; None where it has none.

    Raises:
        CheckpointError: the file cannot be read, is damaged or of another model.
    """
    with _opened(path) as file:
        if other := foreign_model(file.keys()):
            raise CheckpointError(f"{path}: {other}")
        embedded = (file.metadata() or {}).get("config")
        return None if embedded is None else parse_config(embedded, f"{path} (metadata)")


def read_model_file(path: Path, config: ProteinBertConfig) -> dict[str, torch.Tensor]:
    """Weights of a model of these sizes; sizes in the file's own metadata, if any, must be the same.

    Raises:
        CheckpointError: the file cannot be read, is damaged or of another model, or a tensor is missing,
            unknown, or of a wrong shape, type or value.
    """
    own = sizes_in_model_file(path)
    if own is not None and own != config:
        raise CheckpointError(f"{path}: its sizes are not those of the config.json beside it")
    with _opened(path) as file:
        return _tensors(file, path, config, "", WEIGHT_TYPES)


def read_optimizer_file(path: Path, config: ProteinBertConfig, weights_sha256: str) -> OptimizerState:
    """Optimiser state written by :func:`optimizer_file` for the weights file of that SHA-256.

    Raises:
        CheckpointError: the file cannot be read, is damaged, belongs to other weights, or holds wrong
            tensors.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("weights_sha256") != weights_sha256:
            raise CheckpointError(f"{path}: this optimiser state belongs to other weights than those beside it")
        iteration = metadata.get("iteration", "")
        if not (iteration.isascii() and iteration.isdigit() and len(iteration) < 19):
            raise CheckpointError(f"{path}: iteration is {shown(iteration)}, expected a number")
        moments = [_tensors(file, path, config, which, {"F32": torch.float32}) for which in ("first.", "second.")]
    for key, moment in moments[1].items():
        if moment.numel() and moment.min() < 0:
            raise CheckpointError(f"{path}: second.{key} holds negative values, expected means of squares")
    return OptimizerState(int(iteration), *moments)


def model_file(config: ProteinBertConfig, state_dict: Mapping[str, torch.Tensor], where: str) -> Iterator[bytes]:
    """The bytes of a weights file, in pieces.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of a wrong shape, type or value.
    """
    check_shapes({key: tuple(tensor.shape) for key, tensor in state_dict.items()}, config, where)
    for key, tensor in state_dict.items():
        if tensor.dtype not in WEIGHT_TYPES.values():
            raise CheckpointError(f"{where}: {key} is {tensor.dtype}, expected float32, float16 or bfloat16")
        check_finite(tensor, key, where)
    sizes = json.dumps(config.to_dict())
    return _serialise(state_dict, {"format": "pt", "model_type": "proteinbert", "config": sizes})


def optimizer_file(
    config: ProteinBertConfig, state: OptimizerState, weights_sha256: str, where: str
) -> Iterator[bytes]:
    """The bytes of an optimiser file, in pieces; it names the weights file that it belongs to.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of a wrong shape or value.
    """
    tensors = {}
    for which, moments in (("first.", state.first_moments), ("second.", state.second_moments)):
        check_shapes(
            {key: tuple(tensor.shape) for key, tensor in moments.items()},
            config,
            f"{where}: {which[:-1]} moments",
        )
        for key, tensor in moments.items():
            check_finite(tensor, which + key, where)
            tensors[which + key] = tensor.float()
    metadata = {"format": "pt", "iteration": str(state.iteration), "weights_sha256": weights_sha256}
    return _serialise(tensors, metadata)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; errors of the library, also those inside the block, become one line."""
    beginning = read_beginning(path)
    refuse_foreign_file(path, beginning)
    if beginning[:1] == b"\x80" and beginning[8:9] != b"{":
        raise CheckpointError(f"{path}: this is a pickle, not a safetensors file; give it the suffix .pkl")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {one_line(error)}") from error


def _tensors(
    file: Any, path: Path, config: ProteinBertConfig, prefix: str, types: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """The tensors whose names start with ``prefix``, without it, checked before they are read."""
    names = [name for name in list(file.keys()) if name.startswith(prefix)]
    slices = {name.removeprefix(prefix): file.get_slice(name) for name in names}
    check_shapes({key: tuple(piece.get_shape()) for key, piece in slices.items()}, config, str(path))
    for key, piece in slices.items():
        if piece.get_dtype() not in types:
            raise CheckpointError(f"{path}: {prefix}{key} is {piece.get_dtype()}, expected {' or '.join(types)}")
    # Copied, so that the tensors outlive the file and do not change with it.
    tensors = {key: file.get_tensor(prefix + key).clone() for key in slices}
    for key, tensor in tensors.items():
        check_finite(tensor, prefix + key, str(path))
    return tensors


def _serialise(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> Iterator[bytes]:
    """safetensors bytes with the metadata in a fixed order; the library's own order changes with each run."""
    content = safetensors.torch.save(
        {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()},
        metadata=metadata,
    )
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    yield content[8 + length :]
