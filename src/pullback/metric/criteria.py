"""The criteria of torch: the output metric of each, and the exact weight of every cell in its value.

One function per criterion class gives the weights with which the *criterion's own value* is a weighted sum
over cells; the tape multiplies them by the gradient that reaches the criterion's output, which is how
``loss / 4``, ``reduction="none"`` and sums of several losses come out exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pullback.errors import MetricError
from pullback.metric.base import OutputMetric
from pullback.metric.bernoulli import Bernoulli
from pullback.metric.categorical import Categorical
from pullback.metric.gaussian import Gaussian
from pullback.metric.huber import Huber
from pullback.metric.poisson import Poisson


@dataclass(frozen=True)
class Known:
    """What is known of a criterion class.

    Attributes:
        metric: the metric of an instance.
        weights: weights of the cells, from the criterion and what it was called with.
    """

    metric: Callable[[Any], OutputMetric]
    weights: Callable[..., Tensor]


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
    # Numbers that are not finite are left to the step, which says so.
    if math.isfinite(excess) and excess >= 1e3 * torch.finfo(z.dtype).eps:
        raise MetricError(
            f"NLLLoss got log-probabilities whose exponentials miss 1 by {excess:.1e}; "
            "end the model in log_softmax, or use CrossEntropyLoss on logits."
        )
    return _class_weights(z, target, criterion.weight, criterion.ignore_index, criterion.reduction, 0.0)


def _per_number(criterion: Any, z: Tensor, target: Tensor) -> Tensor:
    """Every number of the prediction weighs one, or its share in the mean."""
    _same_shape(criterion, z, target)
    return z.new_full((1,) * z.ndim, 1.0 / z.numel() if criterion.reduction == "mean" else 1.0)


def _gaussian_nll(criterion: nn.GaussianNLLLoss, z: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
    """One over the variance, as the loss clamps and broadcasts it."""
    weight = _per_number(criterion, z, target)
    if isinstance(var, Tensor):
        if var.shape == z.shape[:-1] and var.shape != z.shape:
            var = var.unsqueeze(-1)
        if torch.broadcast_shapes(var.shape, z.shape) != z.shape:
            raise MetricError(
                f"GaussianNLLLoss got predictions {tuple(z.shape)} and variances {tuple(var.shape)}, which would "
                "broadcast the predictions; give both the same shape."
            )
        return weight / var.detach().to(z.dtype).clamp_min(criterion.eps)
    return weight / max(var, criterion.eps)


def _smooth_l1(criterion: nn.SmoothL1Loss, z: Tensor, target: Tensor) -> Tensor:
    return _per_number(criterion, z, target) / criterion.beta


def _smooth_l1_metric(criterion: nn.SmoothL1Loss) -> Huber:
    if not criterion.beta > 0:
        raise MetricError("SmoothL1Loss with beta=0 is L1Loss, whose Hessian is zero; give it a positive beta.")
    return Huber(criterion.beta)


CRITERIA: dict[type[nn.Module], Known] = {
    nn.MSELoss: Known(lambda c: Gaussian(), _mse),
    nn.CrossEntropyLoss: Known(lambda c: Categorical(), _cross_entropy),
    nn.NLLLoss: Known(lambda c: Categorical(), _nll),
    nn.BCEWithLogitsLoss: Known(lambda c: Bernoulli(), _bce),
    nn.PoissonNLLLoss: Known(lambda c: Poisson(c.log_input, eps=c.eps), _per_number),
    nn.GaussianNLLLoss: Known(lambda c: Gaussian(), _gaussian_nll),
    nn.HuberLoss: Known(lambda c: Huber(c.delta), _per_number),
    nn.SmoothL1Loss: Known(_smooth_l1_metric, _smooth_l1),
}

#: What to do instead, for criteria that have no metric.
HINTS = {
    "BCELoss": "use BCEWithLogitsLoss on the logits",
    "L1Loss": "its Hessian is zero; use MSELoss or HuberLoss, or metric=Gaussian()",
}


def known(criterion: nn.Module) -> Known | None:
    """What is known of a criterion; a subclass that changes ``forward`` is another loss."""
    for base, entry in CRITERIA.items():
        if isinstance(criterion, base) and type(criterion).forward is base.forward:
            return entry
    return None
