"""From a criterion module to its output metric and the exact weight of every cell.

One function per criterion class. Each returns the metric and the weights with which the *criterion's own
value* is a weighted sum over cells; the tape multiplies them by the gradient that reaches the criterion's
output, which is how ``loss / 4``, ``reduction="none"`` and sums of several losses come out exact.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pullback.errors import MetricError
from pullback.metric.base import OutputMetric
from pullback.metric.bernoulli import Bernoulli
from pullback.metric.categorical import Categorical
from pullback.metric.gaussian import Gaussian

Resolver = Callable[[Any, Tensor, Tensor], Tensor]


def _same_shape(criterion: nn.Module, z: Tensor, target: Tensor) -> None:
    if z.shape != target.shape:
        raise MetricError(
            f"{type(criterion).__name__} got predictions {tuple(z.shape)} and targets {tuple(target.shape)}, "
            "which would broadcast; give both the same shape."
        )


def _classes(criterion: nn.Module, z: Tensor, target: Tensor) -> None:
    expected = (z.shape[0], *z.shape[2:]) if z.ndim >= 2 else None
    if expected is None or tuple(target.shape) != expected:
        raise MetricError(
            f"{type(criterion).__name__} got predictions {tuple(z.shape)} and targets {tuple(target.shape)}; "
            "predictions must be (N, C, ...) and class targets (N, ...)."
        )


def _mse(criterion: nn.MSELoss, z: Tensor, target: Tensor) -> Tensor:
    _same_shape(criterion, z, target)
    weight = 2.0 / z.numel() if criterion.reduction == "mean" else 2.0
    return z.new_full((1,) * z.ndim, weight)


def _bce(criterion: nn.BCEWithLogitsLoss, z: Tensor, target: Tensor) -> Tensor:
    _same_shape(criterion, z, target)
    weight = z.new_ones((1,) * z.ndim)
    if criterion.pos_weight is not None:
        weight = weight * (1 + (criterion.pos_weight - 1) * target)
    if criterion.weight is not None:
        weight = weight * criterion.weight
    return weight / z.numel() if criterion.reduction == "mean" else weight


def _class_weights(
    z: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> Tensor:
    """Weights of class-index targets: (1 - eps) w_y + eps mean(w), over sum(w_y) under ``"mean"``."""
    kept = target != ignore_index
    if weight is None:
        own = kept.to(z.dtype)
        value = own
    else:
        own = weight[torch.where(kept, target, torch.zeros_like(target))] * kept
        value = own
        if smoothing:
            value = ((1 - smoothing) * own + smoothing * weight.mean()) * kept
    if reduction == "mean":
        # An all-ignored batch is 0 / 0 in the loss itself; here its rows are simply zero.
        value = value / own.sum().clamp_min(torch.finfo(z.dtype).tiny)
    return value


def _cross_entropy(criterion: nn.CrossEntropyLoss, z: Tensor, target: Tensor) -> Tensor:
    smoothing = criterion.label_smoothing
    if target.is_floating_point():
        _same_shape(criterion, z, target)
        soft = (1 - smoothing) * target + smoothing / z.shape[1]
        if criterion.weight is not None:
            soft = soft * criterion.weight.reshape(1, -1, *(1,) * (z.ndim - 2))
        value = soft.sum(1)
        return value / value.numel() if criterion.reduction == "mean" else value
    _classes(criterion, z, target)
    return _class_weights(z, target, criterion.weight, criterion.ignore_index, criterion.reduction, smoothing)


def _nll(criterion: nn.NLLLoss, z: Tensor, target: Tensor) -> Tensor:
    _classes(criterion, z, target)
    excess = float(torch.logsumexp(z, 1).abs().amax())
    if not excess < 1e3 * torch.finfo(z.dtype).eps:
        raise MetricError(
            f"NLLLoss got log-probabilities whose exponentials miss 1 by {excess:.1e}; "
            "end the model in log_softmax, or use CrossEntropyLoss on logits."
        )
    return _class_weights(z, target, criterion.weight, criterion.ignore_index, criterion.reduction, 0.0)


_TABLE: dict[type[nn.Module], tuple[type[OutputMetric], Resolver]] = {
    nn.MSELoss: (Gaussian, _mse),
    nn.CrossEntropyLoss: (Categorical, _cross_entropy),
    nn.NLLLoss: (Categorical, _nll),
    nn.BCEWithLogitsLoss: (Bernoulli, _bce),
}

_HINTS = {
    "BCELoss": "use BCEWithLogitsLoss on the logits",
    "L1Loss": "its Hessian is zero; use MSELoss, or metric=Gaussian()",
}


def _entry(criterion: nn.Module) -> tuple[type[OutputMetric], Resolver] | None:
    for base, entry in _TABLE.items():
        # A subclass that changes forward is another loss.
        if isinstance(criterion, base) and type(criterion).forward is base.forward:
            return entry
    return None


def resolve(criterion: object, metric: OutputMetric | None) -> OutputMetric:
    """The output metric to use: the one given, else the criterion's own.

    Args:
        criterion: the loss module, or None when the loss is functional.
        metric: the user's choice, or None.

    Raises:
        MetricError: if neither says what the metric is.
        TypeError: if the criterion is not a module.
    """
    if criterion is not None and not isinstance(criterion, nn.Module):
        name = getattr(criterion, "__name__", type(criterion).__name__)
        raise TypeError(
            f"criterion must be an nn.Module such as nn.CrossEntropyLoss(), got {name}; for a functional loss "
            "pass criterion=None with metric=..., and give step() a closure."
        )
    if metric is not None and not isinstance(metric, OutputMetric):
        raise TypeError(f"metric must be a pullback metric such as Gaussian(), got {metric!r}.")
    entry = None if criterion is None else _entry(criterion)
    inner = getattr(metric, "metric", metric)
    if inner is None:
        if criterion is None:
            raise MetricError("Without a criterion the metric must be stated, as in metric=Gaussian().")
        if entry is None:
            name = type(criterion).__name__
            known = sorted(k.__name__ for k in _TABLE)
            close = difflib.get_close_matches(name, known, 1)
            hint = _HINTS.get(name) or (f"did you mean {close[0]}?" if close else "state it with metric=...")
            raise MetricError(f"No metric is known for {name} (known: {', '.join(known)}); {hint}.")
        if metric is None:
            return entry[0]()
        metric.bind(entry[0]())  # type: ignore[attr-defined]  # only Sampled has an open inner metric
    assert metric is not None
    return metric


def cell_weights(
    criterion: nn.Module | None, metric: OutputMetric, z: Tensor, target: Tensor | None, samples: int
) -> Tensor:
    """Weight of every cell in the criterion's value, broadcastable to the cells; at least zero.

    Args:
        criterion: the loss module that was called, or None.
        metric: the metric in use.
        z: prediction it was called with.
        target: target it was called with.
        samples: number of independent samples.

    Raises:
        MetricError: if prediction and target do not fit each other.
    """
    entry = None if criterion is None else _entry(criterion)
    if entry is None or target is None:
        return metric.default_weight(z, samples)
    return entry[1](criterion, z, target).to(z.dtype)
