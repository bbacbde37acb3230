"""Protein sequences to tokens: the vocabulary and the Tokenizer, over the C++ extension.

The 26 tokens are the original's: ``VOCABULARY`` numbers 22 residues 0..21, then come OTHER 22, START 23, END 24
and PAD 25. One token per code point; whatever is not in the vocabulary is OTHER: lower case, B, Z, O, J, ``*``,
``-``, blanks, anything. A protein of n residues is n + 2 tokens, START first and END last. GAP (26) is no token:
it marks the rows between packed proteins.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from proteinbert_fast import _tokenizer
from proteinbert_fast._tokenizer import END, GAP, OTHER, PAD, START, VOCABULARY
from proteinbert_fast.config import VOCABULARY_SIZE
from proteinbert_fast.errors import InputError
from proteinbert_fast.packing import PackedBatch, check_gap
from proteinbert_fast.processors import usable_processors

__all__ = [
    "END",
    "GAP",
    "OTHER",
    "PAD",
    "START",
    "VOCABULARY",
    "VOCABULARY_SIZE",
    "SequenceRecord",
    "Tokenizer",
]

Text = str | bytes | bytearray | memoryview | npt.NDArray[np.uint8]

_NO_RESIDUE = bytes((START, END, PAD, GAP))
_LETTER_OF_TOKEN = bytes.maketrans(bytes(range(OTHER + 1)), f"{VOCABULARY}?".encode())


class SequenceRecord(Protocol):
    """A FASTA record, or anything else that has a name and a sequence."""

    @property
    def id(self) -> str: ...

    @property
    def sequence(self) -> Text: ...


class Tokenizer:
    """Turns sequences into a PackedBatch, in C++ and without the GIL.

    A sequence is a str; or UTF-8 text in bytes, a bytearray, a memoryview or a numpy uint8 array (codes of letters,
    not tokens); or an object with ``id`` and ``sequence``.

    Args:
        gap: gap rows before, between and after the proteins; the model needs 20.
        threads: most threads of a call, one per million rows; None allows one for each processor that this
            process may use. The result does not depend on it.
    """

    def __init__(self, gap: int = 20, threads: int | None = None) -> None:
        check_gap(gap)
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, got {threads}")
        self.gap = gap
        self.threads = threads or usable_processors()

    def __call__(
        self,
        sequences: Text | SequenceRecord | Iterable[Text | SequenceRecord],
        ids: Sequence[str] | None = None,
    ) -> PackedBatch:
        """Tokenises one sequence, or any iterable of them except dicts and sets, whose order says nothing.

        Args:
            sequences: one sequence or many; mixed kinds are fine.
            ids: names of the proteins; when None, the ``id`` of the records if all of them are records.

        Raises:
            TypeError: a sequence is something else; names the record.
            UnicodeDecodeError: bytes that are not UTF-8, as ``bytes.decode``; its note names the record.
            InputError: the number of ids is not that of the sequences.
        """
        return self._batch(_tokenizer.pack(sequences, self.gap, self.threads), ids)

    def windows(
        self,
        sequences: Text | SequenceRecord | Iterable[Text | SequenceRecord],
        length: int,
        seed: int,
        ids: Sequence[str] | None = None,
        indices: Sequence[int] | npt.NDArray[np.integer] | None = None,
    ) -> PackedBatch:
        """Tokenises, and cuts proteins of more than ``length`` tokens to a random window of ``length`` tokens.

        As in the original's pretraining, every window over START, residues, END is equally probable, so either
        end or both can be missing: that is how the model knows that it sees a part.

        The window of record ``i`` is a function of ``seed``, ``i`` and its number of tokens alone. It begins at
        the first of ``draw(k) = mix(key + k) & mask``, k = 0, 1, ..., that is not beyond the last possible
        start, where ``mix`` is the splitmix64 step, ``key = mix(mix(seed) ^ i)``, and ``mask`` has all the bits
        below the highest of the last possible start, and that one.

        Args:
            sequences: as in a call.
            length: most tokens of a protein, at least 1.
            seed: 0..2**64 - 1.
            ids: names of the proteins, as in a call.
            indices: index of each record in the whole data set, from 0; its place in ``sequences`` when None.

        Raises:
            TypeError, UnicodeDecodeError: as in a call.
            InputError: length, seed or indices are out of range, or the indices are too many or too few.
        """
        if length < 1:
            raise InputError(f"windows: length must be at least 1 token, got {length}")
        if not 0 <= seed < 2**64:
            raise InputError(f"windows: seed must be in 0..2**64 - 1, got {seed}")
        places: npt.NDArray[np.int64] | None = None
        if indices is not None:
            given = np.asarray(indices)
            if given.ndim != 1 or (given.size and (given.dtype.kind not in "iu" or given.min() < 0)):
                raise InputError("windows: indices must be integers from 0, one per sequence")
            places = given.astype(np.int64)
        return self._batch(_tokenizer.windows(sequences, length, seed, places, self.gap, self.threads), ids)

    def tokenize(self, sequence: str | bytes) -> npt.NDArray[np.uint8]:
        """Tokens of one sequence, START and END included: the original's ``tokenize_seq``, refusals included.

        Raises:
            TypeError: the sequence is neither str nor bytes.
            UnicodeDecodeError: bytes that are not UTF-8.
        """
        if not isinstance(sequence, str | bytes):
            raise TypeError(f"Unexpected sequence type: {type(sequence)}")
        return _tokenizer.pack(sequence, 0, self.threads)[0]

    def tokenize_padded(self, sequences: Iterable[str | bytes], length: int) -> torch.Tensor:
        """Tokens below each other, filled up with PAD to ``length``: the original's ``tokenize_seqs``.

        As there, nothing is cut: more tokens than ``length`` pass where all rows come out equally long.

        Returns:
            int32 tensor (batch, length), or (0,) for no sequences.

        Raises:
            TypeError, UnicodeDecodeError: as ``tokenize``.
            InputError: rows would differ in length.
        """
        texts = list(sequences)
        for text in texts:
            if not isinstance(text, str | bytes):
                raise TypeError(f"Unexpected sequence type: {type(text)}")
        if not texts:
            return torch.empty(0, dtype=torch.int32)
        batch = self(texts)
        widths = np.maximum(batch.host_lengths, length)
        if widths.min() != widths.max():
            i = int(widths.argmax())
            raise InputError(f"record {i} has {widths[i]} tokens, more than the length of {length}")
        return batch.to_padded(length=int(widths[0])).int()

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.integer] | torch.Tensor) -> str:
        """The residues of a row of tokens: OTHER is ``?``; START, END, PAD and GAP are no residues and left out.

        Raises:
            InputError: not integers 0..26 in one dimension.
        """
        values = np.asarray(tokens.cpu() if isinstance(tokens, torch.Tensor) else tokens)
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            raise InputError(f"decode: tokens must be integers (n,), got {values.dtype} {values.shape}")
        if values.size and (values.min() < 0 or values.max() > GAP):
            raise InputError(f"decode: tokens are 0..{GAP}, got {values.min()}..{values.max()}")
        return values.astype(np.uint8).tobytes().translate(_LETTER_OF_TOKEN, _NO_RESIDUE).decode("ascii")

    def _batch(
        self,
        packed: "_tokenizer.Packed",
        ids: Sequence[str] | None,
    ) -> PackedBatch:
        tokens, starts, lengths, own_ids = packed
        # A batch made while embedding may be trained on later: never inference tensors.
        with torch.inference_mode(False):
            return PackedBatch._trusted(
                torch.from_numpy(tokens), lengths, self.gap, own_ids if ids is None else ids, starts
            )
