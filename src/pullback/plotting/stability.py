"""Twins beside their bounds over the number of samples, and the action of training step by step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pullback.plotting.style import COLOURS, legend_below, panels, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pullback.action import Action
    from pullback.stability import Scaling

_DASHED, _DOTTED = (0, (5, 2)), (0, (1, 2))


def plot_twins(scaling: Scaling, title: str) -> Figure:
    """Draws twin distance and loss change over n, both axes logarithmic, with the bounds.

    Every pair is a dot, lines are medians; proved bounds are whole, those with sampled constants dashed, and what is
    no bound dotted.

    Args:
        scaling: Twins at several n.
        title: What stands above.

    Returns:
        A figure 13 inches wide.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with panels(2, 13, 5.4, title) as (figure, (left, right)):
        _draw_twins(left, scaling, "distance")
        _draw_twins(right, scaling, "loss")
        left.set_title(f"distance of the weights\nmeasured {scaling.distance}", fontsize=14)
        right.set_title(f"largest change of a loss\nmeasured {scaling.loss}", fontsize=14)
        legend_below(figure, (left, right))
    return figure


def _draw_twins(ax: Axes, scaling: Scaling, what: str) -> None:
    ns = [report.n for report in scaling.reports]
    each = [[t.distance if what == "distance" else t.loss_change for t in r.pairs] for r in scaling.reports]
    for n, values in zip(ns, each, strict=True):
        ax.plot([n] * len(values), values, "o", color=COLOURS[0], markersize=4, alpha=0.4)
    ax.plot(ns, [statistics.median(v) for v in each], color=COLOURS[0], linewidth=2.6, label="measured, median")
    names = dict.fromkeys(b.name for r in scaling.reports for t in r.pairs for b in t.bounds)
    for k, name in enumerate(names):
        found = [[b for t in r.pairs for b in t.bounds if b.name == name] for r in scaling.reports]
        first = found[0][0]
        heights = [[getattr(b, what) for b in bounds] for bounds in found]
        if any(h is None for row in heights for h in row):
            continue
        kind = first.distance_kind if what == "distance" else first.kind
        style = _DOTTED if not first.derived else "-" if kind == "proved" else _DASHED
        middle = [statistics.median(row) for row in heights]
        ax.plot(ns, middle, color=COLOURS[1 + k], linewidth=2.2, linestyle=style, label=f"{name}: {kind}")
    ax.set(xscale="log", yscale="log", xlabel="samples n")
    ax.set_xticks(ns, [str(n) if len(ns) < 6 or k % 2 == 0 else "" for k, n in enumerate(ns)])
    ax.minorticks_off()
    ax.grid(visible=True, which="major", color="0.92", linewidth=1)


def plot_action(steps: Sequence[Action], title: str) -> Figure:
    """Draws the action of each step, stacked by module, and what has come together, stacked by defect.

    Args:
        steps: The action of each step, as an ``ActionRecorder`` keeps them.
        title: What stands above.

    Returns:
        A figure 13 inches wide.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        ValueError: If there is no step.
    """
    if not steps:
        raise ValueError("There is no step to draw; put recorder.observe() around opt.step().")
    with panels(2, 13, 4.8, title) as (figure, (left, right)):
        _draw_modules(left, steps)
        _draw_defects(right, steps)
    return figure


def _draw_modules(ax: Axes, steps: Sequence[Action]) -> None:
    numbers, floor = list(range(1, len(steps) + 1)), [0.0] * len(steps)
    for k, name in enumerate(steps[0].modules):
        heights = [step.modules[name] for step in steps]
        # Shares may be negative where the metric couples modules: bars then lie on those before, as sums do.
        ax.bar(numbers, heights, 1.0, bottom=floor, color=COLOURS[k % len(COLOURS)], label=f"module {name}")
        floor = [a + b for a, b in zip(floor, heights, strict=True)]
    ax.set(title="action of each step, by module", xlabel="step", xlim=(0.5, len(steps) + 0.5))
    ax.locator_params(axis="x", integer=True)
    ax.grid(visible=True, axis="y", color="0.92", linewidth=1)
    ax.legend(frameon=False)


def _draw_defects(ax: Axes, steps: Sequence[Action]) -> None:
    pairs = [pair for pair in steps[0].defects if any(abs(s.defects[pair]) > 1e-12 * s.total for s in steps)]
    numbers = range(1, len(steps) + 1)
    sums, total = dict.fromkeys(pairs, 0.0), 0.0
    curves: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    whole = []
    for step in steps:
        total += step.total
        whole.append(total)
        for pair in pairs:
            sums[pair] += step.defects[pair]
            curves[pair].append(sums[pair])
    ax.plot(numbers, whole, color=COLOURS[4], linewidth=2.6, label="whole")
    for k, (pair, values) in enumerate(curves.items()):
        colour = [c for c in COLOURS if c != COLOURS[4]][k % (len(COLOURS) - 1)]
        style = "-" if pair[0] == pair[1] else _DASHED
        ax.plot(numbers, values, color=colour, linewidth=2, linestyle=style, label=" x ".join(dict.fromkeys(pair)))
    ax.set(title="action until then, by defect", xlabel="step")
    ax.locator_params(axis="x", integer=True)
    ax.grid(visible=True, axis="y", color="0.92", linewidth=1)
    ax.legend(frameon=False)


def save_twins(scaling: Scaling, path: str | Path, title: str) -> Path:
    """Draws `plot_twins` into a file.

    Args:
        scaling: Twins at several n.
        path: The file; its folder exists.
        title: What stands above.

    Returns:
        The path.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        OSError: If the file cannot be written.
    """
    return save_figure(plot_twins(scaling, title), path)


def save_action(steps: Sequence[Action], path: str | Path, title: str) -> Path:
    """Draws `plot_action` into a file.

    Args:
        steps: The action of each step.
        path: The file; its folder exists.
        title: What stands above.

    Returns:
        The path.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        OSError: If the file cannot be written.
        ValueError: If there is no step.
    """
    return save_figure(plot_action(steps, title), path)
