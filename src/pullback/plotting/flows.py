"""A run of an adapted flow: predicted and measured cost, singular values, outputs on their way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pullback.plotting.style import COLOURS, panels, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pullback.flow import FlowRun


def plot_flow(run: FlowRun, title: str) -> Figure:
    """Draws a run in three panels over the time s.

    The cost beside the predicted one, the smallest singular values of D beside the largest, and some outputs with
    their targets.

    Args:
        run: The run.
        title: What stands above, the problem as a rule.

    Returns:
        A figure 15 inches wide.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with panels(3, 15, 4.8, f"{title}: {run.regime}, D {run.shape[0]} x {run.shape[1]} of rank {run.rank}") as (
        figure,
        (left, middle, right),
    ):
        _draw_cost(left, run)
        _draw_values(middle, run)
        _draw_outputs(right, run)
        for ax in (left, middle, right):
            ax.set_xlabel("time s")
            ax.set_xlim(left=0)
            ax.locator_params(axis="x", nbins=6)
            ax.grid(visible=True, which="major", color="0.92", linewidth=1)
            for loss in run.losses:
                ax.axvline(loss.s, color="0.45", linewidth=1.2, linestyle=(0, (4, 4)), zorder=1)
    return figure


def save_flow(run: FlowRun, path: str | Path, title: str) -> Path:
    """Draws `plot_flow` into a file.

    Args:
        run: The run.
        path: The file; its folder exists.
        title: What stands above.

    Returns:
        The path.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        OSError: If the file cannot be written.
    """
    return save_figure(plot_flow(run, title), path)


def _draw_cost(ax: Axes, run: FlowRun) -> None:
    times = [moment.s for moment in run.history]
    predicted = [(moment.s, moment.predicted) for moment in run.history if moment.predicted is not None]
    if predicted:
        ax.plot(*zip(*predicted, strict=True), color=COLOURS[1], linewidth=2.6, label="predicted")
    ax.plot(times, [moment.cost for moment in run.history], "o", color=COLOURS[0], markersize=5, label="measured")
    if run.eps is not None:
        ax.axhline(run.eps, color="0.45", linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
    ax.set(title="cost", yscale="log")
    if predicted and run.losses:  # What is promised no more would take the whole axis.
        ax.set_ylim(bottom=min(m.cost for m in run.history) / 10)
    ax.legend(frameon=False)


def _draw_values(ax: Axes, run: FlowRun) -> None:
    seen = [moment for moment in run.history if moment.smallest is not None and moment.largest is not None]
    ax.set(title="singular values of D")
    if not seen:
        ax.text(0.5, 0.5, "not watched", transform=ax.transAxes, ha="center", color="0.35")
        return
    times = [moment.s for moment in seen]
    ax.plot(times, [moment.largest or 0.0 for moment in seen], color=COLOURS[4], linewidth=2.6, label="largest")
    count = min(len(moment.smallest or ()) for moment in seen)
    for k in range(count):
        label = "smallest" if k == 0 else None
        heights = [(moment.smallest or [0.0])[k] for moment in seen]
        ax.plot(times, heights, color=COLOURS[2], linewidth=2.6 if k == 0 else 1.2, label=label)
    ax.set_yscale("log")
    for loss in run.losses:
        ax.text(loss.s, 0.3, "  rank lost", transform=ax.get_xaxis_transform(), color="0.35", fontsize=12)
    ax.legend(frameon=False)


def _draw_outputs(ax: Axes, run: FlowRun) -> None:
    times = [moment.s for moment in run.history]
    for k, values in enumerate(zip(*run.outputs, strict=True)):
        colour = COLOURS[k % len(COLOURS)]
        ax.plot(times, values, color=colour, linewidth=2)
        if run.targets is not None and k < len(run.targets):
            ax.plot(times[-1:], [run.targets[k]], "x", color=colour, markersize=9, markeredgewidth=2.2, clip_on=False)
    ax.set_title("outputs, targets crossed" if run.targets is not None else "outputs modulo constants")
