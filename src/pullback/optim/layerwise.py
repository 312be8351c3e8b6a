"""The layerwise metric of Pehle & Slotine."""

from __future__ import annotations

from pullback.optim.base import PullbackOptimizer


class LayerwiseMetric(PullbackOptimizer):
    r"""Every module moves in its own pulled-back metric.

    .. math:: M_l = \mu I + U_l^\top U_l, \qquad d_l = -M_l^{-1} g_l

    with :math:`U_l` the output metric's factor pulled back to module l (Pehle & Slotine, arXiv 2603.03610;
    theory 1-2). The modules do not see each other's moves, so their joint direction is scaled to the minimum
    of the global quadratic model (theory 3). See :class:`~pullback.optim.base.PullbackOptimizer` for the
    arguments.

    Example:
        >>> import torch, pullback
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> criterion = nn.MSELoss()
        >>> opt = pullback.LayerwiseMetric(model, criterion)
        >>> x = torch.randn(32, 3)
        >>> y = x.sum(1, keepdim=True)
        >>> for _ in range(20):
        ...     opt.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     _ = opt.step()
        >>> bool(loss < 0.05)
        True
    """

    _partition = "layerwise"
