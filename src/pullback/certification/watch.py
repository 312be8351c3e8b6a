"""Who is told how far a certificate is, and when it is enough."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

#: Takes the phase, the part of it that is done, and a few words.
Observer: TypeAlias = Callable[[str, float, str], None]
PHASES = ("training", "rates", "constants", "twins")


class Watch:
    """Clock and observer of a certificate.

    Args:
        observer: told of progress, or None.
        seconds: wall time after which no further piece of work is begun, or None.

    Attributes:
        seconds: wall time by phase.
    """

    def __init__(self, observer: Observer | None, seconds: float | None) -> None:
        self._observer, self._limit = observer, seconds
        self._began = self._entered = time.monotonic()
        self._phase = ""
        self.seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """Begins a phase."""
        self.leave()
        self._phase, self._entered = phase, time.monotonic()
        self.tell(0.0)

    def leave(self) -> None:
        """Ends the present phase."""
        if self._phase:
            self.seconds[self._phase] = time.monotonic() - self._entered
        self._phase = ""

    def tell(self, share: float, about: str = "") -> None:
        """Says how much of the phase is done."""
        if self._observer is not None:
            self._observer(self._phase, share, about)

    def over(self) -> bool:
        """Whether the time is used up."""
        return self._limit is not None and time.monotonic() - self._began > self._limit

    @property
    def total(self) -> float:
        """Wall time since the start."""
        return time.monotonic() - self._began
