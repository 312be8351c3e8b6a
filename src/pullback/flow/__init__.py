"""Adapted flows: gradient descent in output space, with a stopping time known beforehand (C; docs/theory 14).

Integration by torchdiffeq needs the extra ``flow``; the discrete scheme does not.
"""

from pullback.flow.adapted import AdaptedFlow, flow
from pullback.flow.aims import Aim, Squared
from pullback.flow.classes import CrossEntropy
from pullback.flow.endpoint import EndPoint
from pullback.flow.errors import FlowError
from pullback.flow.geometry import (
    Horizontal,
    action,
    energy,
    flow_time,
    horizontal_at,
    length,
    lift_path,
    straight_time,
)
from pullback.flow.record import Certificate, FlowRun, Loss, Moment

__all__ = [
    "AdaptedFlow",
    "Aim",
    "Certificate",
    "CrossEntropy",
    "EndPoint",
    "FlowError",
    "FlowRun",
    "Horizontal",
    "Loss",
    "Moment",
    "Squared",
    "action",
    "energy",
    "flow",
    "flow_time",
    "horizontal_at",
    "length",
    "lift_path",
    "straight_time",
]
