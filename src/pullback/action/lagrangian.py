r"""Backpropagation as the stationary point of a Lagrangian (theory 9), as an object that checks itself.

.. math:: \Lambda = \Phi(x_{L+1}) + \sum_{l=1}^L \lambda_l \cdot (f_l(x_l, w_l) - x_{l+1})

Stationarity in :math:`\lambda` is the forward pass, in x the recursion of the costates, and the derivative in w is the
gradient. All three residuals are taken from one derivative of :math:`\Lambda` itself, not from the recursions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pullback.stability.errors import StabilityError
from pullback.stability.objective import quiet

Part = nn.Module | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Residuals:
    r"""Largest entries of what is left of the stationarity conditions.

    Attributes:
        forward: of :math:`\partial \Lambda / \partial \lambda_l = f_l(x_l) - x_{l+1}`.
        costate: of :math:`\partial \Lambda / \partial x_l = A_l^\top \lambda_l - \lambda_{l-1}`, of x_{L+1} too.
        gradient: of :math:`\partial \Lambda / \partial w - g` with the gradient g that was given.
    """

    forward: float
    costate: float
    gradient: float

    @property
    def largest(self) -> float:
        """The largest of the three."""
        return max(self.forward, self.costate, self.gradient)


@dataclass(frozen=True)
class Stationary:
    """The stationary point.

    Attributes:
        states: x_2 to x_{L+1}, the output of every part.
        costates: the multipliers lambda_1 to lambda_L, each in the shape of its part's output. With an averaging
            criterion the factor 1/N is inside.
        gradients: the gradient of the loss by name of the parameter, ``"0.weight"`` for that of the first part.
        loss: Phi there.
        residuals: what is left of the three conditions.
    """

    states: tuple[Tensor, ...]
    costates: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    loss: float
    residuals: Residuals


class Lagrangian:
    """The Lagrangian of a chain of parts.

    Args:
        parts: an ``nn.Sequential``, or modules and functions in order. A part may be anything from one tensor to one
            tensor: a residual block, a branch.
        criterion: takes (x_{L+1}, targets) to the scalar loss.

    Raises:
        StabilityError: if there is no part.
    """

    def __init__(self, parts: nn.Sequential | Sequence[Part], criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.parts: list[Part] = list(parts)
        if not self.parts:
            raise StabilityError("A Lagrangian needs at least one part; give an nn.Sequential or a list of modules.")
        # A copy, since an optimizer's tape on the criterion would ask for the call of a model.
        self.criterion = quiet(criterion) if isinstance(criterion, nn.Module) else criterion
        self.parameters: dict[str, nn.Parameter] = {}
        for k, part in enumerate(self.parts):
            if isinstance(part, nn.Module):
                for name, p in part.named_parameters():
                    if p.requires_grad and not any(p is other for other in self.parameters.values()):
                        self.parameters[f"{k}.{name}"] = p

    def value(self, x: Tensor, y: Tensor, states: Sequence[Tensor], costates: Sequence[Tensor]) -> Tensor:
        """Lambda at any states and costates, a scalar tensor.

        Args:
            x: the input x_1.
            y: targets of the criterion.
            states: x_2 to x_{L+1}.
            costates: lambda_1 to lambda_L.

        Raises:
            StabilityError: if there is not one of each per part, or shapes differ.
        """
        if not len(states) == len(costates) == len(self.parts):
            raise StabilityError(
                f"There are {len(states)} states and {len(costates)} costates for {len(self.parts)} parts; "
                "give one of each per part."
            )
        total = self.criterion(states[-1], y)
        for k, (part, before, after, costate) in enumerate(
            zip(self.parts, [x, *states], states, costates, strict=False)
        ):
            reached = part(before)
            if not reached.shape == after.shape == costate.shape:
                raise StabilityError(
                    f"Part {k} gives shape {tuple(reached.shape)}, its state has {tuple(after.shape)} and its costate "
                    f"{tuple(costate.shape)}; all three must agree."
                )
            total = total + (costate * (reached - after)).sum()
        return total

    def residuals(
        self,
        x: Tensor,
        y: Tensor,
        states: Sequence[Tensor],
        costates: Sequence[Tensor],
        gradients: dict[str, Tensor],
    ) -> Residuals:
        """What is left of the three conditions at any states, costates and gradients.

        Args:
            x: see :meth:`value`, as the rest.
            y: likewise.
            states: likewise.
            costates: likewise.
            gradients: by name of the parameter.

        Raises:
            StabilityError: as :meth:`value`.
        """
        free = [s.detach().requires_grad_() for s in states]
        multipliers = [c.detach().requires_grad_() for c in costates]
        with torch.enable_grad():
            total = self.value(x.detach(), y, free, multipliers)
            wanted = [*multipliers, *free, *self.parameters.values()]
            found = torch.autograd.grad(total, wanted, allow_unused=True)
        L = len(self.parts)
        left = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
        misses = [g - gradients[name] for name, g in zip(self.parameters, left[2 * L :], strict=True)]
        return Residuals(_largest(left[:L]), _largest(left[L : 2 * L]), _largest(misses))

    def solve(self, x: Tensor, y: Tensor) -> Stationary:
        """Forward pass, costates and gradients by their recursions, part by part, with the residuals of the conditions.

        Args:
            x: the input.
            y: targets of the criterion.

        Raises:
            StabilityError: if the parts do not repeat themselves (dropout), or the loss is not a finite scalar.
        """
        edges: list[tuple[Tensor, Tensor]] = []
        state = x.detach()
        with torch.enable_grad():
            for part in self.parts:
                # Each part for itself: no graph runs through two of them.
                before = state.requires_grad_() if state.is_floating_point() else state
                after = part(before)
                edges.append((before, after))
                state = after.detach()
            end = state.requires_grad_()
            loss = self.criterion(end, y)
            if loss.shape != () or not bool(torch.isfinite(loss)):
                raise StabilityError(
                    f"The loss has shape {tuple(loss.shape)} or is not finite; give a scalar, finite one."
                )
            (costate,) = torch.autograd.grad(loss, end)
        with torch.no_grad():
            repeated = all(torch.equal(part(b), a) for part, (b, a) in zip(self.parts, edges, strict=True))
        if not repeated:
            raise StabilityError("A part gives another output the second time (dropout?); call eval() first.")
        gradients = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        params = list(self.parameters.values())
        costates: list[Tensor] = []
        for before, after in reversed(edges):
            costates.append(costate)
            wanted = [before, *params] if before.requires_grad else params
            if not after.requires_grad:
                found: list[Tensor | None] = [None] * len(wanted)
            else:
                found = list(torch.autograd.grad(after, wanted, costate, allow_unused=True))
            if before.requires_grad:
                first = found.pop(0)
                costate = torch.zeros_like(before) if first is None else first
            for name, g in zip(gradients, found, strict=True):
                if g is not None:
                    gradients[name] = gradients[name] + g  # a shared weight adds up over its parts
        states = [after.detach() for _, after in edges]
        costates.reverse()
        own = self.residuals(x, y, states, costates, gradients)
        return Stationary(tuple(states), tuple(costates), gradients, float(loss.detach()), own)


def _largest(tensors: Sequence[Tensor]) -> float:
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)
