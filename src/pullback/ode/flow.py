"""The flow map x(t0) -> x(t1) of a vector field, as a module."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from pullback.ode.adjoint import Adjoint, Solve
from pullback.ode.solver import Solver
from pullback.tape.plan import Unit
from pullback.tape.recorder import unheard
from pullback.tape.solves import Solves

#: Quadrature nodes to begin with; doubled where they are too few.
NODES = 4


class Flow(nn.Module, Solves):
    """Solves dx/dt = func(t, x) from one time to another.

    Args:
        func: the field.
        solver: how.
        adjoint: whether the backward pass solves backwards in time, or goes through the solver's steps.

    Attributes:
        nfe: evaluations of the field in the last forward pass.
        nfe_backward: evaluations in the last solve backwards in time, those at quadrature nodes included.
        nodes: quadrature nodes in time; they become more where errors ask for it.
        units: which layer of the field gives rows to which parameter, by structure of its calls.
        missed: how far integrals that are known were missed in the last backward pass, relative to the state's size.
        reachable: error of the quadrature below which more nodes did not help (the solver's own interpolation).
    """

    def __init__(self, func: nn.Module, solver: Solver, adjoint: bool) -> None:
        super().__init__()
        self.func = func
        self.solver = solver
        self.adjoint = adjoint
        self.nfe = self.nfe_backward = 0
        self.nodes = NODES
        self.reachable = 0.0
        self.missed = 0.0
        self.units: dict[Any, list[Unit]] = {}

    def forward(self, x: Tensor, t0: float, t1: float) -> Tensor:
        """The state at t1, shape of x.

        Args:
            x: the state at t0, batch first.
            t0: where to begin.
            t1: where to end; may lie before t0.

        Raises:
            SolverError: if the solver gives up.
        """
        self.__dict__.pop("_gate", None)
        if not self.adjoint or not torch.is_grad_enabled():
            path, self.nfe = self.solver.solve(self.func, x, (t0, t1))
            return path[-1]
        solve = Solve(self, t0, t1)
        out: Tensor = Adjoint.apply(
            x,
            solve,  # type: ignore[no-untyped-call]
            *(p for p in self.func.parameters() if p.requires_grad),
        )
        if out.requires_grad:
            self._gate = weakref.ref(solve)  # for whoever records this call; the node holds it
        return out

    def quietly(self, t: float, x: Tensor) -> Tensor:
        """The field at one time, without gradient and unheard."""
        with torch.no_grad(), unheard():
            out: Tensor = self.func(torch.as_tensor(t, dtype=x.dtype, device=x.device), x.detach())
        return out

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to the last pass."""
        state = self.__dict__.copy()
        state.pop("_gate", None)
        state["units"] = {}
        return state
