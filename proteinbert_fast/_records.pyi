from typing import Literal

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

class RecordReader:
    def __init__(
        self, format: Literal["uniref-xml", "uniprot-xml", "uniprot-text"], name: str, tokens: bytes
    ) -> None: ...
    def feed(self, piece: bytes, last: bool) -> tuple[Bytes, Longs, Bytes, Longs, Ints, Longs, Longs]: ...

def hash_texts(texts: Bytes, offsets: Longs, k0: int, k1: int) -> npt.NDArray[np.uint64]: ...
def gather_bytes(values: Bytes, offsets: Longs, order: Longs) -> tuple[Bytes, Longs]: ...
def gather_ints(values: Ints, offsets: Longs, order: Longs) -> tuple[Ints, Longs]: ...
def close_terms(
    numbers: Ints,
    offsets: Longs,
    record_of: Longs,
    n_records: int,
    index_of_number: Ints,
    number_of_term: Longs,
    ancestors: Ints,
    ancestor_offsets: Longs,
) -> tuple[Ints, Longs, int, int, Ints]: ...
