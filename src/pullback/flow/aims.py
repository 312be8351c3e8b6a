r"""Where outputs should go: a cost, and the flow in *output space* that the parameters are to realise.

Coordinates x of the outputs are stacked output number first, then sample, as the rows of D are. An aim says with
which velocity x should move, :math:`v = -\nabla_x C` as a rule; the adapted flow makes it happen where the rank of D
allows (C; docs/theory 14).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.functional import jvp

from pullback.flow.errors import FlowError
from pullback.metric import Gaussian, OutputMetric

#: A target that moves: time s to targets in the shape of the outputs.
Path = Callable[[Tensor], Tensor]


def stacked(z: Tensor) -> Tensor:
    """Outputs (N, ...) as coordinates (QN,), the order of the tape's rows."""
    return z.reshape(len(z), -1).T.reshape(-1)


class Aim(ABC):
    """A cost of the outputs.

    Attributes:
        unit: the time s in which a residual decays by the factor e, or its like.
        exact: whether the cost along the flow is known beforehand in closed form.
        label: one word for reports.
    """

    unit: float
    exact: bool
    label: str

    @abstractmethod
    def metric(self) -> OutputMetric:
        """The metric whose factor selects the coordinates."""

    @abstractmethod
    def check(self, z: Tensor) -> None:
        """Whether the targets fit outputs z; raises FlowError."""

    @abstractmethod
    def coordinates(self, z: Tensor) -> Tensor:
        """The coordinates x of outputs z, (R,)."""

    @abstractmethod
    def spread(self, v: Tensor, z: Tensor) -> Tensor:
        """Coordinates v (R,) as a cotangent in the shape of the outputs z."""

    @abstractmethod
    def cost(self, s: float, x: Tensor) -> float:
        """C at time s."""

    @abstractmethod
    def velocity(self, s: float, x: Tensor) -> Tensor:
        """The wanted x', (R,)."""

    @abstractmethod
    def advance(self, s: float, x: Tensor, h: float) -> Tensor:
        """Where that velocity leads from x in a time h: the solution operator of the flow in output space."""

    @abstractmethod
    def stopping_time(self, x: Tensor, eps: float) -> float:
        """The time s at which the cost is eps, from x at s = 0, if the rank holds."""

    @abstractmethod
    def size(self, s: float, x: Tensor) -> float:
        """What errors of x are compared with: the distance still to go."""

    @abstractmethod
    def resolution(self, x: Tensor) -> float:
        """The cost that round-off of the outputs leaves."""

    def predicted(self, s: float, x0: Tensor) -> float:
        """Cost at time s of the flow that starts at x0."""
        return self.cost(s, self.advance(0.0, x0, s))


class Squared(Aim):
    r""":math:`C = c |x - y|^2`, all outputs of all samples stacked.

    :math:`x' = \dot y - 2c (x - y)`, so :math:`x - y` decays as :math:`e^{-2cs}` and C as :math:`e^{-4cs}`, also
    towards a target that moves (derived here).

    Args:
        targets: y in the shape of the outputs; or a function of the time s (a scalar tensor) that returns it,
            differentiable by autograd.
        c: the constant, positive; None for 1 / (2N), half the mean over samples.

    Raises:
        FlowError: if targets are not floating and finite, or c is not positive.
    """

    exact = True
    label = "squared"

    def __init__(self, targets: Tensor | Path, c: float | None = None) -> None:
        self.path = targets if not isinstance(targets, Tensor) else None
        first = targets if isinstance(targets, Tensor) else targets(torch.zeros((), dtype=torch.float64))
        if not first.is_floating_point() or not bool(torch.isfinite(first).all()):
            raise FlowError(
                "Targets must be floating and finite; look for missing values, or pass CrossEntropy(labels)."
            )
        if c is not None and not (c > 0 and math.isfinite(c)):
            raise FlowError(f"The constant c of the cost is {c}; give a positive number, or None for 1 / (2N).")
        self.shape = first.shape
        self.c = 1 / (2 * len(first)) if c is None else float(c)
        self.unit = 1 / (2 * self.c)
        self._fixed = stacked(first) if self.path is None else None

    def metric(self) -> OutputMetric:
        """The identity. See the base class."""
        return Gaussian(reduction="sum")

    def check(self, z: Tensor) -> None:
        """See the base class."""
        if z.shape != self.shape:
            raise FlowError(
                f"The outputs have shape {tuple(z.shape)} and the targets {tuple(self.shape)}; they must be the same."
            )
        if self._fixed is not None:
            self._fixed = self._fixed.to(dtype=z.dtype, device=z.device)

    def coordinates(self, z: Tensor) -> Tensor:
        """All numbers. See the base class."""
        return stacked(z)

    def spread(self, v: Tensor, z: Tensor) -> Tensor:
        """See the base class."""
        return v.view(-1, len(z)).T.reshape(z.shape)

    def target(self, s: float) -> Tensor:
        """The target y at time s, (QN,)."""
        if self._fixed is not None:
            return self._fixed
        assert self.path is not None
        return stacked(self.path(torch.tensor(s, dtype=torch.float64)).detach())

    def motion(self, s: float) -> Tensor | None:
        """The target's own velocity at time s; None if it stays."""
        if self.path is None:
            return None
        time = torch.tensor(s, dtype=torch.float64)
        slope: Tensor = jvp(self.path, time, torch.ones_like(time))[1]
        return stacked(slope.detach())

    def cost(self, s: float, x: Tensor) -> float:
        """See the base class."""
        return self.c * float((x - self.target(s)).square().sum())

    def velocity(self, s: float, x: Tensor) -> Tensor:
        """See the base class."""
        v = (-2 * self.c) * (x - self.target(s))
        own = self.motion(s)
        return v if own is None else v + own.to(v)

    def advance(self, s: float, x: Tensor, h: float) -> Tensor:
        """See the base class."""
        return self.target(s + h) + math.exp(-2 * self.c * h) * (x - self.target(s))

    def stopping_time(self, x: Tensor, eps: float) -> float:
        """ln(C(0)/eps) / (4c) (C). See the base class."""
        return math.log(self.cost(0.0, x) / eps) / (4 * self.c)

    def size(self, s: float, x: Tensor) -> float:
        """|x - y|. See the base class."""
        return float((x - self.target(s)).norm())

    def resolution(self, x: Tensor) -> float:
        """Ten units in the last place of every output. See the base class."""
        last = 10 * torch.finfo(x.dtype).eps * torch.maximum(x.abs(), self.target(0.0).abs().to(x))
        return self.c * float(last.square().sum())
