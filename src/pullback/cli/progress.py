"""Progress bars."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from pullback.problems import Progress

_PATIENCE = 2.0
_INTERVAL = 0.1


class Bar:
    """A bar on one line, shown from the first :meth:`show` on; a context.

    Nothing is shown on a console that is no terminal.

    Args:
        console: Where to draw.
        total: What is reached at the end.
        share: How the share done is written.
        remaining: Whether to estimate the time that is left.
    """

    def __init__(
        self, console: Console, total: float = 1.0, share: str = "{task.percentage:>3.0f}%", remaining: bool = True
    ) -> None:
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn(share), TimeElapsedColumn(),
        ]  # fmt: skip
        self._bar = RichProgress(
            *columns,
            *([TimeRemainingColumn()] if remaining else []),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = total
        self._drawn = -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def due(self) -> bool:
        """Whether the last drawing is long enough ago for another."""
        return time.monotonic() - self._drawn >= _INTERVAL

    def show(self, done: float, about: str) -> None:
        """Draws.

        Args:
            done: Of the total.
            about: What stands in front of the bar.
        """
        self._drawn = time.monotonic()
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total)
        self._bar.update(self._task, completed=min(done, self._total), description=about)


class RunsBar(Bar):
    """Shows the progress of several runs; the observer that the runs call. Waits for two seconds first.

    Args:
        console: Where to draw.
        total: How many runs there will be.
    """

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(console, total)
        self._runs, self._done = total, 0
        self._began = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Takes note of a step.

        Args:
            progress: How far the present run is.
        """
        finished = progress.fraction >= 1
        if time.monotonic() - self._began > _PATIENCE and (finished or self.due()):
            which = f"{min(self._done + 1, self._runs)}/{self._runs}"
            about = f"{which} {escape(progress.label)} seed {progress.seed} loss {progress.loss:.3g}{_ode(progress)}"
            self.show(self._done + min(progress.fraction, 1.0), about)
        self._done += finished


def _ode(progress: Progress) -> str:
    """What the ODE blocks of the model do, if it has any."""
    return "" if progress.nfe is None else f"  nfe {progress.nfe}  t1 {progress.t1:.3g}"
