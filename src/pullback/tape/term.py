"""One use of the loss: a prediction, its metric, and the factors pulled back from it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from pullback.tape.call import CallFactor, Region, RootCall, inside, wide
from pullback.tape.graph import Path, Reached
from pullback.tape.plan import Plan

if TYPE_CHECKING:
    from pullback.tape.ports import Ports


@dataclass
class LossUse:
    """A call of the loss that waits for its backward pass.

    It holds the edge of the prediction *before* the loss, never of the alias whose node holds the hook that
    holds this object: that cycle would leak the graph.

    Attributes:
        edge: where the prediction comes from.
        z: the prediction, detached.
        criterion: the loss module, None for a functional loss.
        args: what the criterion was called with after the prediction.
        kwargs: likewise by keyword.
        value: the loss it returned, detached; None for a functional loss.
        path: how the prediction came from the model, if it can be replayed.
        upstream: gradient that reached the loss's output.
        autocast: device type and dtype of the autocast region the loss was called in, None outside one.
    """

    edge: GradientEdge
    z: Tensor
    criterion: nn.Module | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    value: Tensor | None = None
    path: Path | None = None
    upstream: Tensor | None = None
    autocast: Region | None = None

    def context(self) -> AbstractContextManager[Any]:
        """The autocast region the loss was called in."""
        return inside(self.autocast)

    @property
    def target(self) -> Tensor | None:
        """The target the criterion was called with, if any."""
        found = self.args[0] if self.args else (self.kwargs or {}).get("target")
        return found if isinstance(found, Tensor) else None

    @property
    def rest(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the criterion was called with beside prediction and target."""
        named = {key: value for key, value in (self.kwargs or {}).items() if key != "target"}
        return self.args[1:], named

    def weighted(self, value: Tensor) -> Tensor:
        """The share of a loss value in what ``backward`` was called on, a scalar."""
        return value.sum() if self.upstream is None else (self.upstream * value).sum()

    def evaluate(self, z: Tensor) -> Tensor:
        """The loss at another prediction, weighted as in the backward pass.

        Args:
            z: prediction, shape of the captured one.
        """
        assert self.criterion is not None
        return self.weighted(self.criterion(z, *self.args, **(self.kwargs or {})))


@dataclass
class Term:
    """A swept use of the loss.

    Attributes:
        use: the use.
        exact: whether the metric is the metric itself, not a sketch.
        N: samples.
        r: factor columns.
        e0: residual in R-space, shape (r * N,) (zeros under a sketch).
        factors: calls with their factors, by module id.
        plan: who gives rows to whom.
        roots: calls of the model that the prediction depends on.
        seconds: time of the sweep.
        ports: factors and values of the tensors between modules, where feedback needs them.
        held: bytes to allow for it until the step is through.
    """

    use: LossUse
    exact: bool
    N: int
    r: int
    e0: Tensor
    factors: dict[int, list[CallFactor]]
    plan: Plan
    roots: list[RootCall]
    seconds: float
    ports: Ports | None = None
    held: float = 0.0

    @property
    def R(self) -> int:
        """Rows of this term."""
        return self.r * self.N


def gather(found: Reached, columns: Sequence[Tensor], r: int) -> dict[int, list[CallFactor]]:
    """Sort swept factors by module.

    Args:
        found: the calls that were swept.
        columns: factors, one per edge of ``found``.
        r: factor columns.
    """
    out: dict[int, list[CallFactor]] = {}
    parts = iter(columns)
    for call, edges in found.calls:
        factor = CallFactor(call, r, [None] * call.outputs)
        for index in edges:
            factor.parts[index] = wide(next(parts))
        out.setdefault(id(call.module), []).append(factor)
    return out


def one_sample(z: Tensor, N: int, which: int) -> Tensor:
    """A random cotangent of ``z`` that is zero outside one sample, one column: (1, *z.shape)."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    v = torch.zeros(N, *z.reshape(N, -1).shape[1:], dtype=z.dtype)
    v[which] = torch.randn(v.shape[1], generator=generator, dtype=torch.float64).to(z.dtype)
    return v.to(z.device).view(z.shape)[None]
