r"""The action of an optimizer's own steps, split into what takes them off the metric flow.

Let a step be :math:`\delta = h \theta'`, made from a gradient :math:`\tilde g` in a metric :math:`\tilde M`, and g, M
those of the whole data now. Then, exactly,

.. math:: \theta' + M^{-1} g = \underbrace{\theta' + \tilde M^{-1} \tilde g}_{momentum}
          + \underbrace{\tilde M^{-1} (g - \tilde g)}_{noise} + \underbrace{(M^{-1} - \tilde M^{-1}) g}_{stale}

and the action is the sum over pairs of these of their products in M (docs/theory 16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pullback.action.metrics import Local, ParameterMetric, check_step
from pullback.action.path import step_action
from pullback.action.record import Action, summed
from pullback.stability.errors import StabilityError
from pullback.stability.fixed import FixedMetric
from pullback.stability.objective import Data, Objective, check_data

DEFECTS = ("momentum", "noise", "stale")


class ActionRecorder:
    """Records the action of any optimizer's steps.

    Args:
        model: the model that is trained.
        criterion: its loss module, which averages.
        data: the whole data, whose gradient steps are held against; None to take each batch for the whole: then there
            is no noise, and the identity with the loss is not known.
        metric: what distances are measured in; None for the identity.
        decay: weight decay that the optimizer adds to gradients (coupled, as ``torch.optim.SGD`` does).

    Attributes:
        steps: the action of each step.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pullback.action import ActionRecorder
        >>> _ = torch.manual_seed(0)
        >>> model, criterion = nn.Linear(3, 1), nn.MSELoss()
        >>> x, y = torch.randn(16, 3), torch.randn(16, 1)
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> recorder = ActionRecorder(model, criterion, (x, y))
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     criterion(model(x), y).backward()
        ...     with recorder.observe(h=0.1):
        ...         opt.step()
        >>> recorder.steps[0].total < 1e-10 < recorder.steps[1].total  # momentum has nothing to add in the first step
        True
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        data: Data | None = None,
        *,
        metric: ParameterMetric | None = None,
        decay: float = 0.0,
    ) -> None:
        self.objective = Objective(model, criterion, decay=decay)
        self.data = None if data is None else check_data(data, 1)
        self.metric = FixedMetric() if metric is None else metric
        self.steps: list[Action] = []

    @contextmanager
    def observe(self, h: float | Callable[[], float], *, used: Local | None = None) -> Iterator[None]:
        """Put this around ``opt.step()``, after ``backward()``.

        Args:
            h: the time the step takes, the learning rate as a rule; or a function that says so after the step.
            used: the metric that the optimizer takes the step in, if it is an older one.

        Raises:
            StabilityError: if a parameter has no gradient, the time is not positive, or the step is not finite.
        """
        theta, batch = self.objective.get(), self.objective.pack_gradient()
        batch = batch + self.objective.decay * theta
        loss, g = (None, batch) if self.data is None else self.objective.loss_and_gradient(theta, self.data)
        metric = self.metric.at(theta)
        yield
        step = self.objective.get() - theta
        if not bool(torch.isfinite(step).all()):
            raise StabilityError("The step is not finite; take shorter ones, or look for bad data.")
        after = None if self.data is None else self.objective.loss(theta + step, self.data)
        work = None if after is None or loss is None else after - loss
        time = check_step(h() if callable(h) else h)
        plain = step_action(step, g, metric, time, work, self.objective.modules)
        fields = vars(plain) | {"defects": _defects(step / time, batch, g, metric, used or metric, time)}
        self.steps.append(Action(**fields))

    @property
    def action(self) -> Action:
        """The action of all steps so far.

        Raises:
            StabilityError: if there are none.
        """
        if not self.steps:
            raise StabilityError("No step was observed, so the path has one point; put observe() around opt.step().")
        return summed(self.steps)


def _defects(
    velocity: Tensor, batch: Tensor, g: Tensor, metric: Local, used: Local, h: float
) -> dict[tuple[str, str], float]:
    """Half h times the products of defects in M, both orders of a pair together."""
    own, whole, now = used.solve(batch), used.solve(g), metric.solve(g)
    parts = torch.stack([velocity + own, whole - own, now - whole])
    products = 0.5 * h * (parts @ torch.stack([metric.apply(part) for part in parts]).T)
    return {
        (DEFECTS[a], DEFECTS[b]): float(products[a, b] + (products[b, a] if a != b else 0.0))
        for a in range(3)
        for b in range(a, 3)
    }
