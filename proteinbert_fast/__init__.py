"""ProteinBERT, fast: embeddings of whole proteomes and very long proteins, equal to the published model's.

    from proteinbert_fast import ProteinBert, Tokenizer

    model = ProteinBert.from_pretrained("proteinbert-swissprot")
    out = model(Tokenizer()(["MKTAYIAKQR"]))
    out.local[0], out.global_state

Names load when first used, so that importing the package is quick and touches no GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from proteinbert_fast._version import __version__

if TYPE_CHECKING:
    from proteinbert_fast.config import ProteinBertConfig as ProteinBertConfig
    from proteinbert_fast.embedding import embed as embed
    from proteinbert_fast.errors import BackendError as BackendError
    from proteinbert_fast.errors import CheckpointError as CheckpointError
    from proteinbert_fast.errors import InputError as InputError
    from proteinbert_fast.errors import NonFiniteError as NonFiniteError
    from proteinbert_fast.errors import ProteinBertError as ProteinBertError
    from proteinbert_fast.graphs import GraphedForward as GraphedForward
    from proteinbert_fast.model import ProteinBert as ProteinBert
    from proteinbert_fast.ops.prepared import forget_prepared_weights as forget_prepared_weights
    from proteinbert_fast.outputs import PaddedOutput as PaddedOutput
    from proteinbert_fast.outputs import ProteinBertOutput as ProteinBertOutput
    from proteinbert_fast.packing import PackedBatch as PackedBatch
    from proteinbert_fast.tokenizer import Tokenizer as Tokenizer

_HOMES = {
    "BackendError": "errors",
    "CheckpointError": "errors",
    "GraphedForward": "graphs",
    "InputError": "errors",
    "NonFiniteError": "errors",
    "PackedBatch": "packing",
    "PaddedOutput": "outputs",
    "ProteinBert": "model",
    "ProteinBertConfig": "config",
    "ProteinBertError": "errors",
    "ProteinBertOutput": "outputs",
    "Tokenizer": "tokenizer",
    "embed": "embedding",
    "forget_prepared_weights": "ops.prepared",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
