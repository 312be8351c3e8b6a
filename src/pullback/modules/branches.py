"""Modules in parallel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pullback.modules.base import RiemannianModule
from pullback.modules.composite import Back, Composite, Part, Run, summed
from pullback.modules.errors import CompositionError
from pullback.modules.shape import Shape, fits, met, sample, shown


class Parallel(Composite):
    """Side by side, y = sum_k f_k(x) or their concatenation; inputs shared, or each its own share.

    States are joined and divided along their first axis.

    Args:
        parts: the modules.
        join: ``"sum"`` or ``"concatenate"``.
        split: sizes of the shares of the input along its first axis; None for one input shared by all.
        mass: factor on the masses of the parts.
    """

    def __init__(
        self,
        *parts: Part,
        join: Literal["sum", "concatenate"] = "sum",
        split: Sequence[int] | None = None,
        mass: float = 1.0,
    ) -> None:
        super().__init__(parts, mass)
        if join not in ("sum", "concatenate"):
            raise ValueError(f"join must be 'sum' or 'concatenate', got {join!r}.")
        self.join = join
        self.split = None if split is None else [int(size) for size in split]
        every = list(self)
        if self.split is not None and (len(self.split) != len(every) or min(self.split) < 1):
            raise CompositionError(f"split has {self.split} for {len(every)} modules; give one positive size for each.")
        if self.split is None:
            self.inputs = _common("take", every, [part.inputs for part in every])
        else:
            for part, size in zip(every, self.split, strict=True):
                if not fits(part.inputs, None if part.inputs is None or len(part.inputs) > 1 else (size,)):
                    raise CompositionError(
                        f"In parallel, {part._name()} takes states of shape {shown(part.inputs)} but gets a share of "
                        f"({size},); change split=."
                    )
        if join == "concatenate":
            first = [part.outputs[0] for part in every if part.outputs is not None and len(part.outputs) == 1]
            if len(first) == len(every):
                self.outputs = (sum(size for size in first if isinstance(size, int)),)
        else:
            self.outputs = _common("return", every, [part.outputs for part in every])

    def wire(self, run: Run, x: Tensor, axis: int) -> Tensor:
        """See the base class."""
        if self.split is not None and x.shape[axis] != sum(self.split):
            raise CompositionError(
                f"The input has shape {shown(sample(x))}, the shares {self.split} add up to {sum(self.split)}."
            )
        given = [x] * len(self.parts) if self.split is None else list(x.split(self.split, axis))
        found = [run(part, own) for part, own in zip(self, given, strict=True)]
        for part, y in zip(list(self)[1:], found[1:], strict=True):
            alike = y.shape == found[0].shape
            if not alike and (self.join == "sum" or not fits(sample(y)[1:], sample(found[0])[1:])):
                raise CompositionError(
                    f"In parallel, one part returns states of shape {shown(sample(found[0]))}, {part._name()} "
                    f"{shown(sample(y))}; they cannot be joined by {self.join}."
                )
        return summed(found) if self.join == "sum" else torch.cat(found, axis)

    def unwire(self, back: Back, dy: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        shares = [dy] * len(self.parts) if self.join == "sum" else list(dy.split(list(sizes), axis))
        pulled = [back(own) for own in reversed(shares)][::-1]
        return summed(pulled) if self.split is None else torch.cat(pulled, axis)


def parallel(
    *parts: Part,
    join: Literal["sum", "concatenate"] = "sum",
    split: Sequence[int] | None = None,
    mass: float = 1.0,
) -> Parallel:
    """Modules side by side; see :class:`Parallel`."""
    return Parallel(*parts, join=join, split=split, mass=mass)


def _common(what: str, parts: Sequence[RiemannianModule], shapes: Sequence[Shape]) -> Shape:
    """The shape that parts in parallel share."""
    known: Shape = None
    for k, shape in enumerate(shapes):
        if not fits(known, shape):
            raise CompositionError(
                f"In parallel, {parts[k]._name()} would {what} states of shape {shown(shape)}, the parts before it "
                f"{what} {shown(known)}; they must be alike."
            )
        known = met(known, shape)
    return known
