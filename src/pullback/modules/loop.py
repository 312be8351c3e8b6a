"""Two modules in a loop."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pullback.modules.composite import Back, Composite, Part, Run
from pullback.modules.errors import CompositionError
from pullback.modules.shape import fits, met, sample, shown


class Feedback(Composite):
    r"""Two modules in a loop in discrete time, around which a signal goes a fixed number of times.

    .. math:: y_0 = f(x), \qquad y_{k+1} = f(x + h(y_k)), \qquad y = y_K

    x is the reference, held while the loop runs; f the module in the forward path, h the one in the return path
    (negative feedback has its sign inside h). The parameters of both are used again in every round.

    Args:
        forward: f.
        back: h, which returns states of the shape f takes.
        rounds: K; 0 leaves h out.
        mass: factor on the masses of the parts.
    """

    def __init__(self, forward: Part, back: Part, *, rounds: int, mass: float = 1.0) -> None:
        super().__init__([forward, back], mass)
        if rounds < 0:
            raise ValueError(f"rounds must be at least 0, got {rounds}.")
        self.rounds = int(rounds)
        f, h = self
        for a, b, what in ((f, h, "forward part returns"), (h, f, "return path returns")):
            if not fits(a.outputs, b.inputs):
                raise CompositionError(
                    f"In a loop, the {what} states of shape {shown(a.outputs)} but {b._name()} takes {shown(b.inputs)}."
                )
        self.inputs, self.outputs = met(f.inputs, h.outputs), met(f.outputs, h.inputs)

    def wire(self, run: Run, x: Tensor, axis: int) -> Tensor:
        """See the base class."""
        f, h = self
        y = run(f, x)
        for _ in range(self.rounds):
            back = run(h, y)
            if back.shape != x.shape:
                raise CompositionError(
                    f"In a loop, {h._name()} returned states of shape {shown(sample(back))} to an input of shape "
                    f"{shown(sample(x))}."
                )
            y = run(f, x + back)
        return y

    def unwire(self, back: Back, dy: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
        """See the base class."""
        total: Tensor | None = None
        for _ in range(self.rounds):
            dx = back(dy)  # f
            total = dx if total is None else total + dx
            dy = back(dx)  # h
        dx = back(dy)
        return dx if total is None else total + dx


def feedback(forward: Part, back: Part, *, rounds: int, mass: float = 1.0) -> Feedback:
    """Two modules in a loop; see :class:`Feedback`."""
    return Feedback(forward, back, rounds=rounds, mass=mass)
