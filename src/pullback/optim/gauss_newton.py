"""The global pull-back: damped Gauss-Newton, natural gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from torch import nn

from pullback.curvature import Linearisation
from pullback.metric import Criteria
from pullback.optim.attempt import Policy
from pullback.optim.base import PullbackOptimizer
from pullback.optim.feedback import ClosedLoops, FeedbackGaussNewton
from pullback.optim.options import Options
from pullback.optim.search import Clock


class GaussNewton(PullbackOptimizer):
    r"""All modules move jointly in the metric pulled back through the whole model.

    .. math:: d = -(\mu I + U^\top U)^{-1} g, \qquad U = [U_1, \dots, U_L]

    Levenberg-Marquardt for least squares, damped natural gradient for likelihoods; as :math:`\mu \to 0` one
    Euler step of Chen's adapted flow (arXiv 2311.15487; theory 3 and 8).

    Args:
        model: see :class:`~pullback.optim.base.PullbackOptimizer`.
        criterion: likewise.
        geodesic: whether the step is bent by the second derivative of the predictions along it, found by one more
            forward pass (geodesic acceleration, Transtrum & Sethna 2012; docs/theory 11, a single stage). Worth it for
            least squares to many digits on one batch; not done in half precision (autocast), which cannot see it.
        **options: see :class:`~pullback.optim.base.PullbackOptimizer`.
    """

    _partition = "global"

    def __init__(
        self, model: nn.Module, criterion: Criteria, *, geodesic: bool = False, **options: Unpack[Options]
    ) -> None:
        self.geodesic = geodesic
        self._wiring = "ends" if geodesic else "none"
        if geodesic:
            self.default_damping = FeedbackGaussNewton.default_damping
        super().__init__(model, criterion, **options)
        self._loops = ClosedLoops(anticipate=True)
        if geodesic:
            self._loops.check(self)
            if self.partition != "global":
                raise ValueError(
                    f"A geodesic step moves all modules jointly, got partition={self.partition!r}; leave it out, or "
                    "take FeedbackGaussNewton for stages."
                )

    def _policy(self, lin: Linearisation, closure: Callable[[], Any] | None, loss: float, clock: Clock) -> Policy:
        if not self.geodesic:
            return super()._policy(lin, closure, loss, clock)
        return self._loops.policy(self, lin, closure, loss, clock)
