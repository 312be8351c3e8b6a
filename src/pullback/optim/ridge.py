r"""A quadratic cost of all weights, known to the solver: :math:`\tfrac c2 |w|^2` beside the loss.

.. math:: (\mu I + c I + U^\top U)\, d = -(g + c\, w)

Its gradient is not in the residual's reach, its curvature is the damping's own form: so c is added to mu wherever a
metric is factorised, and c w to what of the gradient the residual does not generate (docs/theory 3). For a loss that
is a negative log-likelihood, a mean over N samples, the minimiser has the most probable weights under a normal prior
of variance 1 / (c N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.curvature import Mass


@dataclass(frozen=True)
class Ridge:
    """The cost.

    Attributes:
        weight: c, 0 for none.
    """

    weight: float

    def __bool__(self) -> bool:
        return self.weight > 0

    def cost(self, params: Iterable[Tensor]) -> float:
        """c/2 |w|^2 of those that require grad.

        Args:
            params: the parameters.
        """
        if not self:
            return 0.0
        squares = [p.detach().square().sum() for p in params if p.requires_grad]
        return 0.5 * self.weight * float(torch.stack(squares).sum()) if squares else 0.0

    def sloped(self, grads: Mapping[int, Tensor], params: Iterable[Tensor]) -> dict[int, Tensor]:
        """Gradients with that of the cost added, by id of the parameter.

        Args:
            grads: gradients of the loss, by id of the parameter.
            params: the parameters.
        """
        if not self:
            return dict(grads)
        own = {id(p): p.detach() for p in params}
        return {key: torch.add(g, own[key], alpha=self.weight) if key in own else g for key, g in grads.items()}

    def tried(self, again: Callable[[], Tensor] | None, params: Iterable[Tensor]) -> Callable[[], Tensor] | None:
        """A trial loss with the cost of the weights at that time.

        Args:
            again: evaluates the loss alone; None if it cannot be.
            params: the parameters.
        """
        if again is None or not self:
            return again
        own = list(params)
        return lambda: again() + self.cost(own)


def along(weight: float, params: Sequence[Tensor], step: Mapping[int, Tensor]) -> float:
    """Slope c w . s of the cost along a step s that has just been made.

    Args:
        weight: c.
        params: the parameters, moved.
        step: s by id of the parameter.
    """
    if not weight:
        return 0.0
    pairs = [(p.detach().reshape(-1), step[id(p)].reshape(-1)) for p in params if id(p) in step]
    return weight * float(torch.stack([(p - s) @ s for p, s in pairs]).sum())


def check_ridge(ridge: float, mass: Mass, fallback: bool) -> None:
    """Refuse a cost that is not of the damping's own form.

    Args:
        ridge: c.
        mass: D, which must be the identity where there is a cost.
        fallback: whether another optimizer moves some of the weights.

    Raises:
        ValueError: if it is not.
    """
    if ridge and not (isinstance(mass, str) and mass == "identity"):
        raise ValueError(
            f"ridge={ridge} is a cost in the weights' own units and needs mass='identity', got mass={mass!r}; leave "
            "one out, or put the penalty into a closure."
        )
    if ridge and fallback:
        raise ValueError("ridge= is a cost of all weights, of which a fallback optimizer does not know; leave one out.")
