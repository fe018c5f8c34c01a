"""Lets files be read and written in threads beside the model, in the order of the images and with bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Images that are read before they are needed, and images whose results wait to be written.
_WAITING = 2


def read_ahead(items: Iterable[Item], read: Callable[[Item], Result], *, ahead: int = _WAITING) -> Iterator[Result]:
    """Reads items in another thread, some items before they are needed.

    Args:
        items: what to read.
        read: reads one item; it is called in the order of the items.
        ahead: maximum number of results that wait. Default: 2.

    Yields:
        What `read` returns, in the order of the items. What it raises is raised in place of its result.
    """
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="reader") as reader:
        try:
            for item in items:
                waiting.append(reader.submit(read, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for result in waiting:
                result.cancel()


class WriterThread:
    """Calls functions in another thread, one after the other. After one has failed, no further function is called.

    with WriterThread() as thread:
        for image in images:
            thread.call(write, image)
    """

    def __init__(self, *, behind: int = _WAITING):
        """
        Args:
            behind: maximum number of calls that wait or run. Default: 2.
        """
        self._behind = behind
        self._calls: deque[Future] = deque()
        self._failed = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="writer")

    def __enter__(self) -> "WriterThread":
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        # What waits is written even if the run is stopped.
        self._executor.shutdown(wait=True)
        if kind is None:
            self._check(0)

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Let the thread call `function(*args)`. This waits while there are `behind` calls already.

        Raises:
            Exception: what an earlier call raised.
        """
        self._check(self._behind - 1)
        self._calls.append(self._executor.submit(self._run, function, *args))

    def _run(self, function: Callable[..., None], *args: Any) -> None:
        if self._failed:
            return
        try:
            function(*args)
        except BaseException:
            self._failed = True
            raise

    def _check(self, remaining: int) -> None:
        """Wait until at most `remaining` calls wait or run."""
        while self._calls and (len(self._calls) > remaining or self._calls[0].done()):
            self._calls.popleft().result()
