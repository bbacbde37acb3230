"""`embed`: the whole way from sequences to embeddings, for Python and for the command line."""

import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args, overload

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from proteinbert_fast._version import __version__
from proteinbert_fast.data.fasta import Duplicates, Lowercase, check_choice
from proteinbert_fast.data.prefetch import Prefetched
from proteinbert_fast.devices import checked_device
from proteinbert_fast.embedding.hdf5 import Contents, write_output
from proteinbert_fast.embedding.partial import PartialRun, Run
from proteinbert_fast.embedding.pipeline import NUMPY_DTYPE, Embedder, Plan, Window, windows
from proteinbert_fast.embedding.selection import Layers, Per, Pooling, Selection
from proteinbert_fast.embedding.sources import FastaSource, Layout, MemorySource, Scan, open_source
from proteinbert_fast.errors import InputError
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.ops.instruction_sets import kernels_in_use
from proteinbert_fast.weights import DEFAULT_MODEL

logger = logging.getLogger("proteinbert_fast")

Dtype = Literal["auto", "float32", "bfloat16"]
StorageDtype = Literal["float16", "float32"]
Path = str | os.PathLike[str]

_TOKENS_PER_BATCH = {"cpu": 32_768, "cuda": 131_072}


@dataclass(frozen=True)
class Embeddings:
    """Embeddings in memory, in input order.

    ``result[i]`` and ``result["P12345"]`` are the embedding of one protein: (width,) per protein, (n, width)
    per residue.

    Attributes:
        ids: of the proteins.
        lengths: int64 (N,): residues that were embedded.
        embeddings: (N, width) per protein, (sum of lengths, width) per residue.
        offsets: int64 (N + 1,) per residue: protein ``i`` has the rows ``offsets[i]:offsets[i + 1]``. None
            per protein.
        attributes: what made them: model, layers, dtypes and so on.
    """

    ids: list[str]
    lengths: npt.NDArray[np.int64]
    embeddings: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64] | None
    attributes: dict[str, Any]
    _numbers: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: int | str) -> npt.NDArray[Any]:
        """The embedding of one protein, by number or id. KeyError or IndexError if there is none."""
        if isinstance(which, str):
            if not self._numbers:
                # Backwards: of equal ids the first counts.
                self._numbers.update((name, i) for i, name in reversed(list(enumerate(self.ids))))
            which = self._numbers[which]
        which = range(len(self.ids))[which]
        if self.offsets is None:
            embedding: npt.NDArray[Any] = self.embeddings[which]
        else:
            embedding = self.embeddings[self.offsets[which] : self.offsets[which + 1]]
        return embedding


@dataclass(frozen=True)
class EmbedSummary:
    """What a run to a file has done. As text: a readable summary.

    Attributes:
        output: the file.
        records: proteins in it.
        residues: residues that were embedded.
        shape: of the embeddings.
        storage_dtype: of the embeddings.
        bytes: size of the file.
        seconds: of this process, from the first batch to the finished file.
        residues_per_second: of this process.
        resumed: records that an earlier process had done.
        truncated: records that were cut to the maximal length.
        dropped: records left out because an earlier one has their id.
        overflowed: records with a value too large for the storage dtype.
        model: where the weights came from.
        model_sha256: SHA-256 of the weights file, if there is one.
        backend: the back end and why it was chosen.
        device: where it ran.
        dtype: it computed in.
    """

    output: str
    records: int
    residues: int
    shape: tuple[int, int]
    storage_dtype: str
    bytes: int
    seconds: float
    residues_per_second: float
    resumed: int
    truncated: int
    dropped: int
    overflowed: int
    model: str
    model_sha256: str | None
    backend: str
    device: str
    dtype: str

    def __str__(self) -> str:
        rows = [
            ("output", f"{self.output} ({_size(self.bytes)})"),
            ("proteins", f"{self.records:,}"),
            ("residues", f"{self.residues:,}"),
            ("embeddings", f"{self.shape[0]:,} x {self.shape[1]:,} {self.storage_dtype}"),
            ("model", self.model),
            ("model SHA-256", self.model_sha256),
            ("computed", f"in {self.dtype} on {self.device}, back end {self.backend}"),
            (
                "time",
                f"{self.seconds:.1f} s, {self.residues_per_second:,.0f} residues/s" if self.seconds else None,
            ),
            ("resumed", f"{self.resumed:,} proteins were done before" if self.resumed else None),
            (
                "cut",
                f"{self.truncated:,} proteins were longer than the max length" if self.truncated else None,
            ),
            ("left out", f"{self.dropped:,} proteins whose id came before" if self.dropped else None),
            (
                "infinite",
                f"{self.overflowed:,} proteins have values too large for float16" if self.overflowed else None,
            ),
        ]
        return "\n".join(f"{name:<14} {value}" for name, value in rows if value is not None)


@overload
def embed(
    sequences: Path | Iterable[Any],
    output: None = None,
    *,
    model: Path | ProteinBert = ...,
    per: Per = ...,
    pooling: Pooling | None = ...,
    layers: Layers = ...,
    dtype: Dtype = ...,
    storage_dtype: StorageDtype = ...,
    device: str | torch.device | None = ...,
    tokens_per_batch: int | None = ...,
    max_length: int | None = ...,
    lowercase: Lowercase = ...,
    duplicates: Duplicates = ...,
    progress: bool | None = ...,
) -> Embeddings: ...
@overload
def embed(
    sequences: Path | Iterable[Any],
    output: Path,
    *,
    model: Path | ProteinBert = ...,
    per: Per = ...,
    pooling: Pooling | None = ...,
    layers: Layers = ...,
    dtype: Dtype = ...,
    storage_dtype: StorageDtype = ...,
    device: str | torch.device | None = ...,
    tokens_per_batch: int | None = ...,
    max_length: int | None = ...,
    layout: Layout = ...,
    lowercase: Lowercase = ...,
    duplicates: Duplicates = ...,
    resume: bool = ...,
    overwrite: bool = ...,
    allow_different_kernels: bool = ...,
    progress: bool | None = ...,
) -> EmbedSummary: ...
def embed(
    sequences: Path | Iterable[Any],
    output: Path | None = None,
    *,
    model: Path | ProteinBert = DEFAULT_MODEL,
    per: Per = "protein",
    pooling: Pooling | None = None,
    layers: Layers = "last",
    dtype: Dtype = "auto",
    storage_dtype: StorageDtype = "float16",
    device: str | torch.device | None = None,
    tokens_per_batch: int | None = None,
    max_length: int | None = None,
    layout: Layout = "flat",
    lowercase: Lowercase = "other",
    duplicates: Duplicates = "refuse",
    resume: bool = False,
    overwrite: bool = False,
    allow_different_kernels: bool = False,
    progress: bool | None = None,
) -> Embeddings | EmbedSummary:
    """Embeds proteins, in memory or to an HDF5 file. What ``proteinbert-fast embed`` does, from Python.

    All input is looked at before the model runs: bad records, duplicate ids and the like are found at once.

    Args:
        sequences: a FASTA file (a path, or "-" for standard input), a list of `pathlib.Path`, or proteins
            that Python holds: a list of sequences or FASTA records, or a dict from id to sequence. Those are
            taken literally, one residue per character; bare sequences get the ids "0", "1", ...
        output: an HDF5 file to write; None gives the embeddings back.
        model: a name or path for `ProteinBert.from_pretrained`, or a model, which is used where it is. By default
            "proteinbert-swissprot", which comes with this package.
        per: one embedding per "protein" or per "residue". START and END are never part of it.
        pooling: per protein: the "global" state (the default), the "mean" of the residues' local states, or
            "both", global first.
        layers: the "last" block, "all" blocks side by side, the "original" concatenation of every norm and
            the predicted probabilities, or block numbers from 1.
        dtype: what to compute in. "auto" is bfloat16 on CUDA, float32 on CPUs, and the model's own dtype if
            that is not float32.
        storage_dtype: dtype of the embeddings. Values that float16 cannot hold are said and become infinite.
        device: as for torch; None is CUDA if there is a GPU, else the CPU. A model is moved there.
        tokens_per_batch: most packed tokens of a batch, gaps included; a longer protein goes alone.
        max_length: cut longer proteins to their first residues and say so of each. None never cuts.
        layout: of the file: "flat" arrays, or a dataset per protein as in UniProt's embedding files
            ("uniprot").
        lowercase: "upper" reads lower-case letters as residues; "other" as unknown residues, as the original
            does.
        duplicates: "refuse" an id that came before, "keep" both, or keep the "first".
        resume: go on with an interrupted run to this output; without one, start. A complete output is left as
            it is.
        overwrite: replace the output, or an interrupted run to it.
        allow_different_kernels: resume also where the CPU kernels of another instruction set or version have begun.
            Bits differ from there on; the file's attribute `kernels` names all that took part.
        progress: show progress on stderr; None does when that is a terminal.

    Returns:
        `Embeddings`, or the `EmbedSummary` of a run to a file.

    Raises:
        InputError: a sequence, file or option cannot be used.
        CheckpointError: the weights cannot be had.
        BackendError: the device's memory does not suffice.
        ProteinBertError: the output cannot be written.
    """
    options = _Options(
        per=per,
        pooling=pooling,
        layers=layers,
        dtype=dtype,
        storage_dtype=storage_dtype,
        device=_device(device, model),
        tokens_per_batch=tokens_per_batch,
        max_length=max_length,
        layout=layout,
        lowercase=lowercase,
        duplicates=duplicates,
        progress=sys.stderr.isatty() if progress is None else progress,
    )
    if output is None and (resume or overwrite or allow_different_kernels or layout != "flat"):
        raise InputError(
            "resume, overwrite, allow_different_kernels and layout are for an output file, and none was given"
        )
    source = open_source(sequences, lowercase, duplicates, layout)
    source.check()
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(source, FastaSource):
                source.copy_pipes(folder)
            return _to_memory(source, model, options)
    with PartialRun(os.fspath(output), resume=resume, overwrite=overwrite) as partial:
        try:
            if isinstance(source, FastaSource):
                try:
                    source.copy_pipes(partial.folder)
                except OSError as error:
                    raise partial.unwritable(error) from error
            return _to_file(source, model, options, partial, allow_different_kernels)
        except KeyboardInterrupt:
            if partial.begun:
                partial.commit()
                done = partial.records_done
                kept = f"{done:,} records are safe in {partial.folder}; go on with --resume"
                logger.warning("interrupted: %s", kept if done else "no record was done yet")
            raise


@dataclass(frozen=True)
class _Options:
    """What `embed` was asked for, checked as far as is possible without a model."""

    per: Per
    pooling: Pooling | None
    layers: Layers
    dtype: Dtype
    storage_dtype: StorageDtype
    device: torch.device | None
    tokens_per_batch: int | None
    max_length: int | None
    layout: Layout
    lowercase: Lowercase
    duplicates: Duplicates
    progress: bool

    def __post_init__(self) -> None:
        for name, choices in (
            ("dtype", Dtype),
            ("storage_dtype", StorageDtype),
            ("layout", Layout),
            ("lowercase", Lowercase),
            ("duplicates", Duplicates),
        ):
            check_choice(name, getattr(self, name), get_args(choices))
        for name in ("tokens_per_batch", "max_length"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name} must be a positive integer, got {value!r}")
        if self.layout == "uniprot" and self.duplicates == "keep":
            raise InputError("the uniprot layout cannot keep duplicates: each dataset needs a name of its own")


@dataclass(frozen=True)
class _Job:
    """A model, what it shall compute, and how much of it there is."""

    model: ProteinBert
    plan: Plan
    scan: Scan
    options: _Options
    device_name: str
    dtype_name: str
    backend: str

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Residues to embed of each record."""
        most = self.plan.max_length
        return self.scan.lengths if most is None else np.minimum(self.scan.lengths, most)

    @property
    def n_truncated(self) -> int:
        return int((self.lengths < self.scan.lengths).sum())

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of all embeddings together."""
        rows = int(self.lengths.sum()) if self.plan.per_residue else len(self.lengths)
        return rows, self.plan.selection.width

    @property
    def model_name(self) -> str:
        return self.model.checkpoint_source or "a model without a name"

    def describe(self) -> Run:
        """Everything that the embeddings depend on."""
        options = self.options
        run: Run = {
            "version": __version__,
            "torch": torch.__version__,
            "model": self.model_name,
            "model_sha256": self.model.checkpoint_sha256,
            "weights_sha256": _digest(self.model),
            "pretrained": self.model.is_pretrained,
            "device": self.device_name,
            "backend": self.backend.split()[0],
            "dtype": self.dtype_name,
            "storage_dtype": options.storage_dtype,
            **self.plan.selection.describe(),
            "layout": options.layout,
            "max_length": options.max_length,
            "lowercase": options.lowercase,
            "duplicates": options.duplicates,
            "input": self.scan.fingerprint,
        }
        if run["backend"] == "cpu":
            run["kernels"] = kernels_in_use()
        if run["backend"] == "reference":
            # The other back ends give a protein the same bits in any batch.
            run["tokens_per_batch"] = self.plan.tokens_per_batch
        return run

    def attributes(self, run: Run) -> dict[str, Any]:
        """What readers of the embeddings want to know."""
        plain = {key: value for key, value in run.items() if key not in {"input", "tokens_per_batch"}}
        plain["layers"] = json.dumps(run["layers"]).strip('"')
        plain["columns"] = json.dumps(self.plan.selection.columns)
        if self.plan.max_length is not None:
            plain["n_truncated"] = self.n_truncated
        if not self.model.is_pretrained:
            plain["warning"] = "the weights come from no checkpoint: unless trained, they make numbers without meaning"
        return plain

    def stream(self, source: FastaSource | MemorySource, skip: int) -> Prefetched[Window]:
        """The windows after the first ``skip`` records, read and tokenised in the background."""
        gap = self.model.config.reach
        return Prefetched(windows(source.records(), self.plan, gap, logger.warning, skip))


def _to_memory(source: FastaSource | MemorySource, model: Path | ProteinBert, options: _Options) -> Embeddings:
    job = _prepare(source, model, options)
    embeddings = np.empty(job.shape, NUMPY_DTYPE[job.plan.storage])
    ids: list[str] = []
    row = 0
    with _progress(options, "embedding", int(job.lengths.sum())) as count, job.stream(source, 0) as stream:
        embedder = Embedder(job.model, job.plan, count, logger.warning)
        for window in stream:
            for rows in embedder.rows(window):
                embeddings[row : row + len(rows)] = rows
                row += len(rows)
            ids += window.ids
    offsets = np.concatenate(([0], np.cumsum(job.lengths))) if job.plan.per_residue else None
    return Embeddings(ids, job.lengths, embeddings, offsets, job.attributes(job.describe()))


def _to_file(
    source: FastaSource | MemorySource,
    model: Path | ProteinBert,
    options: _Options,
    partial: PartialRun,
    allow_different_kernels: bool,
) -> EmbedSummary:
    job = _prepare(source, model, options)
    complete = partial.begin(job.describe(), allow_different_kernels)
    done = len(job.lengths) if complete else partial.records_done
    started = time.perf_counter()
    n_residues = int(job.lengths.sum())
    n_done = int(job.lengths[:done].sum())
    if not complete:
        with _progress(options, "embedding", n_residues, n_done) as count, job.stream(source, done) as stream:
            embedder = Embedder(job.model, job.plan, count, logger.warning)
            for window in stream:
                for rows in embedder.rows(window):
                    partial.add_rows(rows)
                partial.add_records(window.ids, window.lengths, window.full_lengths, embedder.n_overflowed)
        partial.commit()
    computed = time.perf_counter() - started
    overflowed = sum(shard.n_overflowed for shard in partial.shards)
    if not complete:
        contents = Contents(
            layout=options.layout,
            per_residue=job.plan.per_residue,
            n_records=len(job.lengths),
            n_rows=job.shape[0],
            width=job.shape[1],
            dtype=NUMPY_DTYPE[job.plan.storage],
            truncated=options.max_length is not None,
            attributes=job.attributes(partial.run) | ({"n_overflowed": overflowed} if overflowed else {}),
        )
        with _progress(options, "writing", job.shape[0] * job.plan.row_bytes, unit="B") as count:
            write_output(partial, contents, count)
    seconds = 0.0 if complete else time.perf_counter() - started
    return EmbedSummary(
        output=partial.output,
        records=len(job.lengths),
        residues=n_residues,
        shape=job.shape,
        storage_dtype=options.storage_dtype,
        bytes=os.path.getsize(partial.output),
        seconds=seconds,
        residues_per_second=(n_residues - n_done) / computed,
        resumed=done,
        truncated=job.n_truncated,
        dropped=job.scan.n_dropped,
        overflowed=overflowed,
        model=job.model_name,
        model_sha256=job.model.checkpoint_sha256,
        backend=job.backend,
        device=job.device_name,
        dtype=job.dtype_name,
    )


def _prepare(source: FastaSource | MemorySource, model: Path | ProteinBert, options: _Options) -> _Job:
    """Loads the model, looks through the input, and says what there is to say."""
    if not isinstance(model, ProteinBert):
        model = ProteinBert.from_pretrained(model, device=options.device)
    elif options.device is not None:
        model = model.to(options.device)
    weight = model.token_embedding.weight
    autocast = _autocast(options.dtype, weight)
    selection = Selection.of(model.config, options.per, options.pooling, options.layers)
    default = _TOKENS_PER_BATCH.get(weight.device.type, _TOKENS_PER_BATCH["cpu"])
    storage = torch.float16 if options.storage_dtype == "float16" else torch.float32
    plan = Plan(selection, storage, autocast, options.tokens_per_batch or default, options.max_length)
    with _progress(options, "checking the input", None, unit="B") as count:
        scan = source.scan(count)
    for line in scan.notes:
        logger.warning(line)
    if options.dtype == "auto" and weight.device.type == "cpu" and autocast is None and has_fast_bfloat16():
        logger.info("this CPU computes faster in bfloat16, if that is exact enough for you: dtype bfloat16")
    with plan.computing(weight.device):
        backend = model.backend_report()
    is_cuda = weight.device.type == "cuda"
    device_name = f"cuda ({torch.cuda.get_device_name(weight.device)})" if is_cuda else weight.device.type
    dtype_name = str(autocast or weight.dtype).removeprefix("torch.")
    return _Job(model, plan, scan, options, device_name, dtype_name, backend)


def cpu_abilities() -> Mapping[str, Any]:
    """What torch knows of this CPU; nothing where it is too old to say."""
    ask = getattr(torch.cpu, "get_capabilities", dict)
    return cast(Mapping[str, Any], ask())


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    abilities = cpu_abilities()
    return any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _autocast(dtype: Dtype, weight: torch.Tensor) -> torch.dtype | None:
    own = weight.dtype
    if dtype == "auto":
        return torch.bfloat16 if own == torch.float32 and weight.device.type == "cuda" else None
    wanted = torch.float32 if dtype == "float32" else torch.bfloat16
    if wanted == own:
        return None
    if own != torch.float32:
        raise InputError(f"dtype {dtype}: the model's weights are {own}; convert the model, or use dtype auto")
    return wanted


def _device(device: str | torch.device | None, model: Path | ProteinBert) -> torch.device | None:
    """The device asked for, checked; None where a model is."""
    if device is None:
        if isinstance(model, ProteinBert):
            return None
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return checked_device(device)


def _digest(model: ProteinBert) -> str:
    """SHA-256 of the weights themselves, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


@contextmanager
def _progress(
    options: _Options, what: str, total: int | None, initial: int = 0, unit: str = " residues"
) -> Iterator[Callable[[int], object]]:
    """A progress bar with rate and time left on stderr, or nothing; gives the function to count with."""
    with tqdm(
        desc=what,
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=True,
        disable=not options.progress,
        leave=False,
    ) as bar:
        yield bar.update


def _size(n: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:,.0f} {unit}" if unit == "bytes" else f"{n:,.1f} {unit}"
        n /= 1000
    return f"{n:,.1f} TB"
