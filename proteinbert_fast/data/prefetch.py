"""An iterator that runs in a thread of its own, a few items ahead."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Prefetched(Generic[T]):
    """Runs an iterator in a thread, a few items ahead. Use as a context: leaving it stops the thread.

    Args:
        items: what to run.
        ahead: most items that wait.
    """

    def __init__(self, items: Iterator[T], ahead: int = 2) -> None:
        self._items = items
        self._queue: queue.Queue[T | _End] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="reader", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while not isinstance(item := self._queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error

    def _produce(self) -> None:
        end = _End(None)
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:
            end = _End(error)
        self._put(end)

    def _put(self, item: "T | _End") -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


@dataclass(frozen=True)
class _End:
    error: BaseException | None
