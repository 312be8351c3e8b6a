"""Neural ODEs: trajectories, densities, and what learned times and solvers did over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pullback.plotting.style import COLOURS, STYLE, panels, save_figure
from pullback.problems.cnf import FlowNLL, likelihood
from pullback.problems.problem import Problem
from pullback.problems.record import INTERRUPTED, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Points of a density along each axis, and how far beyond the data it is drawn, in parts of their width.
_GRID, _MARGIN = 120, 0.15
#: The share of them whose densities the scale of colours covers.
_SHOWN = 0.995
_DASHES = ("-", "--", "-.", ":")


def plot_trajectories(
    times: Tensor,
    observed: Tensor,
    fine: Tensor,
    fitted: Mapping[str, Tensor],
    names: Sequence[str],
    *,
    unit: str = "",
    time: str = "time",
) -> Figure:
    """Draws observations and fitted trajectories over time, and in the plane where the state is one of two numbers.

    Args:
        times: Of the observations, shape (T,).
        observed: Shape (T, d).
        fine: Times of the fitted states, ascending, shape (K,); a NaN ends a piece of trajectory.
        fitted: By name, shape (K, d); up to four, told apart by dashes.
        names: Of the d numbers.
        unit: Of these numbers.
        time: What the times are called.

    Returns:
        A figure of one panel, two for d = 2.

    Raises:
        ValueError: If the shapes do not fit together.
        MissingExtraError: If matplotlib is not installed.
    """
    for name, own, states in (("observed", times, observed), *((name, fine, v) for name, v in fitted.items())):
        if states.shape != (len(own), len(names)):
            raise ValueError(
                f"{name} has shape {tuple(states.shape)} beside {len(own)} times and {len(names)} names; "
                f"give {(len(own), len(names))}."
            )
    plain = len(names) == 1  # Then colours tell the models apart, otherwise the numbers.
    figure, axes = _panels(2, shares=(3, 2)) if len(names) == 2 else _panels(1, width=12.0)
    over, grey = axes[0], "0.35"
    for k, name in enumerate(names):
        colour = grey if plain else COLOURS[k % len(COLOURS)]
        over.plot(times.tolist(), observed[:, k].tolist(), "o", color=colour, markersize=5, label=name)
        for number, (dashes, states) in enumerate(zip(_DASHES, fitted.values(), strict=False)):
            shade = COLOURS[number] if plain else colour
            over.plot(fine.tolist(), states[:, k].tolist(), dashes, color=shade, linewidth=2)
    for number, (dashes, name) in enumerate(zip(_DASHES, fitted, strict=False)):
        over.plot([], [], dashes, color=COLOURS[number] if plain else grey, linewidth=2, label=name)
    over.set(xlabel=time, ylabel=unit, title="over time")
    over.locator_params(axis="x", nbins=6)
    over.set_ylim(*_limits(observed.flatten()[:, None])[0])
    if len(names) == 2:
        plane, (across, upwards) = axes[1], _limits(observed)
        plane.plot(*observed.T.tolist(), "o", color=grey, markersize=5, label="observed")
        for number, (label, states) in enumerate(fitted.items()):
            style: dict[str, Any] = {"color": COLOURS[(number + 2) % len(COLOURS)], "linewidth": 2, "label": label}
            plane.plot(*states.T.tolist(), _DASHES[number % len(_DASHES)], **style)
        plane.set(xlabel=names[0], ylabel=names[1], title="in the plane", xlim=across, ylim=upwards)
        plane.set_aspect("equal")
    for ax in axes:
        _legend_below(ax)
    return figure


def plot_density(models: Mapping[str, nn.Module], points: Tensor) -> Figure:
    """Draws data in the plane and the densities of continuous normalizing flows.

    Args:
        models: By name; from points (N, 2) to z and delta, (N, 3).
        points: The data, shape (N, 2).

    Returns:
        A figure with one panel for the data and one for each model, all of one scale of colours.

    Raises:
        ValueError: If the points are not in the plane.
        MissingExtraError: If matplotlib is not installed.
    """
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points have shape {tuple(points.shape)}; densities are drawn in the plane, give (N, 2).")
    low, high = points.amin(0), points.amax(0)
    low, high = low - _MARGIN * (high - low), high + _MARGIN * (high - low)
    sides = [torch.linspace(float(a), float(b), _GRID, dtype=points.dtype) for a, b in zip(low, high, strict=True)]
    grid = torch.cartesian_prod(*sides)
    densities = {name: _density(model, grid).reshape(_GRID, _GRID).T for name, model in models.items()}
    # Where a flow is too sharp there are peaks of a few pixels, which would leave the rest dark.
    top = max((float(values.flatten().quantile(_SHOWN)) for values in densities.values()), default=1.0)
    figure, axes = _panels(1 + len(models), width=4.6)
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    look: dict[str, Any] = {"origin": "lower", "extent": extent, "vmin": 0, "vmax": top, "interpolation": "bilinear"}
    axes[0].plot(*points.T.tolist(), ".", color=COLOURS[0], markersize=3)
    axes[0].set(title=f"{len(points)} points", xlim=extent[:2], ylim=extent[2:])
    for ax, (name, values) in zip(axes[1:], densities.items(), strict=True):
        image = ax.imshow(values.tolist(), **look)
        ax.set_title(name)
    for ax in axes:
        ax.set_aspect("equal")
        ax.grid(visible=False)
    if models:
        figure.colorbar(image, ax=axes[1:], label="density", shrink=0.8, extend="max")
    return figure


def plot_times(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draws the time at which an ODE block ends, where it changes, and the evaluations of its field, over the steps.

    Args:
        runs: By name, with the series "t1" and "nfe", and "step" if there is not one number for each step from 1 on.

    Returns:
        A figure of two panels, or one.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    titles = {"t1": "end time t1", "nfe": "evaluations of the field per forward pass"}
    if all(len({*series["t1"]}) < 2 for series in runs.values()):
        del titles["t1"]
    figure, axes = _panels(len(titles))
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for number, (name, series) in enumerate(runs.items()):
            values = series[key]
            steps = series.get("step", range(1, len(values) + 1))
            colour, dashes = COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)]
            drawn = "steps-pre" if key == "nfe" else "default"
            ax.plot(steps, values, dashes, color=colour, linewidth=2, label=name, drawstyle=drawn)
        ax.set(xlabel="steps", title=title)
        ax.set_ylim(bottom=0)
        ax.set_xlim(left=0)
        ax.locator_params(axis="x", nbins=6)
        _legend_below(ax)
    return figure


def save_ode(problem: Problem, result: Comparison, models: Mapping[str, nn.Module], folder: Path) -> list[Path]:
    """Draws what there is to see of runs with ODE blocks: times and evaluations, trajectories, densities.

    Args:
        problem: The problem with the data of the seed that the models are of.
        result: The runs; of each optimizer the first one is drawn.
        models: Trained models by optimizer; those of runs that failed are left out.
        folder: Where ``times.png`` (if a number in it changes), ``trajectories.png`` and ``density.png`` go.

    Returns:
        The files.

    Raises:
        SolverError: If the ODE of a model cannot be solved where it is to be drawn.
        OSError: If a file cannot be written.
    """
    first = {run.label: run for run in reversed(result.runs)}
    failed = {label for label, run in first.items() if run.failure not in (None, INTERRUPTED)}
    models = {label: model for label, model in models.items() if label not in failed}
    paths = []
    times = {label: ode for label, run in reversed(first.items()) if (ode := run.to_json()["ode"]) is not None}
    if any(len({*ode[key]}) > 1 for ode in times.values() for key in ("t1", "nfe")):
        paths.append(save_figure(plot_times(times), folder / "times.png"))
    shown = problem.trajectories
    if shown is not None and models:
        fitted = {label: shown.fitted(model) for label, model in models.items()}
        view = shown.view(shown.observed)
        figure = plot_trajectories(shown.times, view, shown.fine, fitted, shown.names, unit=shown.unit, time=shown.time)
        paths.append(save_figure(figure, folder / "trajectories.png"))
    if isinstance(problem.criterion, FlowNLL) and problem.train[0].shape[1] == 2 and models:
        paths.append(save_figure(plot_density(models, problem.train[0]), folder / "density.png"))
    return paths


def _limits(points: Tensor) -> list[tuple[float, float]]:
    """Ranges of the columns with some room; a model that runs away is cut off, the data are not."""
    low, high = points.amin(0), points.amax(0)
    room = 0.15 * (high - low).clamp(min=1e-12)
    return list(zip((low - room).tolist(), (high + room).tolist(), strict=True))


def _legend_below(ax: Axes) -> None:
    ax.legend(
        frameon=False,
        fontsize=STYLE["legend.fontsize"],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=4,
        columnspacing=1.2,
        handlelength=1.6,
    )


def _panels(count: int, width: float = 6.4, shares: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    with panels(count, width * count, 4.8, width_ratios=shares) as (figure, axes):
        for ax in axes:
            ax.grid(visible=True, which="major", color="0.92", linewidth=1)
    return figure, axes


def _density(model: nn.Module, grid: Tensor) -> Tensor:
    """The density at points, the model as it is in evaluation."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found = torch.cat([likelihood(model(part)) for part in grid.split(4096)]).exp()
    model.train(training)
    return found
