"""The clock of a run: charged seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Adds up wall-clock and processor seconds of the blocks it is the context of."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    def __enter__(self) -> None:
        self._cpu = time.process_time()
        self._wall = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._wall
        self.cpu_seconds += time.process_time() - self._cpu

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stands still for the length of a block within the clock's own.

        Yields:
            Nothing.
        """
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()
