r"""The end or the beginning of an integration as a parameter.

.. math:: \frac{\partial x(t_1)}{\partial t_1} = F(t_1, x(t_1)), \qquad
   \frac{\partial x(t_1)}{\partial t_0} = -\Phi(t_1, t_0)\,F(t_0, x(t_0))

with :math:`\Phi` the derivative of the flow. So a time is one more layer beside the flow, in front of it or behind,
that moves x along the velocity there: its row is :math:`\pm S^\top F`, one column of U (theory 7), and the costate and
factors reach it as they reach any layer. With the penalty :math:`\tfrac c2 t^2` its curvature is
:math:`c + \sum |S^\top F|^2`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pullback.tape.call import CallFactor, wide
from pullback.tape.prior import Penalised
from pullback.tape.rules import DenseRows, Kind, register

#: Solves from a state at one time to another time.
Leg = Callable[[Tensor, float, float], Tensor]

#: Times no further apart, relatively, are one.
CLOSE = 1e-13


class Pull:
    """Adds the gradient of the penalty once a backward pass has left its own; a class, so that it is found again."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, t: Tensor) -> None:
        """Gradient of c/2 t^2."""
        assert t.grad is not None
        t.grad.add_(t.detach(), alpha=self.weight)


class Time(nn.Module, Penalised):
    """A time that is learned.

    Args:
        t: its value.
        sign: 1 for the end of the integration, -1 for its beginning.
        penalty: c.
        every: it takes part in every so many forward passes that record gradients.

    Attributes:
        t: the parameter, without axes.
        kept: the last value at which the block could be evaluated.
        passes: of the block so far that recorded gradients and were solved; the block counts them.
    """

    def __init__(self, t: float, sign: int, penalty: float, every: int) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.tensor(float(t)))
        self.sign = sign
        self.penalty = penalty
        self.every = every
        self.passes = 0
        self.kept = float(t)

    @property
    def value(self) -> float:
        """The time."""
        return float(self.t.detach())

    def get_extra_state(self) -> Tensor:
        """What a state_dict holds beside the time: the passes so far, and the last value that was good."""
        return torch.tensor([self.passes, self.kept], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from :meth:`get_extra_state`."""
        self.passes, self.kept = int(state[0]), float(state[1])

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{self.value:.4g}, penalty={self.penalty:g}, every={self.every}"

    def forward(self, x: Tensor, velocity: Tensor | None, reference: float, leg: Leg) -> Tensor:
        """The state itself, with a derivative in t; or the state after the rest of the way.

        Args:
            x: the state at the reference, or at the beginning of the integration, the state at this time.
            velocity: F there, shape of x, a constant; None where gradients are not recorded.
            reference: the time at which the flow ends or begins.
            leg: solves from one time to another.
        """
        if abs(self.value - reference) > CLOSE * max(1.0, abs(reference)):
            # Moved since it was recorded. Who watches the model's tensors must see what that does behind this layer,
            # not in front of it, so the flow itself keeps to the reference.
            x = leg(x, reference, self.value) if self.sign > 0 else leg(x, self.value, reference)
        if velocity is None or not torch.is_grad_enabled():
            return x
        if not self.t.requires_grad or self.passes % self.every:
            return x.view_as(x)
        hooks = self.t._post_accumulate_grad_hooks or {}  # a copied parameter has lost them
        if self.penalty and not any(isinstance(hook, Pull) for hook in hooks.values()):
            self.t.register_post_accumulate_grad_hook(Pull(self.penalty))
        return x + self.sign * (self.t - self.t.detach()).to(x.dtype) * velocity


def time_rows(module: Time, calls: Sequence[CallFactor], wanted: frozenset[str], N: int) -> DenseRows:
    """Rows S^T F, one column.

    Args:
        module: the time.
        calls: its calls in one term.
        wanted: names of its parameters that take part.
        N: samples.
    """
    total: Tensor | None = None
    for call in calls:
        velocity = wide(call.call.args[1])
        s = call.factor()
        own = (s * velocity).reshape(*s.shape[:2], -1).sum(2)
        total = own if total is None else total + own
    assert total is not None
    return DenseRows([module.t], module.sign * total[:, :, None], "time")


register(Kind(Time, time_rows, dense=True, whole=True))
