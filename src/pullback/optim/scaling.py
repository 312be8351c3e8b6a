"""Working with torch.amp.GradScaler: gradients, costates and factors back in their true units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.errors import StepError
from pullback.tape import Term


@dataclass
class Scaling:
    """A loss scale to take out again.

    Attributes:
        scale: what the loss was multiplied by.
        overflow: whether a gradient is not finite, so that the step is to be skipped.
        unscaled: whether the gradients have been divided already.
    """

    scale: float
    overflow: bool
    unscaled: bool

    @classmethod
    def of(cls, scale: Tensor | None, found_inf: Tensor | None, scaler: torch.amp.GradScaler | None) -> Scaling:
        """From what the scaler leaves on the optimizer: ``grad_scale`` (None after ``unscale_``) and ``found_inf``.

        Raises:
            StepError: if the gradients were unscaled before and the scale is not to be had.
        """
        overflow = found_inf is not None and bool(found_inf)
        if scale is not None:
            return cls(float(scale), overflow, unscaled=False)
        if scaler is None:
            raise StepError(
                "scaler.unscale_(opt) was called before scaler.step(opt), which hides the scale of the factors; give "
                "the optimizer the scaler: grad_scaler=scaler."
            )
        return cls(float(scaler.get_scale()), overflow, unscaled=True)

    def undo(self, terms: Sequence[Term], params: Sequence[Tensor]) -> None:
        """Divide gradients, weights and factors (a factor is a square root) in place.

        Args:
            terms: the taped terms, whose losses were scaled.
            params: the parameters, whose gradients are divided unless they were before.
        """
        with torch.no_grad():
            if not self.unscaled:
                for p in params:
                    if p.grad is not None:
                        p.grad.div_(self.scale)
            root = self.scale**0.5
            for term in terms:
                term.e0 = term.e0 / root
                if term.use.upstream is not None:
                    term.use.upstream = term.use.upstream / self.scale
                for calls in term.factors.values():
                    for call in calls:
                        call.parts = [None if part is None else part / root for part in call.parts]
                if term.ports is not None:
                    term.ports.divide(root)
