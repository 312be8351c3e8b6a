"""Pictures drawn to be shown: training loss, sweeps of options, flows, twins, action, certificates.

Needs the extra ``plotting``; matplotlib is imported when something is drawn.
"""

from pullback.plotting.certificates import plot_pairs, plot_rates, save_certificate
from pullback.plotting.flows import plot_flow, save_flow
from pullback.plotting.losses import plot_loss, save_plot
from pullback.plotting.ode import plot_density, plot_times, plot_trajectories, save_ode
from pullback.plotting.stability import plot_action, plot_twins, save_action, save_twins
from pullback.plotting.style import require_matplotlib, save_figure
from pullback.plotting.sweeps import plot_sweep, save_sweep

__all__ = [
    "plot_action",
    "plot_density",
    "plot_flow",
    "plot_loss",
    "plot_pairs",
    "plot_rates",
    "plot_sweep",
    "plot_times",
    "plot_trajectories",
    "plot_twins",
    "require_matplotlib",
    "save_action",
    "save_certificate",
    "save_figure",
    "save_flow",
    "save_ode",
    "save_plot",
    "save_sweep",
    "save_twins",
]
