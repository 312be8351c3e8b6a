"""A user's own metric, as a function from predictions to factors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pullback.errors import MetricError
from pullback.metric.base import OutputMetric, alike


class Custom(OutputMetric):
    """A metric from a function ``z -> S``.

    Args:
        function: takes the prediction ``z`` of shape ``(N, *out)`` and returns per-sample factors of shape
            ``(N, d, r)``, d the product of ``out``: the metric of sample n is ``S[n] @ S[n].T``. It is the
            Hessian of one sample's loss, before weights and reduction.
        scale: as in :class:`~pullback.metric.OutputMetric`.
        reduction: likewise.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], *, scale: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(scale=scale, reduction=reduction)
        self.function = function

    def cells(self, z: Tensor) -> tuple[int, ...]:
        """One cell per sample."""
        return (z.shape[0],)

    def _factors(self, z: Tensor, weight: Tensor, samples: int) -> Tensor:
        if z.shape[0] != samples:
            raise MetricError(
                f"A custom metric needs predictions of shape (N, ...) with N = {samples} samples, got "
                f"{tuple(z.shape)}; do not flatten positions into the batch."
            )
        S = self.function(z)
        d = z[0].numel()
        if S.ndim != 3 or S.shape[:2] != (samples, d):
            raise MetricError(
                f"The metric function must return shape (N, d, r) = ({samples}, {d}, r), got "
                f"{tuple(S.shape)} for predictions of shape {tuple(z.shape)}."
            )
        if weight.ndim != 1:
            weight = alike(weight.expand_as(z).reshape(samples, -1))
        scaled: Tensor = S.detach().to(z.dtype) * weight.expand(samples).sqrt()[:, None, None]
        return scaled

    def factor(self, z: Tensor, weight: Tensor, samples: int, target: Tensor | None = None) -> Tensor:
        """See the base class."""
        S = self._factors(z, weight, samples)
        return S.permute(2, 0, 1).reshape(S.shape[2], *z.shape)

    def coordinates(
        self, z: Tensor, weight: Tensor, costate: Tensor, samples: int, target: Tensor | None = None
    ) -> Tensor:
        """Least squares per sample. See the base class."""
        S = self._factors(z, weight, samples)
        rhs = costate.reshape(samples, -1, 1)
        e0: Tensor = (torch.linalg.pinv(S) @ rhs)[..., 0].T
        return e0

    def __repr__(self) -> str:
        name = getattr(self.function, "__name__", repr(self.function))
        options = self._options()
        return f"Custom({name}{', ' + options if options else ''})"
