"""From criterion modules to their output metrics and the exact weight of every cell."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from pullback.errors import MetricError
from pullback.metric.base import OutputMetric
from pullback.metric.criteria import CRITERIA, HINTS, known
from pullback.metric.empirical import Empirical
from pullback.metric.hessian import LossHessian
from pullback.metric.sampled import Sampled

#: One criterion, or several (one per head of the model) in a list or dict.
Criteria = nn.Module | None | Sequence[nn.Module] | Mapping[str, nn.Module]
#: One metric, or as many as criteria in the same form; None takes the criterion's own.
Metrics = OutputMetric | None | Sequence[OutputMetric | None] | Mapping[str, OutputMetric | None]


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
    if metric is None:
        return _own(criterion)
    if isinstance(metric, Sampled | Empirical) and metric.metric is None:
        metric.bind(_own(criterion))
    inner = metric.metric if isinstance(metric, Sampled | Empirical) else metric
    if isinstance(inner, LossHessian):
        if criterion is None:
            raise MetricError(
                "LossHessian needs the target, which only a criterion module is seen with; wrap the loss in an "
                "nn.Module and call that."
            )
        inner.bind(criterion)
    return metric


def _own(criterion: nn.Module | None) -> OutputMetric:
    """The metric of a known criterion."""
    if criterion is None:
        raise MetricError("Without a criterion the metric must be stated, as in metric=Gaussian().")
    entry = known(criterion)
    if entry is not None:
        return entry.metric(criterion)
    name, names = type(criterion).__name__, sorted(kind.__name__ for kind in CRITERIA)
    close = difflib.get_close_matches(name, names, 1)
    hint = HINTS.get(name) or (f"did you mean {close[0]}?" if close else "state it, as in metric=LossHessian()")
    raise MetricError(f"No metric is known for {name} (known: {', '.join(names)}); {hint}.")


def resolve_all(criterion: Criteria, metric: Metrics = None) -> list[tuple[nn.Module | None, OutputMetric]]:
    """Every criterion with its metric.

    Args:
        criterion: one loss module, or None when the loss is functional; or several, one per head of the
            model, in a list or dict (also ``nn.ModuleList``, ``nn.ModuleDict``).
        metric: as for one criterion; for several None, or as many in the same form.

    Raises:
        MetricError: as :func:`resolve`; if there is none, or one is given twice.
        TypeError: likewise; if metrics do not match criteria.
    """
    if isinstance(criterion, nn.ModuleDict | Mapping):
        named: dict[Any, Any] = dict(criterion.items())
    elif isinstance(criterion, nn.ModuleList | list | tuple):
        named = dict(enumerate(criterion))
    else:
        # Whatever is neither module nor metric is named by resolve.
        return [(cast("nn.Module | None", criterion), resolve(criterion, cast("OutputMetric | None", metric)))]
    metrics = _matching(named, metric)
    if not named:
        raise MetricError("No criterion was given; pass at least one, or None with a metric.")
    if len({id(c) for c in named.values()}) < len(named):
        raise MetricError("A criterion is given twice; give it once, every use of it in the loop is seen.")
    for key, one in named.items():
        if one is None:
            raise TypeError(f"Criterion {key!r} is None; several criteria must all be modules.")
    return [(one, resolve(one, metrics[key])) for key, one in named.items()]


def _matching(named: Mapping[Any, Any], metric: Metrics) -> Mapping[Any, Any]:
    """Metrics under the keys of the criteria."""
    if metric is None:
        return dict.fromkeys(named)
    if isinstance(metric, Mapping):
        metrics: dict[Any, Any] = dict(metric)
    elif isinstance(metric, list | tuple):
        metrics = dict(enumerate(metric))
    else:
        raise TypeError(
            f"Several criteria need as many metrics in the same form, got {metric!r}; None takes their own."
        )
    if set(metrics) != set(named):
        raise TypeError(
            f"Metrics {sorted(map(str, metrics))} do not match criteria {sorted(map(str, named))}; "
            "give one for each, None for a criterion's own."
        )
    return metrics


def cell_weights(
    criterion: nn.Module | None,
    metric: OutputMetric,
    z: Tensor,
    target: Tensor | None,
    samples: int,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Weight of every cell in the criterion's value, broadcastable to the cells; at least zero.

    Args:
        criterion: the loss module that was called, or None.
        metric: the metric in use.
        z: prediction it was called with.
        target: target it was called with.
        samples: number of independent samples.
        args: what it was called with after the target (a variance).
        kwargs: likewise by keyword.

    Raises:
        MetricError: if prediction and target do not fit each other.
    """
    entry = None if criterion is None or metric.own_weights else known(criterion)
    if entry is None or target is None:
        return metric.default_weight(z, samples)
    return entry.weights(criterion, z, target, *args, **(kwargs or {})).to(z.dtype)
