"""The gradient of each sample in place of a column drawn from the model's own prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.errors import MetricError
from pullback.metric.base import OutputMetric


class Empirical(OutputMetric):
    r"""The empirical Fisher: one column per sample, its own costate, :math:`s = \lambda / \sqrt w`.

    With unit weights :math:`S S^\top = \sum_n \lambda_n \lambda_n^\top`. It costs no random number, but it is no
    estimate of the metric: where the fit is good it vanishes, and where a sample is an outlier it is large
    (Kunstner, Balles & Hennig 2019).

    Args:
        metric: the metric whose weights are meant; None takes the one the criterion resolves to.
    """

    exact = False

    def __init__(self, metric: OutputMetric | None = None) -> None:
        super().__init__()
        self.metric = metric

    def bind(self, metric: OutputMetric) -> None:
        """Take ``metric``, if none was given."""
        if self.metric is None:
            self.metric = metric

    @property
    def inner(self) -> OutputMetric:
        """The metric whose weights are meant.

        Raises:
            MetricError: if it is not known yet.
        """
        if self.metric is None:
            raise MetricError(
                "Empirical() does not know whose weights are meant; pass a metric: Empirical(Gaussian())."
            )
        return self.metric

    @property
    def own_weights(self) -> bool:  # type: ignore[override]  # read only here
        """As the inner metric's."""
        return self.inner.own_weights

    def cells(self, z: Tensor) -> tuple[int, ...]:
        """As the inner metric's."""
        return self.inner.cells(z)

    def columns(self, z: Tensor, samples: int) -> int:
        """One. See the base class."""
        del z, samples
        return 1

    def default_weight(self, z: Tensor, samples: int) -> Tensor:
        """As the inner metric's."""
        return self.inner.default_weight(z, samples)

    def factor(self, z: Tensor, weight: Tensor, samples: int, target: Tensor | None = None) -> Tensor:
        """Not to be had without the costate. See :meth:`factor_at`."""
        raise MetricError("The empirical metric is made of the gradient; it has no factor of the prediction alone.")

    def factor_at(
        self, z: Tensor, weight: Tensor, costate: Tensor, samples: int, target: Tensor | None = None
    ) -> Tensor:
        """The costate over the root of the weight, where that is not zero. See the base class."""
        del samples, target
        cells = self.cells(z)
        root = weight.expand(cells).sqrt()
        if cells != tuple(z.shape):
            root = root.unsqueeze(1)  # the classes
        return torch.where(root > 0, costate / root, torch.zeros_like(costate))[None]

    def coordinates(
        self, z: Tensor, weight: Tensor, costate: Tensor, samples: int, target: Tensor | None = None
    ) -> Tensor:
        """Zeros, as for a sketch: the whole gradient is remainder."""
        del weight, costate, target
        return z.new_zeros(1, samples)

    def __repr__(self) -> str:
        return f"Empirical({'' if self.metric is None else repr(self.metric)})"
