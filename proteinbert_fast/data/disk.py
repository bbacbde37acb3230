"""Writing so that a full disk, a kill or a power cut never leaves half a file under a name that counts."""

import fcntl
import io
import os
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class Sink(io.RawIOBase):
    """A file for HDF5 to write to, in which writing never seems to fail.

    HDF5 crashes the process when it closes a file that it could not write. So the first error is kept for
    `check`, and from then on writing does nothing.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o666)
        self._position = 0
        self._error: BaseException | None = None

    def check(self) -> None:
        """Raises the first error."""
        if self._error is not None:
            raise self._error

    def flush_to_disk(self) -> None:
        """Returns when everything is on the disk."""
        os.fsync(self._file)

    def write(self, data: "ReadableBuffer", /) -> int:
        view = memoryview(data).cast("B")
        size = len(view)
        try:
            while view and self._error is None:
                written = os.pwrite(self._file, view, self._position)
                self._position += written
                view = view[written:]
        except BaseException as error:  # an interrupt as well
            self._error = error
        self._position += len(view)
        return size

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        data = os.pread(self._file, len(view), self._position)
        self._position += len(view)
        # What an error kept from being written reads as zeros.
        view[:] = data.ljust(len(view), b"\0")
        return len(view)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence)
        self._position = offset + (os.fstat(self._file).st_size if base is None else base)
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None, /) -> int:
        size = self._position if size is None else size
        try:
            if self._error is None:
                os.ftruncate(self._file, size)
        except BaseException as error:  # an interrupt as well
            self._error = error
        return size

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()


def flush_folder(folder: str) -> None:
    """Makes the names in a folder last through a power cut."""
    handle = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(file: int, data: memoryview) -> None:
    """Writes everything to a file descriptor, however often the system has to be asked."""
    while data:
        data = data[os.write(file, data) :]


def take_lock(path: str) -> TextIO:
    """A lock on a file, made if need be, until what is returned is closed or the process ends.

    The owner may remove the file before that: whoever waits for it then makes a new one.

    Raises:
        BlockingIOError: another process has it.
        OSError: the file cannot be made.
    """
    while True:
        lock = open(path, "a", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise
        # The last owner may have removed the file between our opening and locking it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                return lock
        lock.close()


def remove(path: str) -> None:
    """Removes a file that may not be there."""
    with suppress(FileNotFoundError):
        os.unlink(path)
