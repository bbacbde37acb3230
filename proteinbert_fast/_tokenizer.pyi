from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

VOCABULARY: Final = "ACDEFGHIKLMNPQRSTUVWXY"
OTHER: Final = 22
START: Final = 23
END: Final = 24
PAD: Final = 25
GAP: Final = 26

# Names of the translation kernels that this processor can run, fastest first.
kernels: tuple[str, ...]

# Rows, first row of each protein, tokens of each protein, ids of the records if all have one.
Packed: TypeAlias = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64], tuple[str, ...] | None]

def pack(sequences: object, gap: int, threads: int, kernel: str = "") -> Packed: ...
def windows(
    sequences: object,
    length: int,
    seed: int,
    indices: npt.NDArray[np.int64] | None,
    gap: int,
    threads: int,
    kernel: str = "",
) -> Packed: ...
def pack_tokens(
    tokens: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    order: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    gap: int,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]: ...
