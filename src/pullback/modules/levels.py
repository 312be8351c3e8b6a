"""Modules in a hierarchy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from pullback.modules.composite import Back, Composite, Part, Run
from pullback.modules.errors import CompositionError
from pullback.modules.shape import Shape, sample, shown


class Hierarchy(Composite):
    r"""Levels, each driven by the one above it and by the input; the state is that of all levels.

    .. math:: y_1 = f_1(x), \qquad y_l = f_l([x, y_{l-1}]), \qquad y = [y_1, \dots, y_L]

    No level sees one below, so the derivative of :math:`y_l` in the parameters of a lower level is zero. States are
    vectors, joined along their only axis.

    Args:
        levels: f_1 to f_L, the upstream one first.
        mass: factor on the masses of the levels.
    """

    def __init__(self, *levels: Part, mass: float = 1.0) -> None:
        super().__init__(levels, mass)
        every = list(self)
        width = _width(every[0].inputs)
        for above, level in itertools.pairwise(every):
            out, into = _width(above.outputs), _width(level.inputs)
            if width is not None and out is not None and into is not None and into != width + out:
                raise CompositionError(
                    f"In a hierarchy, {level._name()} takes states of shape {shown(level.inputs)} but gets the input "
                    f"and the level above, ({width},) and {shown(above.outputs)}: ({width + out},)."
                )
        self.inputs = every[0].inputs
        outs = [_width(level.outputs) for level in every]
        if all(out is not None for out in outs):
            self.outputs = (sum(out for out in outs if out is not None),)

    def wire(self, run: Run, x: Tensor, axis: int) -> Tensor:
        """See the base class."""
        if x.ndim != axis + 1:
            raise CompositionError(f"A hierarchy takes vectors as states, got the shape {shown(sample(x))}.")
        found: list[Tensor] = []
        for level in self:
            found.append(run(level, torch.cat([x, found[-1]], axis) if found else x))
            if found[-1].ndim != axis + 1:
                raise CompositionError(
                    f"The level {level._name()} returned states of shape {shown(sample(found[-1]))}; a hierarchy "
                    "joins vectors."
                )
        return torch.cat(found, axis)

    def unwire(self, back: Back, dy: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        shares = list(dy.split(list(sizes), axis))
        total: Tensor | None = None
        for k in range(len(shares) - 1, 0, -1):
            into = back(shares[k])
            dx, above = into.split([into.shape[axis] - sizes[k - 1], sizes[k - 1]], axis)
            total = dx if total is None else total + dx
            shares[k - 1] = shares[k - 1] + above
        dx = back(shares[0])
        return dx if total is None else total + dx


def hierarchy(*levels: Part, mass: float = 1.0) -> Hierarchy:
    """Levels that drive one another from above; see :class:`Hierarchy`."""
    return Hierarchy(*levels, mass=mass)


def _width(shape: Shape) -> int | None:
    """Size of a vector, if it is known; of ``(..., n)`` nothing else than a vector is meant here."""
    last = shape[-1] if shape else None
    return last if isinstance(last, int) else None
