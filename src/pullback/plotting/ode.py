"""Neural ODEs: trajectories, densities, and what learned times and solvers did over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pullback.plotting.style import COLOURS, STYLE, require_matplotlib
from pullback.problems.cnf import likelihood

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Points of a density along each axis, and how far beyond the data it is drawn, in parts of their width.
_GRID, _MARGIN = 120, 0.15


def plot_trajectories(
    times: Tensor, observed: Tensor, fine: Tensor, fitted: Mapping[str, Tensor], names: Sequence[str]
) -> Figure:
    """Draws observations and fitted trajectories over time, and in the plane where the state is one of two numbers.

    Args:
        times: Of the observations, ascending, shape (T,).
        observed: Shape (T, d).
        fine: Times of the fitted states, ascending, shape (K,).
        fitted: By name, shape (K, d); up to four, told apart by dashes.
        names: Of the d numbers.

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
    figure, axes = _panels(2 if len(names) == 2 else 1)
    styles = ("-", "--", "-.", ":")
    for k, name in enumerate(names):
        axes[0].plot(times.tolist(), observed[:, k].tolist(), "o", color=COLOURS[k % len(COLOURS)], label=name)
        for dashes, states in zip(styles, fitted.values(), strict=False):
            axes[0].plot(fine.tolist(), states[:, k].tolist(), dashes, color=COLOURS[k % len(COLOURS)], linewidth=2.2)
    axes[0].set(xlabel="time", title="over time")
    axes[0].locator_params(axis="x", nbins=6)
    axes[0].legend(frameon=False)
    if len(names) == 2:
        axes[1].plot(*observed.T.tolist(), "o", color="0.35", label="observed")
        for number, (label, states) in enumerate(fitted.items()):
            style: dict[str, Any] = {"color": COLOURS[(number + 2) % len(COLOURS)], "linewidth": 2.2, "label": label}
            axes[1].plot(*states.T.tolist(), styles[number % len(styles)], **style)
        axes[1].set(xlabel=names[0], ylabel=names[1], title="in the plane")
        axes[1].legend(frameon=False)
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
    top = max((float(values.max()) for values in densities.values()), default=1.0)
    figure, axes = _panels(1 + len(models), width=4.6)
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    axes[0].plot(*points.T.tolist(), ".", color=COLOURS[0], markersize=3)
    axes[0].set(title=f"{len(points)} points", xlim=extent[:2], ylim=extent[2:])
    for ax, (name, values) in zip(axes[1:], densities.items(), strict=True):
        image = ax.imshow(values.tolist(), origin="lower", extent=extent, cmap="viridis", vmin=0, vmax=top)
        ax.set_title(name)
    for ax in axes:
        ax.set_aspect("equal")
        ax.grid(visible=False)
    if models:
        figure.colorbar(image, ax=axes[1:], label="density", shrink=0.8)
    return figure


def plot_times(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draws the time at which an ODE block ends and the evaluations of its field, over the steps.

    Args:
        runs: By name, with the series "t1" and "evaluations", one number a step.

    Returns:
        A figure of two panels.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    figure, axes = _panels(2)
    for ax, key, title in zip(axes, ("t1", "evaluations"), ("end time t1", "evaluations of the field"), strict=True):
        for number, (name, series) in enumerate(runs.items()):
            values = series[key]
            colour = COLOURS[number % len(COLOURS)]
            ax.plot(range(1, len(values) + 1), values, color=colour, linewidth=2.2, label=name)
        ax.set(xlabel="steps", title=title)
        ax.set_ylim(bottom=0)
        ax.set_xlim(left=0)
    axes[0].legend(frameon=False)
    return figure


def _panels(count: int, width: float = 6.4) -> tuple[Figure, list[Axes]]:
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * count, 4.8), layout="constrained")
        axes = list(figure.subplots(1, count, squeeze=False)[0])
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
