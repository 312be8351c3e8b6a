r"""Composition: series, parallel, residual, feedback and hierarchy of Riemannian modules are Riemannian modules.

Between its parts a composite only adds, joins and divides states. That glue is linear, so that one description of the
wiring serves four times: run with the parts themselves it is the state map, run with their linearisations it is
:math:`A\,dx + B\,d\theta`, and its transpose is :math:`(A^\top dy, B^\top dy)` and the pull-back of factors.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from pullback.errors import PullbackError
from pullback.modules.base import RiemannianModule
from pullback.modules.errors import CompositionError
from pullback.modules.leaf import riemannian
from pullback.modules.local import ById, Local
from pullback.modules.shape import sample, shown

#: runs a part of the composite on a state, or a change of one
Run = Callable[[RiemannianModule, Tensor], Tensor]

#: pulls a change of the output of the part that was run last, and not pulled yet, back to its input
Back = Callable[[Tensor], Tensor]

#: what composites are made of; plain modules of torch are wrapped
Part = RiemannianModule | nn.Module


class Composite(RiemannianModule):
    """Modules wired together.

    Args:
        parts: the modules; those that are plain modules of torch are wrapped.
        mass: factor on the masses of the parts.
    """

    def __init__(self, parts: Sequence[Part], mass: float = 1.0) -> None:
        super().__init__(mass)
        if not isinstance(self.mass, float):
            raise TypeError("The mass of a composite is one factor on those of its parts; give the parts theirs.")
        if not parts:
            raise CompositionError(f"{self._name()} needs a module.")
        self.parts = nn.ModuleList(p if isinstance(p, RiemannianModule) else riemannian(p) for p in parts)
        self._ran = False

    def __iter__(self) -> Iterator[RiemannianModule]:
        """The parts in order."""
        for part in self.parts:
            assert isinstance(part, RiemannianModule)
            yield part

    @abstractmethod
    def wire(self, run: Run, x: Tensor, axis: int) -> Tensor:
        """The wiring: runs the parts, with nothing but linear glue between them.

        Args:
            run: runs a part.
            x: a state or a change of one.
            axis: the first axis of one sample's state.
        """

    @abstractmethod
    def unwire(self, back: Back, dy: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
        """The transpose of :meth:`wire`: pulls through the parts in the opposite order.

        Args:
            back: pulls through the part that is next from behind.
            dy: a change of the output.
            axis: the first axis of one sample's state.
            sizes: size along that axis of what each run returned, in the order of the runs.
        """

    def map(self, x: Tensor) -> Tensor:
        """See the base class."""
        y = self.wire(self._call, x, 1)
        self._ran = True
        return y

    def linearise(self, x: Tensor) -> Local:
        """See the base class; by the chain rule of the parts."""
        locals_: list[Local] = []

        def note(part: RiemannianModule, state: Tensor) -> Tensor:
            locals_.append(part.linearise(state))
            return locals_[-1].y

        self.check_input(x)
        x = x.detach()
        y = self.wire(note, x, 1)
        self.check_output(x, y)
        return ComposedLocal(self, x, y, locals_)

    def leaves(self) -> Iterator[RiemannianModule]:
        """See the base class."""
        for part in self:
            yield from part.leaves()

    def _call(self, part: RiemannianModule, x: Tensor) -> Tensor:
        try:
            y: Tensor = part(x)
        except RuntimeError as error:
            if self._ran or isinstance(error, PullbackError) or type(error) is not RuntimeError:
                raise
            # Never run before: most likely the state is of another shape than the part takes.
            raise CompositionError(
                f"In {self._name()}, {part._name()} was given states of shape {shown(sample(x))} and failed: {error}"
            ) from error
        return y

    def _weighed(self, factor: float = 1.0) -> Iterator[tuple[str, nn.Parameter, float | Tensor]]:
        assert isinstance(self.mass, float)
        for k, part in enumerate(self):
            for name, p, value in part._weighed(factor * self.mass):
                yield f"parts.{k}.{name}", p, value


class ComposedLocal(Local):
    """The linearisation of a composite, from those of its parts.

    Args:
        module: the composite.
        x: the states it is given.
        y: the states it returns.
        locals_: linearisations of the parts, one for every time a part is run, in order.
    """

    module: Composite

    def __init__(self, module: Composite, x: Tensor, y: Tensor, locals_: Sequence[Local]) -> None:
        super().__init__(module, x, y)
        self.locals = list(locals_)

    def push(self, dx: Tensor, theta: ById) -> Tensor:
        """See the base class."""
        following = iter(self.locals)
        return self.module.wire(lambda part, d: next(following).push(d, theta), dx, 1)

    def pull(self, dy: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """See the base class."""
        return self._back(dy, lambda local, d: local.pull(d), 1)

    def rows(self, S: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """See the base class."""
        return self._back(S, lambda local, s: local.rows(s), 2)

    def _back(
        self, dy: Tensor, pull: Callable[[Local, Tensor], tuple[Tensor, dict[int, Tensor]]], axis: int
    ) -> tuple[Tensor, dict[int, Tensor]]:
        last = reversed(self.locals)
        total: dict[int, Tensor] = {}

        def back(d: Tensor) -> Tensor:
            dx, own = pull(next(last), d)
            for key, g in own.items():
                total[key] = total[key] + g if key in total else g
            return dx

        sizes = [local.y.shape[1] if local.y.ndim > 1 else 0 for local in self.locals]
        return self.module.unwire(back, dy, axis, sizes), total


def summed(parts: Sequence[Tensor]) -> Tensor:
    """Sum of tensors of one shape."""
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out
