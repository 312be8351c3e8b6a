"""A progress bar that appears once something takes longer than two seconds."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from pullback.problems import Progress

_PATIENCE = 2.0
_INTERVAL = 0.1


class RunsBar:
    """Shows the progress of several runs on one line; a context, and the observer that the runs call.

    Nothing is shown on a console that is no terminal, or before two seconds have passed.

    Args:
        console: Where to draw.
        total: How many runs there will be.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = total
        self._done = 0
        self._began = self._drawn = time.monotonic()

    def __enter__(self) -> RunsBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Takes note of a step.

        Args:
            progress: How far the present run is.
        """
        now = time.monotonic()
        finished = progress.fraction >= 1
        if finished or (now - self._began > _PATIENCE and now - self._drawn > _INTERVAL):
            self._draw(progress, now)
        self._done += finished

    def _draw(self, progress: Progress, now: float) -> None:
        if now - self._began <= _PATIENCE:
            return
        self._drawn = now
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total)
        which = f"{min(self._done + 1, self._total)}/{self._total}"
        about = f"{which} {escape(progress.label)} seed {progress.seed} loss {progress.loss:.3g}"
        self._bar.update(self._task, completed=self._done + min(progress.fraction, 1.0), description=about)
