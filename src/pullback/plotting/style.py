"""What all pictures have in common."""

from __future__ import annotations

from typing import Any

from pullback.problems.errors import missing_extra

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
