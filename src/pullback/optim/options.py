"""Options: small frozen objects, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

from pullback.curvature import Mass, Partition, Space
from pullback.metric import Metrics

Control = Literal["gain", "slope", "fixed"]


@dataclass(frozen=True, kw_only=True)
class Momentum:
    """How the previous step enters the next one.

    Attributes:
        kind: ``"model"`` minimises the quadratic model in the plane of the new direction and the previous
            step: nothing to tune, and nothing gained where all modules solve jointly (their direction is the
            minimiser already). ``"spring"`` damps towards a fraction of the previous step instead of
            towards zero, which averages noisy batches.
        decay: that fraction, for ``"spring"``.
    """

    kind: Literal["model", "spring"] = "model"
    decay: float = 0.8

    def __post_init__(self) -> None:
        if self.kind not in ("model", "spring"):
            raise ValueError(f"Momentum(kind=...) must be 'model' or 'spring', got {self.kind!r}.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"Momentum(decay=...) must be at least 0 and below 1, got {self.decay}.")


@dataclass(frozen=True, kw_only=True)
class Damping:
    """How the mass mu of the metric M = mu I + U^T U is chosen.

    Attributes:
        initial: first mu, relative to the mean diagonal of the Gram U U^T at the first step.
        control: ``"gain"`` tries each step on its own batch, undoes it if it raises the loss, and adapts mu:
            by the gain ratio while the batch stays the same, by the slope that the next batch finds along
            the step when batches change. ``"slope"`` does the latter without a trial loss. ``"fixed"``
            keeps mu relative to the mean diagonal of the Gram and takes every step.
        trials: most steps tried per call of ``step``, each with a larger mu than the one before.
        arc: where steps are found in closed loop (``FeedbackGaussNewton``, ``GaussNewton(geodesic=True)``) and one
            raises the loss, whether others are tried from the same factors before mu grows: without the anticipated
            part, then a half, a quarter and an eighth along the arc. None does so while the batch stays the same;
            False is Nielsen's plain rule, True the arc on changing batches too. It has no meaning elsewhere.
        smallest: lower bound of mu relative to the mean diagonal of the Gram; None takes what the dtype of
            the solve can resolve.
        largest: upper bound, likewise.
    """

    initial: float = 1.0
    control: Control = "gain"
    trials: int = 6
    arc: bool | None = None
    smallest: float | None = None
    largest: float = 1e8

    def __post_init__(self) -> None:
        if not (self.initial > 0 and math.isfinite(self.initial)):
            raise ValueError(f"Damping(initial=...) must be positive and finite, got {self.initial}.")
        if self.control not in get_args(Control):
            raise ValueError(f"Damping(control=...) must be 'gain', 'slope' or 'fixed', got {self.control!r}.")
        if self.trials < 1:
            raise ValueError(f"Damping(trials=...) must be at least 1, got {self.trials}.")
        if self.smallest is not None and not 0 < self.smallest <= self.largest:
            raise ValueError(f"Damping needs 0 < smallest <= largest, got {self.smallest} and {self.largest}.")


class Options(TypedDict, total=False):
    """The keyword arguments of every optimizer; :class:`pullback.optim.base.PullbackOptimizer` says what they mean."""

    metric: Metrics
    partition: Partition | None
    damping: Damping | None
    mass: Mass
    momentum: Momentum | None
    solver: Space
    memory: float | None
    lr: float
    weight_decay: float
    ridge: float
    sweep: str
    batch_norm: str
    fallback: Callable[[list[Tensor]], torch.optim.Optimizer] | None
    grad_scaler: torch.amp.GradScaler | None
    params: Iterable[Any] | None
