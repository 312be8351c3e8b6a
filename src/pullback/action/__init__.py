"""The Freidlin-Wentzell action of training, and backpropagation as the stationary point of a Lagrangian.

See docs/theory 16. Length and energy of a path are in :mod:`pullback.flow`, as is the action of outputs beside the
adapted flow.
"""

from pullback.action.lagrangian import Lagrangian, Residuals, Stationary
from pullback.action.metrics import Local, ParameterMetric, PulledBack, VaryingMetric
from pullback.action.path import metric_flow, path_action, steps_action
from pullback.action.record import Action
from pullback.action.recorder import ActionRecorder

__all__ = [
    "Action",
    "ActionRecorder",
    "Lagrangian",
    "Local",
    "ParameterMetric",
    "PulledBack",
    "Residuals",
    "Stationary",
    "VaryingMetric",
    "metric_flow",
    "path_action",
    "steps_action",
]
