"""The claim of one process on an output file, by way of a folder beside it where unfinished work lies.

``out.h5`` is written by way of the folder ``out.h5.partial``::

    lock           held by the one process that writes
    manifest.json  what is being made, and what of it is complete

Whatever counts is in the manifest, which is replaced as a whole after what it names is on the disk. So a process may be
killed at any moment: the rest is deleted by the next one.
"""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Self

import h5py

from proteinbert_fast.data.disk import Sink, flush_folder, remove, take_lock, write_all
from proteinbert_fast.errors import InputError, ProteinBertError

MANIFEST = "manifest.json"
LOCK = "lock"

Manifest = dict[str, Any]


class Claim:
    """What is the same for all outputs that can be resumed; a class of each keeps its own things in the folder.

    Args:
        output: the HDF5 file to be.
        resume: go on with what was interrupted, if there is something.
        overwrite: replace what is there.

    Raises:
        InputError: something is there and neither resume nor overwrite was asked for, or another process is writing.
        ProteinBertError: the folder of the output cannot be written to.

    Attributes:
        output: the HDF5 file to be.
        folder: where unfinished work lies.
    """

    NOUN: ClassVar[str]  # of what is interrupted, in messages
    MANIFEST_SCHEMA: ClassVar[int]

    def __init__(self, output: str, *, resume: bool, overwrite: bool) -> None:
        if resume and overwrite:
            raise InputError("resume and overwrite exclude each other: go on with what is there, or replace it")
        self.output = output
        self.folder = output + ".partial"
        self._resume = resume
        self._overwrite = overwrite
        self._check_output()

    def _check_output(self) -> None:
        parent = os.path.dirname(os.path.abspath(self.output))
        if not os.path.isdir(parent):
            raise InputError(f"{self.output}: there is no folder {parent}")
        if os.path.isdir(self.output):
            raise InputError(f"{self.output}: is a directory; name a file in it")
        if os.path.exists(self.output) and not os.path.isfile(self.output):
            raise InputError(f"{self.output}: is not a regular file, and HDF5 needs one")
        if self._resume or self._overwrite:
            return
        if os.path.exists(self.output):
            raise InputError(f"{self.output}: exists; replace it with --overwrite")
        if os.path.exists(self.path(MANIFEST)):
            raise InputError(
                f"{self.output}: an interrupted {self.NOUN} is in {self.folder}; "
                "go on with --resume, or start again with --overwrite"
            )

    def __enter__(self) -> Self:
        try:
            self._take_lock()
        except OSError as error:
            raise self.unwritable(error) from error
        return self

    def _take_lock(self) -> None:
        while True:
            os.makedirs(self.folder, exist_ok=True)
            try:
                self._lock = take_lock(self.path(LOCK))
            except BlockingIOError as error:
                raise InputError(f"{self.output}: another process is writing it now") from error
            except FileNotFoundError:  # the last owner has just removed the folder
                continue
            return

    def _leave_folder(self) -> None:
        """Removes the folder if there is nothing to go on with."""
        if not os.path.exists(self.path(MANIFEST)):
            remove(self.path(LOCK))
            with suppress(OSError):  # somebody else's files are in it
                os.rmdir(self.folder)

    def _read_manifest(self) -> Manifest | None:
        """What an earlier process left, if that is to be resumed and there is something."""
        if not self._resume:
            return None
        try:
            with open(self.path(MANIFEST), encoding="utf-8") as file:
                manifest: Manifest = json.load(file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path(MANIFEST)}: cannot be read; start again with --overwrite") from error
        if manifest.get("schema") != self.MANIFEST_SCHEMA:
            raise InputError(f"{self.folder}: was made by another version; start again with --overwrite")
        return manifest

    def _refuse_other_output(self, manifest: Manifest | None, difference: str) -> None:
        """The output is there, and is not what would be made: only what may overwrite it goes on."""
        if manifest is None:
            raise InputError(f"{self.output}: cannot resume: {difference}; replace it with --overwrite")
        if not manifest["overwrite"]:
            raise InputError(f"{self.output}: another {self.NOUN} has made it meanwhile; move it away to resume")

    def _replace_manifest(self, content: Manifest) -> None:
        text = json.dumps({"schema": self.MANIFEST_SCHEMA, "overwrite": self._overwrite, **content})
        temporary = self.path(MANIFEST + ".tmp")
        handle = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
        try:
            try:
                write_all(handle, memoryview(text.encode()))
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(temporary, self.path(MANIFEST))
        except BaseException:
            remove(temporary)
            raise
        flush_folder(self.folder)

    @contextmanager
    def new_output(self, name: str, **options: Any) -> Iterator[tuple[Any, Sink]]:
        """An HDF5 file to fill, which gets the output's name when the block ends; then `finish` is called.

        Args:
            name: in the folder, until then.
            options: for h5py.

        Yields:
            The open file, and the sink it goes to: its `check` tells of a full disk early.

        Raises:
            InputError: the output appeared meanwhile and may not be overwritten.
            ProteinBertError: the disk cannot be written to.
        """
        path = self.path(name)
        try:
            with Sink(path) as sink:
                try:
                    with h5py.File(sink, "w", **options) as file:
                        yield file, sink
                except Exception:
                    sink.check()  # the disk's own error says more than what HDF5 made of it
                    raise
                sink.check()
                sink.flush_to_disk()
            if not self._overwrite and os.path.exists(self.output):
                raise InputError(f"{self.output}: was made meanwhile; move it away and go on with --resume")
            os.replace(path, self.output)
            flush_folder(os.path.dirname(os.path.abspath(self.output)))
            self.finish()
        except OSError as error:
            raise self.unwritable(error) from error

    def finish(self) -> None:
        """Forgets what was unfinished, after the output has its name."""
        remove(self.path(MANIFEST))

    def path(self, name: str) -> str:
        """Where a file of the folder is."""
        return os.path.join(self.folder, name)

    def unwritable(self, error: OSError) -> ProteinBertError:
        """The error to raise when writing failed."""
        why = error.strerror or str(error).splitlines()[0]
        safe = self._safe()
        kept = f"; {safe} are safe in {self.folder}, go on with --resume" if safe else ""
        return ProteinBertError(f"{self.output}: cannot be written: {why}{kept}")

    def _safe(self) -> str:
        """How much of the work is complete, in words; nothing if nothing is."""
        raise NotImplementedError

    def _remove_leftovers(self, prefixes: tuple[str, ...], named: Collection[str]) -> None:
        """Removes what begins so and is no complete piece of this work."""
        for name in os.listdir(self.folder):
            if name.startswith((*prefixes, MANIFEST + ".tmp")) and name not in named:
                remove(self.path(name))
