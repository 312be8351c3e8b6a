"""The Hessian of losses that are quadratic near the target and linear far from it."""

from __future__ import annotations

from torch import Tensor

from pullback.errors import MetricError
from pullback.metric.base import ElementwiseMetric


class Huber(ElementwiseMetric):
    r"""Hessian of ``nn.HuberLoss``: one where :math:`|z - y| < \delta`, zero elsewhere.

    An output far from its target has no curvature: its slope is not in the range of the metric and stays in
    the remainder of the gradient, where the mass mu alone limits the step.

    Args:
        delta: where the loss turns linear.
        scale: as in :class:`~pullback.metric.OutputMetric`.
        reduction: likewise.
    """

    def __init__(self, delta: float = 1.0, *, scale: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(scale=scale, reduction=reduction)
        if not delta > 0:
            raise MetricError(f"delta must be positive, got {delta}; at 0 the loss is L1 and has no Hessian.")
        self.delta = float(delta)

    def variance(self, z: Tensor, target: Tensor | None = None) -> Tensor:
        """Ones inside, zeros outside.

        Raises:
            MetricError: without a target of the prediction's shape.
        """
        if target is None or target.shape != z.shape:
            got = "none" if target is None else f"one of shape {tuple(target.shape)}"
            raise MetricError(
                f"Huber needs a target of shape {tuple(z.shape)}, got {got}; use nn.HuberLoss as the criterion."
            )
        return ((z - target.to(z.dtype)).abs() < self.delta).to(z.dtype)

    def _options(self) -> str:
        return ", ".join(filter(None, [f"delta={self.delta:g}", super()._options()]))
