"""Modules in series, and with a skip around them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from pullback.modules.composite import Back, Composite, Part, Run
from pullback.modules.errors import CompositionError
from pullback.modules.shape import fits, met, sample, shown


class Series(Composite):
    """One after the other, y = f_L(... f_1(x))."""

    def __init__(self, *parts: Part, mass: float = 1.0) -> None:
        super().__init__(parts, mass)
        every = list(self)
        for k, (a, b) in enumerate(itertools.pairwise(every)):
            if not fits(a.outputs, b.inputs):
                raise CompositionError(
                    f"In series, part {k} ({a._name()}) returns states of shape {shown(a.outputs)} but part {k + 1} "
                    f"({b._name()}) takes {shown(b.inputs)}; put a module that changes the shape between them."
                )
        self.inputs, self.outputs = every[0].inputs, every[-1].outputs

    def wire(self, run: Run, x: Tensor, axis: int) -> Tensor:
        """See the base class."""
        for part in self:
            x = run(part, x)
        return x

    def unwire(self, back: Back, dy: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        for _ in self:
            dy = back(dy)
        return dy


class Residual(Composite):
    """A skip around a module, y = x + h f(x): with f a vector field a step of Euler's method.

    Args:
        part: f, which keeps the shape of the state.
        step: h.
        mass: factor on the mass of the part.
    """

    def __init__(self, part: Part, *, step: float = 1.0, mass: float = 1.0) -> None:
        super().__init__([part], mass)
        self.step = float(step)
        (f,) = self
        if not fits(f.inputs, f.outputs):
            raise CompositionError(
                f"{f._name()} takes states of shape {shown(f.inputs)} and returns {shown(f.outputs)}; a residual "
                "module must keep the shape."
            )
        self.inputs = self.outputs = met(f.inputs, f.outputs)

    def wire(self, run: Run, x: Tensor, axis: int) -> Tensor:
        """See the base class."""
        (f,) = self
        y = run(f, x)
        if y.shape != x.shape:
            raise CompositionError(
                f"{f._name()} was given states of shape {shown(sample(x))} and returned {shown(sample(y))}; a "
                "residual module must keep the shape."
            )
        return x + self.step * y

    def unwire(self, back: Back, dy: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        return dy + back(self.step * dy)


def series(*parts: Part, mass: float = 1.0) -> Series:
    """Modules one after the other; see :class:`Series`."""
    return Series(*parts, mass=mass)


def residual(part: Part, *, step: float = 1.0, mass: float = 1.0) -> Residual:
    """A module with a skip around it; see :class:`Residual`."""
    return Residual(part, step=step, mass=mass)
