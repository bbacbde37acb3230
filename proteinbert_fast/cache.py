"""Where files are kept that can be made or fetched again."""

import os
from pathlib import Path


def cache_directory(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder: as said, or PROTEINBERT_FAST_CACHE, or ~/.cache/proteinbert_fast. It may not exist yet."""
    if cache_dir is None:
        cache_dir = os.environ.get("PROTEINBERT_FAST_CACHE") or Path("~/.cache/proteinbert_fast")
    return Path(cache_dir).expanduser()
