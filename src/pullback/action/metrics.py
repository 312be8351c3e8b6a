"""Metrics of packed weights that an action is measured in: fixed, given as a function, or pulled back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pullback.curvature import Block, Partition, solver_for
from pullback.metric import Metrics
from pullback.stability.errors import StabilityError
from pullback.stability.fixed import FixedMetric
from pullback.stability.objective import Data, Objective, check_data
from pullback.stability.rows import PulledRows


class Local(Protocol):
    """A metric at one point."""

    def apply(self, v: Tensor) -> Tensor:
        """M v, (K,) to (K,)."""
        ...

    def solve(self, v: Tensor) -> Tensor:
        """M^{-1} v, (K,) to (K,)."""
        ...


class ParameterMetric(Protocol):
    """A metric at every point; :class:`~pullback.stability.FixedMetric` is one."""

    def at(self, theta: Tensor) -> Local:
        """The metric at packed weights (K,)."""
        ...


class VaryingMetric:
    """A metric given as a function of the weights.

    Args:
        function: takes packed weights (K,) to a number, a diagonal (K,) or a matrix (K, K), positive definite.
    """

    def __init__(self, function: Callable[[Tensor], Tensor | float]) -> None:
        self.function = function

    def at(self, theta: Tensor) -> FixedMetric:
        """The metric there.

        Raises:
            StabilityError: if it is not positive definite there (the eigenvalue is named).
        """
        return FixedMetric(self.function(theta))


class PulledBack:
    r"""The metric :math:`\mu I + U^\top U` pulled back through a model, with the rows of the tape.

    Args:
        model: the model; a copy of it is linearised.
        criterion: a loss module that averages.
        data: inputs and targets that the metric holds.
        mu: the mass; or a function that gives it when the metric is first used after :meth:`at`, such as ``lambda:
            opt.last.mu`` for an optimizer that chooses it in its step.
        partition: layerwise (block diagonal), global, or coalitions.
        metric: overrides the output metric that the criterion resolves to; it must be exact.

    Raises:
        StabilityError: if mu is not positive.
        ValueError: if the output metric is a sketch.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        data: Data,
        *,
        mu: float | Callable[[], float],
        partition: Partition = "layerwise",
        metric: Metrics = None,
    ) -> None:
        if not callable(mu):
            FixedMetric(mu)  # refuses a mass that is not positive
        self.mu, self.data = mu, check_data(data, 1)
        self.rows = PulledRows(Objective(model, criterion), metric, partition)

    def at(self, theta: Tensor) -> LocalRows:
        """The metric there."""
        return LocalRows(self.rows, self.rows.at(theta, self.data), self.mu)


class LocalRows:
    """``mu I + U^T U`` at one point.

    Args:
        rows: says where blocks lie in packed vectors.
        groups: blocks that move jointly, by group.
        mu: see :class:`PulledBack`.
    """

    def __init__(self, rows: PulledRows, groups: Sequence[Sequence[Block]], mu: float | Callable[[], float]) -> None:
        self.groups = [[(block, rows.columns(block)) for block in blocks] for blocks in groups]
        self._mu = mu
        self._solvers = [solver_for(blocks) for blocks in groups]
        self._ready = False

    @property
    def mu(self) -> float:
        """The mass, asked for once.

        Raises:
            StabilityError: if it is not positive.
        """
        if callable(self._mu):
            self._mu = float(self._mu())
            FixedMetric(self._mu)
        return self._mu

    def apply(self, v: Tensor) -> Tensor:
        """See :class:`Local`."""
        out = self.mu * v
        for group in self.groups:
            Uv = torch.stack([block.matvec(v[where]) for block, where in group]).sum(0)
            for block, where in group:
                out[where] += block.rmatvec(Uv)
        return out

    def solve(self, v: Tensor) -> Tensor:
        """See :class:`Local`."""
        if not self._ready:
            for solver in self._solvers:
                solver.factorise(self.mu)
            self._ready = True
        out = torch.empty_like(v)
        for solver, group in zip(self._solvers, self.groups, strict=True):
            parts = [v[where] for _, where in group]
            # With e0 = 0 a solver's direction is -M^{-1} of what it is given as the remainder.
            found, _ = solver.direction(v.new_zeros(solver.R), parts, parts, self.mu)
            for (_, where), part in zip(group, found, strict=True):
                out[where] = -part
        return out


def check_step(h: float) -> float:
    """A time step that is positive and finite.

    Raises:
        StabilityError: if it is not.
    """
    if not 0 < h < float("inf"):
        raise StabilityError(f"The time step is {h}; give a positive number, the learning rate as a rule.")
    return h
