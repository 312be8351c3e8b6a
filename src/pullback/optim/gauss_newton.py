"""The global pull-back: damped Gauss-Newton, natural gradient."""

from __future__ import annotations

from pullback.optim.base import PullbackOptimizer


class GaussNewton(PullbackOptimizer):
    r"""All modules move jointly in the metric pulled back through the whole model.

    .. math:: d = -(\mu I + U^\top U)^{-1} g, \qquad U = [U_1, \dots, U_L]

    Levenberg-Marquardt for least squares, damped natural gradient for likelihoods; as :math:`\mu \to 0` one
    Euler step of Chen's adapted flow (arXiv 2311.15487; theory 3 and 8). See
    :class:`~pullback.optim.base.PullbackOptimizer` for the arguments.
    """

    _partition = "global"
