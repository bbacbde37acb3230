"""Checkpoints: the original's pickle, config.json with model.safetensors, published names and the hub.

Nothing read here can run code, and everything is checked before it is used.
"""

from proteinbert_fast.checkpoints.directories import write_directory, write_single_file
from proteinbert_fast.checkpoints.official import read_official, write_official
from proteinbert_fast.checkpoints.published import PUBLISHED, PublishedCheckpoint, is_offline
from proteinbert_fast.checkpoints.resolve import load_pretrained, save_pretrained
from proteinbert_fast.checkpoints.values import GoTerm, LoadedCheckpoint, OptimizerState

__all__ = [
    "PUBLISHED",
    "GoTerm",
    "LoadedCheckpoint",
    "OptimizerState",
    "PublishedCheckpoint",
    "is_offline",
    "load_pretrained",
    "read_official",
    "save_pretrained",
    "write_directory",
    "write_official",
    "write_single_file",
]
