"""The metric of Gaussian outputs: least squares, Euclidean or with a given precision."""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.errors import MetricError
from pullback.metric.base import ElementwiseMetric, alike, spread


class Gaussian(ElementwiseMetric):
    r"""Metric of :math:`\phi(z, y) = \tfrac12 (z - y)^\top P (z - y)`, the identity unless P is given.

    The weight of a cell carries the scale of the loss: ``MSELoss`` with ``reduction="mean"`` has weight
    :math:`2 / (N d)` (theory 1).

    Args:
        precision: P over the last axis of the prediction: None (the identity), shape ``(d,)`` (a diagonal),
            or ``(d, d)`` (symmetric, positive definite).
        scale: as in :class:`~pullback.metric.OutputMetric`.
        reduction: likewise.

    Raises:
        MetricError: if the precision is not one.
    """

    def __init__(self, precision: Tensor | None = None, *, scale: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(scale=scale, reduction=reduction)
        self.precision = None if precision is None else precision.detach()
        self._triangle: Tensor | None = None
        if self.precision is not None:
            self._triangle = _checked(self.precision)

    def _of(self, z: Tensor, matrix: Tensor) -> Tensor:
        """The matrix or diagonal in the dtype and on the device of z, if it fits."""
        if matrix.shape[0] != (z.shape[-1] if z.ndim > 1 else 1):
            raise MetricError(
                f"The precision has shape {tuple(matrix.shape)} and the prediction {tuple(z.shape)}; they must "
                "agree along the prediction's last axis."
            )
        return matrix.to(dtype=z.dtype, device=z.device)

    def variance(self, z: Tensor, target: Tensor | None = None) -> Tensor:
        """All ones, or the diagonal precision."""
        return torch.ones_like(z) if self.precision is None else self._of(z, self.precision).expand_as(z)

    def cells(self, z: Tensor) -> tuple[int, ...]:
        """Every number, or every vector along the last axis if a matrix joins its numbers."""
        return tuple(z.shape) if self._triangle is None else tuple(z.shape[:-1])

    def _scale(self, z: Tensor, weight: Tensor) -> Tensor:
        """Root weight of every vector, shape ``cells(z)``."""
        if weight.ndim == z.ndim:
            weight = alike(weight.expand(z.shape))
        return weight.expand(self.cells(z)).sqrt()

    def factor(self, z: Tensor, weight: Tensor, samples: int, target: Tensor | None = None) -> Tensor:
        """Columns of the Cholesky factor where the precision is a matrix. See the base class."""
        if self._triangle is None:
            return super().factor(z, weight, samples, target)
        L = self._of(z, self._triangle)
        columns = L.T.view(-1, *(1,) * (z.ndim - 1), z.shape[-1]) * self._scale(z, weight)[..., None]
        return spread(columns, samples, axis=z.ndim - 1)

    def coordinates(
        self, z: Tensor, weight: Tensor, costate: Tensor, samples: int, target: Tensor | None = None
    ) -> Tensor:
        """Forward substitution where the precision is a matrix. See the base class."""
        if self._triangle is None:
            return super().coordinates(z, weight, costate, samples, target)
        d, scale = z.shape[-1], self._scale(z, weight).reshape(-1)
        solved = torch.linalg.solve_triangular(self._of(z, self._triangle), costate.reshape(-1, d).T, upper=False)
        e0 = torch.where(scale > 0, solved / scale, torch.zeros_like(solved))
        # Order of the positions as `spread` has it: column, position; sample last.
        return e0.view(d, samples, -1).transpose(1, 2).reshape(-1, samples)

    def draw(self, z: Tensor, weight: Tensor, generator: torch.Generator, target: Tensor | None = None) -> Tensor:
        """Independent signs times the root. See the base class."""
        if self._triangle is None:
            return super().draw(z, weight, generator, target)
        signs = torch.randint(0, 2, z.shape, generator=generator, device=z.device).to(z.dtype).mul_(2).sub_(1)
        return signs @ self._of(z, self._triangle).T * self._scale(z, weight)[..., None]

    def _options(self) -> str:
        shape = [] if self.precision is None else [f"precision of shape {tuple(self.precision.shape)}"]
        return ", ".join(filter(None, [*shape, super()._options()]))


def _checked(precision: Tensor) -> Tensor | None:
    """Cholesky factor of a matrix of precisions, None for a diagonal."""
    if not precision.is_floating_point() or precision.ndim not in (1, 2):
        raise MetricError(
            f"precision must be a floating tensor of shape (d,) or (d, d), got {precision.dtype} of shape "
            f"{tuple(precision.shape)}."
        )
    if precision.ndim == 1:
        if not bool((precision > 0).all()):
            raise MetricError("precision must be positive; leave an output out of the loss instead of giving it 0.")
        return None
    symmetric = precision.shape[0] == precision.shape[1] and torch.allclose(precision, precision.T)
    triangle, info = torch.linalg.cholesky_ex(precision) if symmetric else (precision, None)
    if info is None or int(info):
        raise MetricError(
            "A matrix of precisions must be symmetric and positive definite; add a small multiple of the identity."
        )
    return triangle
