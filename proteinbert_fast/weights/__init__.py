"""Weights that come with this package, by name: nothing is fetched for them."""

from pathlib import Path

from proteinbert_fast.errors import CheckpointError

_FOLDER = Path(__file__).resolve().parent

# What each was trained on and what it is worth: the model card, README.md in its folder.
SHIPPED: dict[str, Path] = {"proteinbert-swissprot": _FOLDER / "proteinbert-swissprot"}
DEFAULT_MODEL = "proteinbert-swissprot"


def shipped_directory(name: str) -> Path:
    """The checkpoint directory of weights that come with this package.

    Raises:
        CheckpointError: this installation lacks it.
    """
    directory = SHIPPED[name]
    if not directory.is_dir():
        raise CheckpointError(
            f"{name}: comes with proteinbert_fast, but this installation lacks {directory}: install the package anew"
        )
    return directory
