"""What all pictures have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pullback.problems.errors import missing_extra

if TYPE_CHECKING:
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
