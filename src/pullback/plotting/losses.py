"""The training loss over seconds and over steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pullback.plotting.style import COLOURS, RATIO, panels, save_figure
from pullback.problems.record import INTERRUPTED, Comparison, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = ("-", "--", "-.", ":")
_Curve: TypeAlias = tuple[list[float], list[float]]
_POINTS = 400
# Losses are clipped at this multiple of the initial one: a diverging run would flatten all the others.
_CEILING = 10.0
# Least distance of two names at the edge, as a part of the height of the axes.
_APART = 0.05


def plot_loss(result: Comparison) -> Figure:
    """Draws the training loss over charged seconds, and beside it over steps.

    Each optimizer is a line, the median over its seeds, in a band from the first to the third quartile, as
    far as its shortest run goes. A run that failed or was interrupted is a thin line of its own; a cross
    marks a failure.

    Args:
        result: The runs; an optimizer's label names it in the legend.

    Returns:
        A figure of 13 by 5.6 inches; save it with `save_plot` or its own ``savefig``.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    labels = dict.fromkeys(run.label for run in result.runs)
    groups = {label: [run for run in result.runs if run.label == label] for label in labels}
    with panels(2, 13, 5.6, sharey=True) as (figure, axes):
        for ax, over in zip(axes, ("seconds", "steps"), strict=True):
            panel = _Panel.of(ax, result.runs, over)
            for number, (label, group) in enumerate(groups.items()):
                dashes = _DASHES[number // len(COLOURS) % len(_DASHES)]
                panel.draw(label, group, {"color": COLOURS[number % len(COLOURS)], "linestyle": dashes})
            panel.dress(dict.fromkeys(level for run in result.runs for level in run.targets))
        axes[0].set_ylabel("training loss")
        seeds = len({run.seed for run in result.runs})
        band = f"median and quartiles of {seeds} seeds" if seeds > 1 else "one seed"
        figure.suptitle(f"{result.problem}: training loss ({band})", fontsize=18)
        handles, names = axes[0].get_legend_handles_labels()
        if handles:
            # About 125 characters of this size fit beside each other, and a handle takes six.
            columns = max(1, min(len(names), 125 // (6 + max(map(len, names)))))
            figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def save_plot(result: Comparison, path: str | Path) -> Path:
    """Draws `plot_loss` into a file.

    Args:
        result: The runs.
        path: The file; its suffix decides the format, e.g. ``.png`` or ``.pdf``.

    Returns:
        The path written.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        OSError: If the file cannot be written.
    """
    return save_figure(plot_loss(result), path)


@dataclass(frozen=True)
class _Panel:
    """One of the two pictures: what is on its axes, and how they are scaled."""

    ax: Axes
    over: str
    log_x: bool
    log_y: bool
    ceiling: float

    @classmethod
    def of(cls, ax: Axes, runs: Sequence[Run], over: str) -> _Panel:
        """Chooses the scales: logarithmic for losses if all are positive, for seconds if they differ much."""
        losses = [evaluation.loss for run in runs for evaluation in run.history if math.isfinite(evaluation.loss)]
        ends = [run.seconds for run in runs if run.failure is None and run.seconds > 0]
        spread = over == "seconds" and bool(ends) and max(ends) > RATIO * min(ends)
        starts = [run.history[0].loss for run in runs if run.history and run.history[0].loss > 0]
        ceiling = _CEILING * max(starts, default=math.inf)
        return cls(ax, over, spread, bool(losses) and min(losses) > 0, ceiling)

    def dress(self, targets: Iterable[float]) -> None:
        """Sets scales, grid, names and the lines of the target levels."""
        if self.log_y:
            self.ax.set_yscale("log")
        if self.log_x:
            self.ax.set_xscale("log")
        else:
            self.ax.set_xlim(left=0)
            self.ax.locator_params(axis="x", nbins=6)
        levels = [level for level in targets if level > 0 or not self.log_y]
        for level in levels:
            self.ax.axhline(level, color="0.45", linewidth=1.2, linestyle=(0, (4, 4)), zorder=1)
        if self.over == "steps":  # The outer panel: beyond its edge no curve can run into the names.
            self._name_levels(levels)
        self.ax.set_xlabel("seconds of training" if self.over == "seconds" else "steps")
        self.ax.grid(visible=True, which="major", color="0.92", linewidth=1)

    def _name_levels(self, levels: Iterable[float]) -> None:
        """Writes the levels beside their lines, leaving out what would be written over another."""
        heights: list[float] = []
        for level in levels:
            height = float(self.ax.transAxes.inverted().transform(self.ax.transData.transform((1, level)))[1])
            if all(abs(height - other) > _APART for other in heights):
                heights.append(height)
                self.ax.text(
                    1.01, height, f"{level:g}", transform=self.ax.transAxes, va="center_baseline", color="0.35"
                )

    def draw(self, label: str, group: Sequence[Run], style: dict[str, Any]) -> None:
        """Draws the runs of one optimizer."""
        curves = [self._points(run) for run in group if run.failure is None]
        curves = [curve for curve in curves if len(curve[0]) > 1]
        if curves:
            grid, low, middle, high = self._band(curves)
            self.ax.plot(grid, middle, linewidth=2.6, label=label, **style)
            if len(curves) > 1:
                self.ax.fill_between(grid, low, high, color=style["color"], alpha=0.18, linewidth=0)
        for run in group:
            if run.failure is not None:
                self._draw_unfinished(run, None if curves or run is not group[0] else label, style)

    def _draw_unfinished(self, run: Run, label: str | None, style: dict[str, Any]) -> None:
        x, y = self._points(run)
        word = INTERRUPTED if run.failure == INTERRUPTED else "failed"
        self.ax.plot(x, y, linewidth=1.4, alpha=0.8, label=label and f"{label} ({word})", **style)
        if word != INTERRUPTED:
            self.ax.plot(x[-1:], y[-1:], "x", color=style["color"], markersize=9, markeredgewidth=2.2)

    def _points(self, run: Run) -> _Curve:
        """The finite part of a history, clipped above; without zero seconds if that axis is logarithmic."""
        chosen = [
            (
                evaluation.seconds if self.over == "seconds" else float(evaluation.step),
                min(evaluation.loss, self.ceiling),
            )
            for evaluation in run.history
            if math.isfinite(evaluation.loss) and not (self.log_x and evaluation.seconds <= 0)
        ]
        return [x for x, _ in chosen], [y for _, y in chosen]

    def _band(self, curves: Sequence[_Curve]) -> tuple[Any, Any, Any, Any]:
        """Quartiles on a common grid, interpolated as straight lines on the axes they are drawn on."""
        import numpy as np

        first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
        to_x, to_y = (np.log if self.log_x else np.asarray), (np.log if self.log_y else np.asarray)
        back_x, back_y = (np.exp if self.log_x else np.asarray), (np.exp if self.log_y else np.asarray)
        grid = to_x(np.asarray(curves[0][0])) if len(curves) == 1 else np.linspace(to_x(first), to_x(last), _POINTS)
        rows = [np.interp(grid, to_x(x), to_y(y)) for x, y in curves]
        low, middle, high = np.quantile(rows, [0.25, 0.5, 0.75], axis=0)
        return back_x(grid), back_y(low), back_y(middle), back_y(high)
