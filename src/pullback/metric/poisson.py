"""The Fisher metric of counts."""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.errors import MetricError
from pullback.metric.base import ElementwiseMetric


class Poisson(ElementwiseMetric):
    r"""Fisher metric of independent Poisson rates, as in ``nn.PoissonNLLLoss``.

    With logarithms of rates :math:`G = \mathrm{diag}(e^z)`, the Hessian of :math:`e^z - y z`. With the rates
    themselves :math:`G = \mathrm{diag}(1 / (z + \epsilon))`, the Hessian :math:`y / (z + \epsilon)^2` of
    :math:`z - y \log(z + \epsilon)` at the expected count.

    Args:
        log_input: whether predictions are logarithms of rates.
        eps: what the loss adds to a rate before its logarithm.
        scale: as in :class:`~pullback.metric.OutputMetric`.
        reduction: likewise.
    """

    def __init__(
        self, log_input: bool = True, *, eps: float = 1e-8, scale: float = 1.0, reduction: str = "mean"
    ) -> None:
        super().__init__(scale=scale, reduction=reduction)
        self.log_input = bool(log_input)
        self.eps = float(eps)

    def variance(self, z: Tensor, target: Tensor | None = None) -> Tensor:
        r""":math:`e^z` or :math:`1 / (z + \epsilon)`.

        Raises:
            MetricError: if a predicted rate is not positive.
        """
        if self.log_input:
            return torch.exp(z)
        if bool((z + self.eps <= 0).any()):
            raise MetricError(
                f"Poisson got a predicted rate of {float(z.amin()):.3g}; end the model in softplus, or predict "
                "logarithms with PoissonNLLLoss(log_input=True)."
            )
        return (z + self.eps).reciprocal()

    def _options(self) -> str:
        return ", ".join(filter(None, ["" if self.log_input else "log_input=False", super()._options()]))
