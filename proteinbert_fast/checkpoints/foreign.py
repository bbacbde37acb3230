"""What files of other programs and models look like, so that an error line can say what it was given."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

from proteinbert_fast.errors import CheckpointError

HOW_TO_SAVE = "save its state_dict with safetensors instead"
PORT = (
    "protein-bert-pytorch is another model (null key and value, output projection, other widths): "
    "its weights do not fit ProteinBERT, nor the official ones it"
)

# Tensors that only the named model has, by the end of their names: training wrappers put a prefix before.
FOREIGN_TENSORS = {
    "to_global_emb.weight": PORT,
    "to_token_logits.weight": PORT,
    "global_attend_local.null_key": PORT,
    "embeddings.word_embeddings.weight": "this is a BERT of transformers (such as ProtBert), not ProteinBERT",
}

_BEGINNINGS = {
    b"version https://git-lfs": "a git-lfs pointer, not the weights; fetch them with `git lfs pull`",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras .h5); only the original's .pkl and .safetensors are read",
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"\xfd7zXZ\x00": "an xz file; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first",
    b"BZh": "a bzip2 file; unpack it first",
    b"\x93NUMPY": "a numpy .npy file; only the original's .pkl and .safetensors are read",
}

# The number that torch.save wrote first before its files were zip archives.
_OLD_TORCH_MAGIC = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


def refuse_foreign_file(path: Path, beginning: bytes) -> None:
    """Say what a file is when its first bytes tell that it is neither pickle nor safetensors.

    Raises:
        CheckpointError: it is a file of another program.
    """
    for magic, what in _BEGINNINGS.items():
        if beginning.startswith(magic):
            raise CheckpointError(f"{path}: this is {what}")
    if beginning.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{path}: {_describe_zip(path)}")
    if beginning.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise CheckpointError(f"{path}: this is a web page, not the weights; the download went wrong")
    if beginning[:1] == b"\x80" and _OLD_TORCH_MAGIC in beginning[:64]:
        raise CheckpointError(f"{path}: this is an old torch.save file, a pickle that could run code; {HOW_TO_SAVE}")


def foreign_model(tensor_names: Iterable[str]) -> str | None:
    """What other model has these tensors, in one phrase; None where none is known."""
    for name in tensor_names:
        for ending, what in FOREIGN_TENSORS.items():
            if name.endswith(ending):
                return what
    return None


def _describe_zip(path: Path) -> str:
    """Tell a torch.save archive from other zip files; its pickle is searched as bytes, never loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.endswith("/data.pkl")]
            if "model.weights.h5" in names:
                return "this is a Keras .keras file; only the original's .pkl and .safetensors are read"
            if any(name.endswith(".npy") for name in names):
                return "this is a numpy .npz file; only the original's .pkl and .safetensors are read"
            if not pickles:
                return "this is a zip archive, not a checkpoint"
            with archive.open(pickles[0]) as member:
                content = member.read(16 * 2**20)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        return "this is a damaged zip archive, not a checkpoint"
    refused = f"this is a torch.save file, a pickle that could run code; {HOW_TO_SAVE}"
    for ending, what in FOREIGN_TENSORS.items():
        if ending.encode() in content:
            return f"{refused}; and {what}"
    return refused
