"""A training system at one point: its Hessian by products, exact or by a difference of gradients, in units of mass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pullback.contraction.errors import ContractionError
from pullback.contraction.known import Known
from pullback.curvature import Linearisation
from pullback.tape import Tape

#: Length of the step of a difference. Its error, some 1e-6 of the third derivative beside 1e-10 of round-off, enters an
#: eigenvalue squared, since what is found is measured by an exact product.
STEP = 1e-6


class System:
    """Model, loss and batch at the present weights; these are not touched.

    Args:
        model: the model.
        criterion: a loss module whose output metric is known.
        inputs: what the model is called with.
        targets: what the criterion gets beside the prediction.
        mass: D.
        pulled: mu of M = mu D + U^T U; None for D.

    Attributes:
        known: U and the masses.

    Raises:
        ContractionError: if loss or gradient are not finite, or nothing is to be moved.
        MetricError: if the criterion's metric is not known.
        CoverageError: if a parameter cannot be given rows.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        inputs: Tensor | tuple[Any, ...],
        targets: Any,
        mass: str | Mapping[str, float | Tensor] = "identity",
        pulled: float | None = None,
    ) -> None:
        self.model, self.criterion, self.targets = model, criterion, targets
        self.args = inputs if isinstance(inputs, tuple) else (inputs,)
        tape = Tape(model, criterion)
        try:
            asked = [p for p in model.parameters() if p.requires_grad]
            with torch.enable_grad():
                value = self._value(model(*self.args))
                if not asked or not value.requires_grad:
                    raise ContractionError(
                        "No parameter that requires grad reaches the loss; there is nothing to move."
                    )
                grads = torch.autograd.grad(value, asked, allow_unused=True)
            if not tape.finite or not bool(torch.isfinite(value.detach())):
                raise _not_finite()
            linearisation = Linearisation(tape.terms)
        finally:
            tape.close()
        self.known = Known(linearisation, model, mass, pulled)
        found = {id(p): torch.zeros_like(p) if g is None else g for p, g in zip(asked, grads, strict=True)}
        self.gradient = torch.cat([found[id(p)].reshape(-1) for p in self.known.params])
        if not bool(torch.isfinite(self.gradient).all()):
            raise _not_finite()
        names = {id(p): name for name, p in model.named_parameters()}
        self._names = [names[id(p)] for p in self.known.params]
        self._graph: Tensor | None = None

    def _value(self, prediction: Any) -> Tensor:
        value: Tensor = self.criterion(prediction, self.targets)
        if value.ndim:
            raise ContractionError(f"The loss has shape {tuple(value.shape)}; a rate needs one number.")
        return value

    def product(self, v: Tensor) -> Tensor:
        """D^-1/2 H D^-1/2 v, (n,) to (n,): a backward pass through the graph of the gradient, which is built once."""
        params = self.known.params
        if self._graph is None:
            with torch.enable_grad():
                grads = torch.autograd.grad(self._value(self.model(*self.args)), params, create_graph=True)
                self._graph = torch.cat([g.reshape(-1) for g in grads])
        if not self._graph.requires_grad:
            return torch.zeros_like(v)
        out = torch.autograd.grad(self._graph, params, self.known.weigh(v), retain_graph=True, allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(params, out, strict=True)]
        return self.known.weigh(torch.cat([g.detach().reshape(-1) for g in pieces]))

    def difference(self, v: Tensor) -> Tensor:
        """The same to some six digits, by one gradient at a point nearby."""
        way = self.known.weigh(v)
        length = float(way.norm())
        if length == 0:
            return torch.zeros_like(v)
        h, moved = STEP / length, {}
        for name, p, part in zip(self._names, self.known.params, way.split(self.known.sizes), strict=True):
            moved[name] = (p.detach() + h * part.view_as(p)).requires_grad_()
        with torch.enable_grad():
            value = self._value(functional_call(self.model, moved, self.args))
            grads = torch.autograd.grad(value, list(moved.values()))
        return self.known.weigh((torch.cat([g.reshape(-1) for g in grads]) - self.gradient) / h)


def _not_finite() -> ContractionError:
    return ContractionError("Loss or gradient are not finite; look for overflow in weights, inputs or targets.")
