"""What all pictures have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pullback.problems.errors import missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, told apart by colour-blind eyes and on a projector.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#7F7F7F")
# What is positive and differs by more than this factor gets a logarithmic axis: run times, losses of a sweep.
RATIO = 8.0
STYLE: Any = {
    "font.size": 14,
    "axes.titlesize": 16,
    "axes.labelsize": 15,
    "legend.fontsize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def require_matplotlib() -> None:
    """Checks that drawing will be possible, for callers that compute for long before they draw.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing_extra("drawing", "matplotlib", "plotting") from error


@contextmanager
def panels(
    count: int, width: float, height: float, title: str = "", **options: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with panels side by side, to be drawn on inside the context, where the style holds.

    Args:
        count: How many.
        width: Of the figure, in inches.
        height: Likewise.
        title: What stands above all of them; empty for nothing.
        **options: Of `Figure.subplots`.

    Yields:
        The figure and its axes.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        # Rather than pyplot: no global state, no window, nothing to close.
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = list(figure.subplots(1, count, squeeze=False, **options)[0])
        if title:
            figure.suptitle(title, fontsize=16)
        yield figure, axes


def legend_below(figure: Figure, axes: Sequence[Axes], columns: int = 2) -> None:
    """One legend for all panels under them, each label once.

    Args:
        figure: Where it goes.
        axes: Whose lines it names.
        columns: In how many columns.
    """
    lines = {str(line.get_label()): line for ax in axes for line in ax.get_legend_handles_labels()[0]}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=columns, frameon=False)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a figure into a file.

    Args:
        figure: Of one of the functions of this package.
        path: The file; its folder exists, its suffix decides the format.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path)
    figure.savefig(path, dpi=160)
    return path
