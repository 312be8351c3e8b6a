"""What an output metric is: a square root of a matrix, per sample, in prediction space.

Index convention of the whole package: ``a`` a column of the factor, ``n`` a sample, ``o`` an output number.
A factor is stored with its columns first, ``S[a, n, o...]``, because each column is one cotangent of the
prediction and is pulled back through the model exactly as a gradient is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pullback.errors import MetricError


class OutputMetric(ABC):
    r"""A metric :math:`G(z) = S S^\top` on predictions, given by its square-root factor.

    A subclass supplies :meth:`factor` and :meth:`coordinates`; :meth:`draw` has a default.

    Two layouts of a prediction ``z`` are told apart by the number of independent samples: ``z`` has shape
    ``(N * P, ...)`` with ``P = 1`` as a rule and ``P > 1`` when a sequence was flattened into the batch.
    Weights are per *cell*, the smallest part of ``z`` the loss is a sum over (see :meth:`cells`).

    Attributes:
        exact: whether ``S S^T`` is the metric itself (True) or an unbiased sketch of it.
        own_weights: whether :meth:`default_weight` holds even where the criterion's weights are known.
        scale: factor of the loss when no criterion states the weights (see :meth:`default_weight`).
        reduction: ``"mean"`` (over samples) or ``"sum"``, likewise.
    """

    exact: bool = True
    own_weights: bool = False

    def __init__(self, *, scale: float = 1.0, reduction: str = "mean") -> None:
        if not scale > 0:
            raise MetricError(f"scale must be positive, got {scale}; it multiplies the loss.")
        if reduction not in ("mean", "sum"):
            raise MetricError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
        self.scale = float(scale)
        self.reduction = reduction

    @abstractmethod
    def cells(self, z: Tensor) -> tuple[int, ...]:
        """Shape of the loss before its reduction, which is the shape of the weights."""

    @abstractmethod
    def factor(self, z: Tensor, weight: Tensor, samples: int, target: Tensor | None = None) -> Tensor:
        r"""Square root of the weighted metric, :math:`S S^\top = \nabla^2_z \sum_c w_c \phi_c`.

        Args:
            z: prediction, shape ``(N * P, *out)``, detached.
            weight: weight of every cell, broadcastable to ``cells(z)``, at least zero.
            samples: number N of independent samples.
            target: what the criterion compared z with, None if it is not known. Most metrics are of the
                prediction alone.

        Returns:
            Columns first, shape ``(r, N * P, *out)``; a column touches every sample, but in each sample it
            belongs to one row of U only.
        """

    @abstractmethod
    def coordinates(
        self, z: Tensor, weight: Tensor, costate: Tensor, samples: int, target: Tensor | None = None
    ) -> Tensor:
        r"""R-space residual :math:`e_0 = S^+ \lambda`, so that the gradient is :math:`U^\top e_0` (theory 2).

        Args:
            z: prediction, shape ``(N * P, *out)``.
            weight: as in :meth:`factor`.
            costate: gradient of the loss with respect to ``z``, same shape.
            samples: number N of independent samples.
            target: as in :meth:`factor`.

        Returns:
            Shape ``(r, N)``. What of the costate lies outside the range of S is left out; the caller
            finds it as the part of the gradient that ``U^T e_0`` does not explain.
        """

    def factor_at(
        self, z: Tensor, weight: Tensor, costate: Tensor, samples: int, target: Tensor | None = None
    ) -> Tensor:
        """The factor where the costate is known too; only an empirical metric looks at it.

        Args:
            z: as in :meth:`factor`.
            weight: as in :meth:`factor`.
            costate: gradient of the loss with respect to ``z``, same shape.
            samples: as in :meth:`factor`.
            target: as in :meth:`factor`.
        """
        del costate
        return self.factor(z, weight, samples, target)

    def columns(self, z: Tensor, samples: int) -> int:
        """Columns of :meth:`factor`, so that what it will take can be said before it is taken.

        Args:
            z: prediction, shape ``(N * P, *out)``.
            samples: number N of independent samples.

        Returns:
            Their number r or a lower bound; the default, 0, says nothing.
        """
        del z, samples
        return 0

    def draw(self, z: Tensor, weight: Tensor, generator: torch.Generator, target: Tensor | None = None) -> Tensor:
        """One zero-mean cotangent whose covariance is the weighted metric, shape of ``z``.

        The default multiplies the factor by Rademacher signs; a subclass may know a cheaper way.
        """
        S = self.factor(z, weight, z.shape[0], target)
        signs = torch.randint(0, 2, S.shape[:2], generator=generator, device=z.device)
        signs = signs.to(z.dtype).mul_(2).sub_(1)
        return torch.einsum("an,an...->n...", signs, S)

    def default_weight(self, z: Tensor, samples: int) -> Tensor:
        """Weight of every cell when no criterion states it: ``scale``, divided by N under ``"mean"``."""
        value = self.scale / samples if self.reduction == "mean" else self.scale
        return torch.full((1,) * len(self.cells(z)), value, dtype=z.dtype, device=z.device)

    def _options(self) -> str:
        parts = []
        if self.scale != 1.0:
            parts.append(f"scale={self.scale:g}")
        if self.reduction != "mean":
            parts.append(f"reduction={self.reduction!r}")
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._options()})"


class ElementwiseMetric(OutputMetric):
    """A metric that is diagonal in the prediction: one cell, one column per output number."""

    @abstractmethod
    def variance(self, z: Tensor, target: Tensor | None = None) -> Tensor:
        """Diagonal of G(z), shape of ``z``, at least zero.

        Args:
            z: prediction.
            target: as in :meth:`factor`.
        """

    def cells(self, z: Tensor) -> tuple[int, ...]:
        """Every number of the prediction is a cell."""
        return tuple(z.shape)

    def columns(self, z: Tensor, samples: int) -> int:
        """One per number. See the base class."""
        return z.numel() // samples

    def root(self, z: Tensor, weight: Tensor, target: Tensor | None = None) -> Tensor:
        """Square root of the weighted diagonal, shape of ``z``."""
        return (self.variance(z, target) * weight).sqrt_().expand_as(z)

    def factor(self, z: Tensor, weight: Tensor, samples: int, target: Tensor | None = None) -> Tensor:
        """Diagonal columns: column ``a`` holds output number ``a`` of every sample. See the base class."""
        return spread(self.root(z, weight, target)[None], samples, axis=0)

    def coordinates(
        self, z: Tensor, weight: Tensor, costate: Tensor, samples: int, target: Tensor | None = None
    ) -> Tensor:
        """``e_0 = lambda / root`` where the root is not zero. See the base class."""
        root = self.root(z, weight, target)
        # A saturated unit has no curvature to express its slope in: that slope stays in the remainder.
        tiny = root.new_tensor(torch.finfo(root.dtype).eps)
        e0 = torch.where(root > tiny * root.amax(), costate / root, torch.zeros_like(root))
        return e0.reshape(samples, -1).T

    def draw(self, z: Tensor, weight: Tensor, generator: torch.Generator, target: Tensor | None = None) -> Tensor:
        """Independent signs times the root. See the base class."""
        signs = torch.randint(0, 2, z.shape, generator=generator, device=z.device)
        return signs.to(z.dtype).mul_(2).sub_(1) * self.root(z, weight, target)


def spread(columns: Tensor, samples: int, axis: int) -> Tensor:
    """Give every position of a sample columns of its own.

    Args:
        columns: shape ``(c, N * P, *out)``, where the numbers along all axes of ``out`` but ``axis - 1``
            (counted in ``out``; 0 means no such axis) are separate positions.
        samples: number N of independent samples.
        axis: which axis of ``z`` is the event (the classes), 0 for none.

    Returns:
        Shape ``(c * positions, N * P, *out)``: one-hot in the position, zero elsewhere.
    """
    c, shape = columns.shape[0], columns.shape[1:]
    full = columns.reshape(c, samples, shape[0] // samples, *shape[1:])
    # Axes of `full`: column, sample, flattened positions, out...; the event axis sits at axis + 2.
    event = [axis + 2] if axis else []
    positions = [k for k in range(2, full.ndim) if k not in event]
    count = 1
    for k in positions:
        count *= full.shape[k]
    if count == 1:
        return columns
    moved = full.permute(0, 1, *positions, *event).reshape(c, samples, count, -1)
    eye = torch.eye(count, dtype=columns.dtype, device=columns.device)
    wide = torch.einsum("cnpe,pq->cqnpe", moved, eye).reshape(c * count, samples, count, -1)
    sizes = [full.shape[k] for k in positions] + [full.shape[k] for k in event]
    wide = wide.reshape(c * count, samples, *sizes)
    order = [2 + [*positions, *event].index(k) for k in range(2, full.ndim)]
    return wide.permute(0, 1, *order).reshape(c * count, *shape)


def alike(weight: Tensor) -> Tensor:
    """Weights per output number (a mean over them, say) as one per cell, for metrics that mix the numbers.

    Args:
        weight: shape ``(..., numbers)``.

    Raises:
        MetricError: if the numbers of a cell have several weights.
    """
    if not bool((weight == weight[..., :1]).all()):
        raise MetricError("The criterion weighs outputs differently; put those weights into the metric.")
    return weight[..., 0]
