"""What the options of a sweep do: a map or a line per optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pullback.plotting.style import COLOURS, RATIO, STYLE, require_matplotlib, save_figure
from pullback.problems.grid import Grid
from pullback.problems.options import Value, format_value
from pullback.problems.sweep import Cell, Sweep, best_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREY = "0.9"
# A title with more characters than this is parted in two lines.
_WIDE = 50
# Behind words on a hatched ground.
_PATCH = {"facecolor": _GREY, "edgecolor": "none", "pad": 2}


def plot_sweep(result: Sweep) -> dict[str, Figure]:
    """Draws the grids of a sweep: two options as a coloured map, one as a line from value to value.

    All pictures of a sweep have one scale, and the brighter the better. A combination of which half of the runs or
    more failed is hatched grey, one that was never run is blank. Of more than two options the first two are drawn,
    each cell the best over the others.

    Args:
        result: The runs and their grids.

    Returns:
        For each optimizer a figure 9 inches wide.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    scale = _Scale.of(result)
    seeds = len({run.seed for run in result.comparison.runs})
    kind = f"{result.measure}, {f'median of {seeds} seeds' if seeds > 1 else 'one seed'}"
    figures = {}
    with matplotlib.rc_context(STYLE):
        for grid in result.grids:
            axes, others = grid.axes[:2], grid.axes[2:]
            rows = len(grid.values[axes[1]]) if len(axes) > 1 else 4
            figures[grid.name] = figure = Figure(figsize=(9, 2.6 + 0.75 * rows), layout="constrained")
            best = f"best over {', '.join(others)}, " if others else ""
            name = f"{result.comparison.problem}: {grid.label}"
            if len(name) > _WIDE:
                name = name.replace(": ", "\n", 1)
            figure.suptitle(f"{name}\n{best}{kind}", fontsize=16)
            draw = _draw_map if len(axes) > 1 else _draw_line
            draw(figure.subplots(), grid, _folded(result, grid), scale)
    return figures


def save_sweep(result: Sweep, folder: str | Path) -> list[Path]:
    """Draws `plot_sweep` into ``sweep-NAME.png``, a file per optimizer.

    Args:
        result: The runs and their grids.
        folder: Where; it exists.

    Returns:
        The paths written.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        OSError: If a file cannot be written.
    """
    figures = {Path(folder) / f"sweep-{name}.png": figure for name, figure in plot_sweep(result).items()}
    for path, figure in figures.items():
        save_figure(figure, path)
    return list(figures)


@dataclass(frozen=True)
class _Scale:
    """What all pictures of a sweep have in common."""

    name: str
    rises: bool
    log: bool
    norm: Any
    span: tuple[float, float]

    @classmethod
    def of(cls, result: Sweep) -> _Scale:
        """From the worst median to the best, logarithmic for positive losses of different orders."""
        from matplotlib.colors import LogNorm, Normalize

        cells = [cell for grid in result.grids for cell in result.cells(grid) if cell.median is not None]
        medians = [cell.median for cell in cells if cell.median is not None]
        every = [value for cell in cells for value in (cell.best, cell.median, cell.worst) if value is not None]
        log = not result.measure.rises and min(every, default=0.0) > 0 and max(every) > RATIO * min(every)
        norm = (LogNorm if log else Normalize)(*_roomy(medians, 0.0))
        return cls(str(result.measure), result.measure.rises, log, norm, _roomy(every, 0.06, log=log))


def _roomy(values: Sequence[float], share: float, *, log: bool = False) -> tuple[float, float]:
    """The range of some values with a share of it more on either side; a value alone is in the middle."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if log:
        factor = (high / low) ** share
        return low / factor, high * factor
    room = share * (high - low) if high > low else 0.05 * abs(low) or 1.0
    return low - room, high + room


def _folded(result: Sweep, grid: Grid) -> dict[tuple[Value, ...], Cell | None]:
    """For each place on the first two axes the best cell there, else any that was run, else None."""
    axes = grid.axes[:2]
    places: dict[tuple[Value, ...], list[Cell]] = {}
    for cell in result.cells(grid):
        places.setdefault(tuple(cell.options[key] for key in axes), []).append(cell)
    made = {place: [cell for cell in cells if cell.runs] for place, cells in places.items()}
    return {place: best_of(cells, result.measure) or next(iter(cells), None) for place, cells in made.items()}


def _draw_map(ax: Axes, grid: Grid, cells: dict[tuple[Value, ...], Cell | None], scale: _Scale) -> None:
    import matplotlib

    (across, up), found = grid.axes[:2], [cell.median for cell in cells.values() if cell and cell.median is not None]
    best = (max if scale.rises else min)(found, default=None)
    colours = matplotlib.colormaps["viridis" if scale.rises else "viridis_r"]
    for x, first in enumerate(grid.values[across]):
        for y, second in enumerate(grid.values[up]):
            _draw_cell(ax, (x, y), cells[first, second], colours, scale, best)
    for axis, key in ((ax.xaxis, across), (ax.yaxis, up)):
        axis.set_ticks(range(len(grid.values[key])), [format_value(value) for value in grid.values[key]])
        axis.set_label_text(key)
        axis.labelpad = 10  # an underscore of a name is not to touch a number
        axis.set_tick_params(length=0)
    ax.set(xlim=(-0.5, len(grid.values[across]) - 0.5), ylim=(-0.5, len(grid.values[up]) - 0.5))
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(matplotlib.cm.ScalarMappable(scale.norm, colours), ax=ax, label=scale.name)
    bar.outline.set_visible(False)


def _draw_cell(
    ax: Axes, place: tuple[int, int], cell: Cell | None, colours: Any, scale: _Scale, best: float | None
) -> None:
    from matplotlib.patches import Rectangle

    box: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.8"}
    text, ink = "", "black"
    if cell is not None and cell.median is None:
        box = {"facecolor": _GREY, "edgecolor": "0.6", "hatch": "//"}
        text = f"{cell.failed}/{cell.runs} failed"
    elif cell is not None and cell.median is not None:
        colour = colours(scale.norm(cell.median))
        box = {"facecolor": colour, "edgecolor": "white"}
        text = f"{cell.median:.3g}" + (f"\n{cell.failed}/{cell.runs} failed" if cell.failed else "")
        # Relative luminance of the background.
        ink = "black" if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 0.5 else "white"
    x, y = place
    ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, linewidth=1, **box))
    ax.text(x, y, text, ha="center", va="center", color=ink, fontsize=13, bbox=_PATCH if "hatch" in box else None)
    if cell is not None and best is not None and cell.median == best:
        ax.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=COLOURS[1], linewidth=3.5))


def _draw_line(ax: Axes, grid: Grid, cells: dict[tuple[Value, ...], Cell | None], scale: _Scale) -> None:
    """Medians from value to value, whiskers from the best seed to the worst that did not fail."""
    # What is not a number interrupts the line.
    heights = [math.nan if cell is None or cell.median is None else cell.median for cell in cells.values()]
    ax.plot(range(len(heights)), heights, "o-", color=COLOURS[0], linewidth=2.6, markersize=8)
    for x, cell in enumerate(cells.values()):
        if cell is None:
            continue
        words = f"{cell.failed}/{cell.runs} failed" if cell.failed else ""
        if cell.median is None:
            ax.axvspan(x - 0.4, x + 0.4, facecolor=_GREY, edgecolor="0.6", hatch="//", zorder=1.8)
            ax.text(x, 0.5, words, transform=ax.get_xaxis_transform(), ha="center", fontsize=13, bbox=_PATCH)
        else:
            ends = [end for end in (cell.best, cell.median, cell.worst) if end is not None]
            ax.vlines(x, min(ends), max(ends), color=COLOURS[0], linewidth=5, alpha=0.3)
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1} if words else None
            ax.annotate(words, (x, cell.median), (10, 6), textcoords="offset points", fontsize=12, bbox=ground)
    axes = grid.axes[:1]
    ax.set_xticks(range(len(cells)), [format_value(place[0]) if axes else grid.name for place in cells])
    ax.set_xlim(-0.5, len(cells) - 0.5)
    if axes:
        ax.set_xlabel(axes[0])
    ax.set_ylabel(scale.name)
    ax.set(yscale="log" if scale.log else "linear", ylim=scale.span)
    ax.grid(visible=True, which="major", axis="y", color="0.92", linewidth=1)
