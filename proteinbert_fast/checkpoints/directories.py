"""A checkpoint as a directory: config.json, model.safetensors, and optimiser state and GO terms when known.

This is also how a repository on the Hugging Face hub holds a model.
"""

import csv
import io
import json
import re
from pathlib import Path

from proteinbert_fast._version import __version__
from proteinbert_fast.checkpoints.files import new_directory, read_bytes, sha256_of, write_atomically
from proteinbert_fast.checkpoints.restricted_pickle import shown
from proteinbert_fast.checkpoints.tensor_files import (
    model_file,
    optimizer_file,
    parse_config,
    read_model_file,
    read_optimizer_file,
    sizes_in_model_file,
)
from proteinbert_fast.checkpoints.values import GoTerm, LoadedCheckpoint
from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
GO_TERMS_FILE = "go_terms.tsv"

_GO_TERMS_HEADER = ["index", "go_id", "name"]
_GO_ID = re.compile(r"GO:\d{7}", re.ASCII)

_CONFIG_KEYS_BESIDE_SIZES = frozenset({"model_type", "architectures", "library_name", "library_version"})
_MAX_CONFIG_BYTES = 2**20
_MAX_GO_TERMS_BYTES = 2**26


def read_directory(directory: Path, *, optimizer: bool = True) -> LoadedCheckpoint:
    """Read and check a checkpoint directory.

    Raises:
        CheckpointError: a file is missing, damaged or of another model, or the files do not belong together.
    """
    for name, what in (
        ("saved_model.pb", "a Keras SavedModel"),
        ("pytorch_model.bin", "a PyTorch pickle, which could run code"),
        ("tf_model.h5", "a Keras HDF5 file"),
    ):
        if (directory / name).exists() and not (directory / WEIGHTS_FILE).exists():
            raise CheckpointError(
                f"{directory}: holds {what} ({name}); only {CONFIG_FILE} with {WEIGHTS_FILE}, "
                'or the original\'s .pkl (see "proteinbert"), are read'
            )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).exists():
            pickles = sorted(path.name for path in directory.glob("*.pkl"))
            hint = f"; to read the pickle in it, give its own path: {directory / pickles[0]}" if pickles else ""
            raise CheckpointError(f"{directory}: no {name} in this directory{hint}")
    config = read_config(directory / CONFIG_FILE)
    weights = directory / WEIGHTS_FILE
    state_dict = read_model_file(weights, config)
    digest = sha256_of(weights)
    state = None
    if optimizer and (directory / OPTIMIZER_FILE).exists():
        state = read_optimizer_file(directory / OPTIMIZER_FILE, config, digest)
    terms = None
    if (directory / GO_TERMS_FILE).exists():
        terms = read_go_terms(directory / GO_TERMS_FILE, config)
    return LoadedCheckpoint(config, state_dict, digest, str(directory.resolve()), state, terms)


def read_single_file(path: Path) -> LoadedCheckpoint:
    """Read and check a .safetensors file; its metadata or the config.json beside it give the sizes.

    Raises:
        CheckpointError: the file or the config.json is damaged or of another model, or no sizes are found.
    """
    config = sizes_in_model_file(path)
    if config is None:
        if not (path.parent / CONFIG_FILE).exists():
            raise CheckpointError(f"{path}: no sizes in its metadata and no {CONFIG_FILE} beside it")
        config = read_config(path.parent / CONFIG_FILE)
    return LoadedCheckpoint(config, read_model_file(path, config), sha256_of(path), str(path.resolve()))


def write_directory(directory: Path, checkpoint: LoadedCheckpoint) -> dict[str, str]:
    """Write a checkpoint directory; returns the SHA-256 of each file by name.

    A new directory appears complete or not at all. In an existing one each file is replaced in one step, and
    files of an earlier checkpoint that this one lacks are removed; others are left alone.

    Raises:
        CheckpointError: a tensor does not fit the sizes or is not finite, or a file cannot be written.
    """
    config, state, terms = checkpoint.config, checkpoint.optimizer_state, checkpoint.go_terms
    where = str(directory)
    weights = list(model_file(config, checkpoint.state_dict, where))
    terms_text = None if terms is None else go_terms_text(terms, config, where)
    digests = {}
    with new_directory(directory) as target:
        for name in (OPTIMIZER_FILE, GO_TERMS_FILE):
            (target / name).unlink(missing_ok=True)
        digests[WEIGHTS_FILE] = write_atomically(target / WEIGHTS_FILE, weights)
        digests[CONFIG_FILE] = write_atomically(target / CONFIG_FILE, [config_text(config).encode()])
        if state is not None:
            pieces = optimizer_file(config, state, digests[WEIGHTS_FILE], where)
            digests[OPTIMIZER_FILE] = write_atomically(target / OPTIMIZER_FILE, pieces)
        if terms_text is not None:
            digests[GO_TERMS_FILE] = write_atomically(target / GO_TERMS_FILE, [terms_text.encode()])
    return digests


def write_single_file(path: Path, checkpoint: LoadedCheckpoint) -> str:
    """Write the weights, with the sizes in the metadata, as one .safetensors file; returns its SHA-256.

    Raises:
        CheckpointError: a tensor does not fit the sizes or is not finite, or the file cannot be written.
    """
    return write_atomically(path, model_file(checkpoint.config, checkpoint.state_dict, str(path)))


def read_config(path: Path) -> ProteinBertConfig:
    """Sizes from a config.json, which holds all of them and nothing unknown.

    Raises:
        CheckpointError: the file cannot be read or is not the configuration of a ProteinBERT.
    """
    return parse_config(_read_text(path, _MAX_CONFIG_BYTES), str(path), _CONFIG_KEYS_BESIDE_SIZES)


def config_text(config: ProteinBertConfig) -> str:
    """The content of config.json."""
    content: dict[str, object] = {"model_type": "proteinbert", "architectures": ["ProteinBert"]}
    content |= {"library_name": "proteinbert_fast", "library_version": __version__}
    return json.dumps(content | config.to_dict(), indent=2) + "\n"


def read_go_terms(path: Path, config: ProteinBertConfig) -> tuple[GoTerm, ...]:
    """The GO term behind each annotation output, from a go_terms.tsv.

    Raises:
        CheckpointError: the file cannot be read, or has not one row of index, GO id and name for each output.
    """
    text = io.StringIO(_read_text(path, _MAX_GO_TERMS_BYTES))
    rows = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    terms: list[GoTerm] = []
    try:
        if next(rows, None) != _GO_TERMS_HEADER:
            raise CheckpointError(f"{path}: the first line is not {' '.join(_GO_TERMS_HEADER)}, separated by tabs")
        for row in rows:
            if len(row) != 3 or row[0] != str(len(terms)):
                raise CheckpointError(f"{path}: line {rows.line_num}: expected index {len(terms)}, GO id and name")
            terms.append(GoTerm(row[1], row[2]))
    except csv.Error as error:
        raise CheckpointError(f"{path}: line {rows.line_num}: {error}") from error
    _check_go_terms(terms, config, str(path))
    return tuple(terms)


def go_terms_text(terms: tuple[GoTerm, ...], config: ProteinBertConfig, where: str) -> str:
    """The content of go_terms.tsv.

    Raises:
        CheckpointError: the terms are not one for each annotation output, or one does not fit such a table.
    """
    _check_go_terms(terms, config, where)
    lines = ["\t".join(_GO_TERMS_HEADER)]
    lines += [f"{index}\t{term.accession}\t{term.name}" for index, term in enumerate(terms)]
    return "\n".join(lines) + "\n"


def _check_go_terms(terms: list[GoTerm] | tuple[GoTerm, ...], config: ProteinBertConfig, where: str) -> None:
    if len(terms) != config.n_annotations:
        raise CheckpointError(
            f"{where}: {len(terms):,} GO terms, expected one for each of {config.n_annotations:,} outputs"
        )
    if len({term.accession for term in terms}) != len(terms):
        raise CheckpointError(f"{where}: a GO term is listed twice")
    for index, term in enumerate(terms):
        if not _GO_ID.fullmatch(term.accession):
            raise CheckpointError(f"{where}: GO term {index} is {shown(term.accession)}, expected GO:0000000")
        if not term.name.isprintable():
            raise CheckpointError(f"{where}: the name of GO term {index} holds control characters")


def _read_text(path: Path, max_bytes: int) -> str:
    try:
        return read_bytes(path, max_bytes).decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not UTF-8 text") from None
