"""The original's checkpoint: a pickle of (number of GO terms, weights, optimiser weights), read and written.

Reading runs no code of the file (see ``restricted_pickle``) and checks all of it before a tensor is made.
Writing gives the bytes that the original's own ``pickle.dump`` gives under numpy 1, protocol 3; its
``pickle.load`` reads them.
"""

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from proteinbert_fast.checkpoints.files import MAX_BYTES, read_bytes, write_atomically
from proteinbert_fast.checkpoints.foreign import refuse_foreign_file
from proteinbert_fast.checkpoints.layouts import (
    ARRAYS_AFTER_BLOCKS,
    ARRAYS_BEFORE_BLOCKS,
    ARRAYS_PER_BLOCK,
    OFFICIAL_WIDE_DILATION,
    FloatArray,
    blocks_in,
    official_from_state_dict,
    official_names,
    state_dict_from_official,
    weight_layouts,
)
from proteinbert_fast.checkpoints.restricted_pickle import (
    NUMBER_TYPE_NAMES,
    ArrayContent,
    ScalarContent,
    UnsafePickleError,
    Value,
    describe,
    read_pickle,
)
from proteinbert_fast.checkpoints.values import LoadedCheckpoint, OptimizerState
from proteinbert_fast.config import VOCABULARY_SIZE, ProteinBertConfig
from proteinbert_fast.errors import CheckpointError, InputError

MAX_ANNOTATIONS = 10_000_000


def read_official(path: Path, *, optimizer: bool = True) -> LoadedCheckpoint:
    """Read and check a checkpoint of the original; nothing in the file is run.

    The sizes come from the shapes of the arrays; the dilation of the wide convolution (5) is in no array.

    Args:
        path: the pickle, of protocol 3 or 4.
        optimizer: whether to return the optimiser state; it is checked in any case.

    Raises:
        CheckpointError: the file cannot be read, is no such pickle, or holds arrays of a wrong number, shape,
            type or value; the line names the file, the array by its official name, and what was expected.
    """
    data = read_bytes(path)
    refuse_foreign_file(path, data[:1024])
    try:
        value = read_pickle(data)
    except UnsafePickleError as error:
        raise CheckpointError(
            f"{path}: not an official ProteinBERT pickle, and nothing in it was run: {error}"
        ) from None
    checked = _Checked(path, value)
    return LoadedCheckpoint(
        config=checked.config,
        state_dict=state_dict_from_official(checked.weights, checked.config),
        sha256=hashlib.sha256(data).hexdigest(),
        source=str(path.resolve()),
        optimizer_state=checked.optimizer_state() if optimizer else None,
    )


class _Checked:
    """The three parts of an official pickle, checked on construction, as views of the file's bytes."""

    def __init__(self, path: Path, value: Value) -> None:
        self.path = path
        if not isinstance(value, tuple) or len(value) != 3:
            found = f"a tuple of {len(value)}" if isinstance(value, tuple) else describe(value)
            self.fail(f"holds {found}, expected a tuple of 3: number of GO terms, weights, optimiser weights")
        n_annotations, weights, optimizer = value
        if not isinstance(n_annotations, int) or isinstance(n_annotations, bool):
            self.fail(f"starts with {describe(n_annotations)}, expected the number of GO terms")
        if not 1 <= n_annotations <= MAX_ANNOTATIONS:
            self.fail(f"number of GO terms is {n_annotations}, expected 1 to {MAX_ANNOTATIONS:,}")
        if not isinstance(weights, list):
            self.fail(f"weights are {describe(weights)}, expected a list of arrays")
        self.config, names = self.sizes(n_annotations, weights)
        shapes = [layout.official_shape for layout in weight_layouts(self.config)]
        self.weights = [
            self.numbers(item, name, shape) for item, name, shape in zip(weights, names, shapes, strict=True)
        ]
        self.iteration: int | None = None
        self.moments: list[list[FloatArray]] = []
        if optimizer is not None:
            self.check_optimizer(optimizer, names, shapes)

    def fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {reason}")

    def sizes(self, n_annotations: int, weights: list[Value]) -> tuple[ProteinBertConfig, list[str]]:
        """The sizes that the shapes of a few arrays tell, and the names of all arrays."""
        n_blocks = blocks_in(len(weights))
        if n_blocks is None:
            fixed = ARRAYS_BEFORE_BLOCKS + ARRAYS_AFTER_BLOCKS
            self.fail(f"{len(weights)} weight arrays, expected {fixed} + {ARRAYS_PER_BLOCK} for each block")
        names = official_names(n_blocks)

        def shape(name: str, form: str) -> tuple[int, ...]:
            found = self.array(weights[names.index(name)], name).shape
            if len(found) != len(form.split(",")) or not all(found):
                self.fail(f"{name} has shape {found}, expected ({form})")
            return found

        rows, d_global = shape("dense-global-input/kernel", "GO terms, global")
        if rows != n_annotations:
            self.fail(f"dense-global-input/kernel has {rows:,} rows, but there are {n_annotations:,} GO terms")
        tokens, d_local = shape("embedding-seq-input/embeddings", "tokens, local")
        if tokens != VOCABULARY_SIZE:
            self.fail(f"embedding-seq-input/embeddings has {tokens:,} rows, expected {VOCABULARY_SIZE}")
        kernel_size = shape("narrow-conv-block1/kernel", "taps, local, local")[0]
        n_heads, _, d_key = shape("global-attention-block1/Wq", "heads, global, key")
        try:
            config = ProteinBertConfig(
                n_annotations=n_annotations,
                d_local=d_local,
                d_global=d_global,
                n_blocks=n_blocks,
                n_heads=n_heads,
                d_key=d_key,
                kernel_size=kernel_size,
                wide_dilation=OFFICIAL_WIDE_DILATION,
            )
        except InputError as error:
            self.fail(f"the shapes of its arrays fit no model: {error}")
        return config, names

    def array(self, item: Value, name: str) -> ArrayContent:
        if not isinstance(item, ArrayContent):
            self.fail(f"{name} is {describe(item)}, expected a float32 array")
        if item.data is None:
            self.fail(f"{name} has no content, expected a float32 array")
        if item.code != "f4":
            self.fail(f"{name} is {NUMBER_TYPE_NAMES[item.code]}, expected float32")
        return item

    def numbers(self, item: Value, name: str, shape: tuple[int, ...]) -> FloatArray:
        """A read-only float32 array over the file's bytes."""
        content = self.array(item, name)
        if content.shape != shape:
            self.fail(f"{name} has shape {content.shape}, expected {shape}")
        assert content.data is not None
        flat = np.frombuffer(content.data, dtype="<f4")
        if bad := int(np.count_nonzero(~np.isfinite(flat))):
            self.fail(f"{name} holds {bad:,} NaN or infinite values, expected numbers")
        return flat.reshape(shape, order="F" if content.fortran_order else "C")

    def check_optimizer(self, optimizer: Value, names: list[str], shapes: list[tuple[int, ...]]) -> None:
        if not isinstance(optimizer, list):
            self.fail(f"optimiser weights are {describe(optimizer)}, expected a list or None")
        n = len(names)
        if len(optimizer) != 1 + 2 * n:
            self.fail(f"{len(optimizer)} optimiser weights, expected {1 + 2 * n}: iteration and 2 for each weight")
        iteration = optimizer[0]
        if not isinstance(iteration, ScalarContent) or iteration.code != "i8":
            number = iteration.code if isinstance(iteration, ScalarContent) else None
            what = describe(iteration) if number is None else NUMBER_TYPE_NAMES[number]
            self.fail(f"optimiser iteration is {what}, expected an int64 scalar")
        self.iteration = int.from_bytes(iteration.data, "little", signed=True)
        if self.iteration < 0:
            self.fail(f"optimiser iteration is {self.iteration}, expected 0 or more")
        for which, items in (("first", optimizer[1 : n + 1]), ("second", optimizer[n + 1 :])):
            moments = [
                self.numbers(item, f"{which} moment of {name}", shape)
                for item, name, shape in zip(items, names, shapes, strict=True)
            ]
            self.moments.append(moments)
        for name, moment in zip(names, self.moments[1], strict=True):
            if moment.size and moment.min() < 0:
                self.fail(f"second moment of {name} holds negative values, expected means of squares")

    def optimizer_state(self) -> OptimizerState | None:
        if self.iteration is None:
            return None
        first, second = (state_dict_from_official(moments, self.config) for moments in self.moments)
        return OptimizerState(self.iteration, first, second)


def write_official(path: Path, checkpoint: LoadedCheckpoint) -> str:
    """Write a checkpoint as the original's pickle, which its ``load_pretrained_model_from_dump`` reads.

    Weights of another float type become float32. Without optimiser state the third part is None, as in the
    original. Tensors must be those of ``checkpoint.config``. The file is complete or absent. Returns its
    SHA-256 in hex.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of a wrong shape or value, the original cannot hold
            the sizes, or the file cannot be written.
    """
    config = checkpoint.config
    if config.wide_dilation != OFFICIAL_WIDE_DILATION:
        raise CheckpointError(
            f"{path}: the original's format has no place for wide_dilation {config.wide_dilation}; "
            f"it always means {OFFICIAL_WIDE_DILATION}"
        )
    state = checkpoint.optimizer_state
    weights = official_from_state_dict(checkpoint.state_dict, config)
    moments: list[FloatArray] | None = None
    if state is not None:
        first = official_from_state_dict(state.first_moments, config)
        moments = first + official_from_state_dict(state.second_moments, config)
    if sum(array.nbytes + 128 for array in (*weights, *(moments or ()))) > MAX_BYTES:
        raise CheckpointError(f"{path}: over {MAX_BYTES:,} bytes, more than such a file can hold")
    iteration = None if state is None else state.iteration
    return write_atomically(path, _OfficialPickle().pieces(config.n_annotations, weights, iteration, moments))


class _OfficialPickle:
    """Writes opcodes as Python's pickler does for numpy 1 arrays under protocol 3, memo numbers included.

    numpy's own pickling is not used because numpy 2 writes ``numpy._core``, which the numpy that the original
    runs on does not know; every numpy knows ``numpy.core``.
    """

    def __init__(self) -> None:
        self.numbers: dict[object, int] = {}

    def put(self, key: object | None = None) -> bytes:
        """The opcode that numbers the value just written; ``key`` finds it again."""
        number = len(self.numbers)
        self.numbers[object() if key is None else key] = number
        return b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)

    def once(self, key: str, opcodes: bytes) -> bytes:
        """``opcodes`` the first time, and the number of that value each later time."""
        if key not in self.numbers:
            return opcodes + self.put(key)
        number = self.numbers[key]
        return b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)

    def name(self, module: str, name: str) -> bytes:
        return self.once(f"{module} {name}", f"c{module}\n{name}\n".encode())

    def text(self, text: str) -> bytes:
        return self.once(f"text {text}", b"X" + struct.pack("<I", len(text)) + text.encode())

    @staticmethod
    def integer(value: int) -> bytes:
        if 0 <= value < 256:
            return b"K" + bytes([value])
        return b"M" + struct.pack("<H", value) if 0 <= value < 65536 else b"J" + struct.pack("<i", value)

    def content(self, data: bytes) -> bytes:
        head = b"C" + bytes([len(data)]) if len(data) < 256 else b"B" + struct.pack("<I", len(data))
        return head + data + self.put()

    def number_type(self, code: str) -> bytes:
        if f"type {code}" in self.numbers:
            return self.once(f"type {code}", b"")
        made = self.name("numpy", "dtype") + self.text(code) + b"\x89\x88\x87" + self.put() + b"R"
        made += self.put(f"type {code}")
        state = b"(" + self.integer(3) + self.text("<") + b"NNN" + self.integer(-1) * 2 + self.integer(0) + b"t"
        return made + state + self.put() + b"b"

    def array(self, array: FloatArray) -> bytes:
        made = self.name("numpy.core.multiarray", "_reconstruct") + self.name("numpy", "ndarray")
        made += self.integer(0) + b"\x85" + self.put() + self.once("array letter", b"C\x01b") + b"\x87" + self.put()
        made += b"R" + self.put()
        made += b"(" + self.integer(1) + b"".join(map(self.integer, array.shape))
        made += bytes([0x84 + array.ndim]) + self.put()
        made += self.number_type("f4") + b"\x89"
        made += self.content(array.astype("<f4").tobytes())
        return made + b"t" + self.put() + b"b"

    def scalar(self, value: int) -> bytes:
        made = self.name("numpy.core.multiarray", "scalar") + self.number_type("i8")
        made += self.content(struct.pack("<q", value))
        return made + b"\x86" + self.put() + b"R" + self.put()

    def pieces(
        self,
        n_annotations: int,
        weights: list[FloatArray],
        iteration: int | None,
        moments: list[FloatArray] | None,
    ) -> Iterator[bytes]:
        yield b"\x80\x03" + self.integer(n_annotations) + b"]" + self.put() + b"("
        for array in weights:
            yield self.array(array)
        yield b"e"
        if iteration is None or moments is None:
            yield b"N"
        else:
            yield b"]" + self.put() + b"("
            yield self.scalar(iteration)
            for array in moments:
                yield self.array(array)
            yield b"e"
        yield b"\x87" + self.put() + b"."
