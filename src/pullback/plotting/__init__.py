"""Pictures drawn to be shown: training loss over seconds and over steps, what the options of a sweep do, flows.

Needs the extra ``plotting``; matplotlib is imported when something is drawn.
"""

from pullback.plotting.flows import plot_flow, save_flow
from pullback.plotting.losses import plot_loss, save_plot
from pullback.plotting.style import require_matplotlib
from pullback.plotting.sweeps import plot_sweep, save_sweep

__all__ = ["plot_flow", "plot_loss", "plot_sweep", "require_matplotlib", "save_flow", "save_plot", "save_sweep"]
