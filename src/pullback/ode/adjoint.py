r"""The adjoint of a flow map, for one costate or all columns of a factor in one solve backwards in time.

.. math:: \dot x = F, \qquad \dot S = -F_x^\top S, \qquad
   U = \int_{t_0}^{t_1} F_\theta^\top S\,dt \approx \sum_k w_k\, F_\theta(t_k, x_k)^\top S_k

(theory 7). The solve gives x and S at Gauss-Legendre nodes, by the solver's own dense output, and everything that is an
integral over time is a sum over them: gradients (S the costate, one column), rows of U, Kronecker moments. So the
parameters take no part in the solver's stages, and the memory does not grow with the number of steps. Where a factor
has been swept, the costate is a sum of its columns, sample by sample, along the very same path (theory 17).

Whether the nodes are enough is tested by the integrals that are known, of the right-hand sides themselves
(derived here): :math:`\int F\,dt = x(t_1) - x(t_0)` and :math:`\int F_x^\top S\,dt = S(t_0) - S(t_1)`. While these miss
by more than the tolerance, nodes are doubled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from pullback.errors import CoverageError, SolverError
from pullback.ode.path import Node, Path, Visitor, along, same, summed, units_of
from pullback.ode.products import batches, columns, full, grad, rms
from pullback.ode.quadrature import gauss_legendre
from pullback.tape.call import Gate
from pullback.tape.recorder import unheard

if TYPE_CHECKING:
    from pullback.ode.flow import Flow

#: More nodes are never taken: where so many are too few, the field is not smooth.
MOST_NODES = 256
#: How far off the way back may end, in parts of the state's size.
LOST = 0.1


V = TypeVar("V", bound=Visitor)


class Solve(Gate):
    """One call of a flow, as far as its adjoint needs it.

    Args:
        flow: the module.
        t0: where it began.
        t1: where it ended.

    Attributes:
        given: parameters and buffers of the field at that time, by name.
        x0: the state at t0, detached.
        x1: the state at t1, detached.
    """

    def __init__(self, flow: Flow, t0: float, t1: float) -> None:
        self.flow = flow
        self.t0 = t0
        self.t1 = t1
        self.given = tensors_of(flow.func)
        self.x0: Tensor | None = None
        self.x1: Tensor | None = None
        self._substitutes: dict[str, Tensor] | None = None
        self._version = 0
        self._columns: Tensor | None = None
        self._weights: Tensor | None = None
        self._path: Path | None = None

    def ended(self, x0: Tensor, x1: Tensor) -> None:
        """Remember both ends."""
        self.x0, self.x1 = x0.detach(), x1.detach()
        self._version = self.x1._version

    def field(self, t: float | Tensor, x: Tensor) -> Tensor:
        """The field at a time, with its graph."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        with torch.enable_grad():
            if self._substitutes is None:
                out: Tensor = self.flow.func(t, x)
            else:
                out = torch.func.functional_call(self.flow.func, self._substitutes, (t, x))
        return out

    def leaves(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """What a backward pass differentiates in: the trained parameters, or what stood for them in the call.

        Args:
            params: the trained ones of the call, in their order.
        """
        now = tensors_of(self.flow.func)
        if all(now.get(name) is t for name, t in self.given.items()):
            self._substitutes = None
            return params
        # torch.func.functional_call lent the field others, and has taken them back.
        own = {name: t.detach().requires_grad_(t.requires_grad) for name, t in self.given.items()}
        self._substitutes = own
        return [t for t in own.values() if t.requires_grad]

    def arrive(self, S: Tensor, weights: Tensor | None) -> None:
        """See the base class. Nothing is solved before it is asked for."""
        if not self._begins(S):
            self._columns, self._path = S, None  # never two of them
        self._weights = weights

    def pull(self, S: Tensor) -> Tensor:
        """See the base class."""
        with self.flow.told():
            return self.path(S).pulled()

    def _begins(self, S: Tensor) -> bool:
        """Whether the columns that arrived begin with these, to round-off."""
        return self._columns is not None and same(S, self._columns[: len(S)], self.flow.solver.tolerance)

    def path(self, S: Tensor) -> Path:
        """The solve for these columns: that of all columns that arrived, if they are the first of them.

        Args:
            S: shape (r, N, ...).

        Raises:
            SolverError: if the solver gives up.
            CoverageError: if the output was overwritten in place.
        """
        return self._shared().first(len(S)) if self._begins(S) else self.solved(S)

    def costate(self, a: Tensor) -> Path:
        """The solve for the user's own costate: that of the columns of which it is a sum, or one of its own.

        Args:
            a: shape (N, ...).

        Raises:
            SolverError, CoverageError: as :meth:`path`.
        """
        S, weights = self._columns, self._weights
        if S is None or weights is None or weights.shape != S.shape[:2]:
            return self.solved(a[None])
        if not same(a[None], summed(S, weights)[None], self.flow.solver.tolerance):
            return self.solved(a[None])  # it came other ways, too
        return self._shared().summed(weights)

    def release(self) -> None:
        """Give the memory of the solve back; it is made again if somebody asks."""
        self._path = None

    def _shared(self) -> Path:
        assert self._columns is not None
        if self._path is None or len(self._path.times) < self.flow.nodes:
            self._path = None
            self._path = self.solved(self._columns)
        return self._path

    @torch.no_grad()
    def solved(self, S: Tensor) -> Path:
        """The solve itself; arguments and errors as of :meth:`path`, and a SolverError if it does not find back."""
        x1 = self.x1
        assert x1 is not None
        if x1._version != self._version:
            raise CoverageError(
                "The output of an ODE block was changed in place after the call, which its adjoint starts from; write "
                "y = f(x) instead of f_(x) or x += ... there."
            )
        units = units_of(S)
        end = torch.cat([x1[None], S / along(units, S)])
        points, shares = gauss_legendre(self.flow.nodes)
        length = self.t1 - self.t0
        times = [self.t0 + p * length for p in reversed(points)]
        weights = [w * length for w in reversed(shares)]
        velocity = _Backwards(self)
        with unheard():
            states, count = self.flow.solver.solve(velocity, end, [self.t1, *times, self.t0])
        self.flow.nfe_backward = count + len(times)
        self._found_back(states[-1, 0])
        return Path(units, times, weights, states[1:-1], states[-1], end)

    def _found_back(self, x0: Tensor) -> None:
        """Whether the way back ended where the way there began: x is not kept but integrated backwards.

        Raises:
            SolverError: if not, so that gradients would be of another solution.
        """
        assert self.x0 is not None
        lost = rms(x0 - self.x0) / (rms(self.x0) or 1.0)
        if not lost <= LOST:
            raise SolverError(
                f"Integrated back from t = {self.t1:.6g} to {self.t0:.6g}, the state misses its beginning by "
                f"{lost:.1e} of its size: the field contracts too strongly for its adjoint. Tighten rtol and atol, "
                "shorten the steps or the interval, or take adjoint=False.",
                self.t0,
            )

    def over(self, path_of: Callable[[], Path], visitor: Callable[[], V]) -> tuple[Path, V]:
        """Send a visitor to every node, with as many nodes as the tolerance asks for.

        Args:
            path_of: the solve, with as many nodes as the flow says now.
            visitor: makes a fresh one, for every attempt.

        Returns:
            The path, and the visitor that has seen it all.

        Raises:
            SolverError: if no number of nodes is enough.
        """
        flow, before = self.flow, float("inf")
        while True:
            path = path_of()
            total, found = torch.zeros_like(path.end), visitor()
            for node in path:
                total.add_(found.visit(node), alpha=node.weight)
            miss = flow.missed = path.defect(total)
            if miss <= max(flow.solver.tolerance, flow.reachable):
                return path, found
            # Fewer nodes than the solver takes steps may miss oscillations however often they are doubled.
            enough = flow.nodes >= flow.solver.steps(flow.nfe_backward - flow.nodes)
            settled = enough and miss > before / 2
            if miss <= flow.solver.acceptable and (settled or flow.nodes >= MOST_NODES):
                # What is left is not the quadrature's: the states at the nodes are as exact as the solver made them,
                # and half as many nodes did as well.
                flow.reachable = 2 * (max(miss, before) if settled else miss)
                if settled:
                    flow.nodes //= 2
                return path, found
            if flow.nodes >= MOST_NODES:
                raise SolverError(
                    f"The field varies too fast for its adjoint: with {MOST_NODES} nodes from t = {self.t0:.6g} to "
                    f"{self.t1:.6g} integrals of the solution still miss by {miss:.1e} of its size. Take shorter "
                    "steps or tighter tolerances, several blocks one after the other, or adjoint=False.",
                    self.t0,
                )
            before = miss
            flow.nodes *= 2


class _Backwards:
    """dx/dt and dS/dt.

    Args:
        solve: the call.
    """

    def __init__(self, solve: Solve) -> None:
        self.solve = solve
        self.batched: bool | None = None

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        x = y[0].detach().requires_grad_()
        f = self.solve.field(t, x)
        if self.batched is None:
            self.batched = batches(f, len(y) - 1)
        out = torch.empty_like(y)
        out[0] = f.detach()
        (pulled,) = columns(f, [x], y[1:], self.batched)
        torch.neg(pulled, out=out[1:])
        return out


def tensors_of(field: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return {**dict(field.named_parameters()), **dict(field.named_buffers())}


class Adjoint(torch.autograd.Function):
    """x(t0) to x(t1); its backward pass solves backwards in time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, solve: Solve, *params: Tensor) -> Tensor:
        """Solve; nothing of the steps is kept."""
        flow = solve.flow
        with unheard():
            path, flow.nfe = flow.solver.solve(flow.func, x, (solve.t0, solve.t1))
        out = path[-1].clone()  # not a view of the whole path
        ctx.solve = solve
        ctx.save_for_backward(out, *params)
        solve.ended(x, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor | None, ...]:
        """The costate at t0 and the gradient; zeros behind a closed gate."""
        solve: Solve = ctx.solve
        _, *params = ctx.saved_tensors  # says so if one was overwritten
        if solve.closed:
            return torch.zeros_like(a), None, *(None for _ in params)
        params = solve.leaves(params)
        with solve.flow.told(), unheard():
            path, found = solve.over(lambda: solve.costate(a), lambda: Gradient(solve, params))
        return path.pulled()[0], None, *(g.mul_(path.units[0]) for g in found.total)


class Gradient:
    """Sums up F_theta^T a, the first column being a."""

    def __init__(self, solve: Solve, params: Sequence[Tensor]) -> None:
        self.solve = solve
        self.params = params
        self.total = [torch.zeros_like(p) for p in params]

    def visit(self, node: Node) -> Tensor:
        """See :class:`Visitor`."""
        x = node.x.detach().requires_grad_()
        f = self.solve.field(node.t, x)
        if not f.requires_grad:
            return torch.stack([f, torch.zeros_like(x)])
        pulled, *parts = grad(f, [x, *self.params], node.S[0])
        for out, part in zip(self.total, parts, strict=True):
            if part is not None:
                out.add_(part, alpha=node.weight)
        return torch.stack([f.detach(), -full(pulled, x)])
