r"""Rows of a field's parameters, :math:`U_{ia} = \int F_\theta^\top S_{ia}\,dt`, from the solve that pulled S back.

At every node of the quadrature the field is a model of its own, run once with its layers recorded; the columns there,
times the node's weight, are pulled back to them. So nodes are calls of these layers, and their rules do the rest:
a linear layer's rows are outer products over the time grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from pullback.errors import CoverageError, MixingError
from pullback.ode.adjoint import Solve
from pullback.ode.flow import Flow
from pullback.ode.path import Node, along
from pullback.ode.products import batches, columns
from pullback.tape.call import CallFactor
from pullback.tape.checks import missed, mixed_calls
from pullback.tape.graph import Reached, reach
from pullback.tape.plan import Names, Unit, assign, usable_calls
from pullback.tape.recorder import Recorder, unheard
from pullback.tape.rules import Kind, Rows, register
from pullback.tape.rules.beside import BesideRows
from pullback.tape.rules.sides import Sides
from pullback.tape.term import LossUse, gather, one_sample


class TimedRows(Rows):
    """Rows of layers called at nodes in time, with the sides of an integral.

    Args:
        inner: their rows, positions in the order of the nodes.
        weights: the nodes' weights, which the inner factors hold already.
    """

    def __init__(self, inner: Rows, weights: Sequence[float]) -> None:
        super().__init__(inner.params, inner.r, inner.N)
        self.inner, self.weights = inner, list(weights)
        self.rule = f"{inner.rule} over time"

    def parts(self) -> Sequence[Rows]:
        """See the base class."""
        own = self.inner.parts()
        return [self] if own == [self.inner] else [TimedRows(part, self.weights) for part in own]

    def kept(self) -> slice:
        """See the base class."""
        return self.inner.kept()

    def sides(self, keep: slice | None = None) -> Sides | None:
        """Both sides with the nodes' weights apart. See the base class."""
        own = self.inner.sides(keep)
        if own is None or own.table or own.lengths is not None or own.given.shape[2] % len(self.weights):
            return None
        weights = torch.tensor(self.weights, dtype=own.factor.dtype, device=own.factor.device)
        weights = weights.repeat_interleave(own.given.shape[2] // len(self.weights))
        # Of time that runs backwards all weights are negative, which second moments do not see.
        return replace(own, factor=own.factor / weights[:, None], times=weights.abs(), nodes=len(self.weights))

    def gram(self) -> Tensor:
        """See the base class."""
        return self.inner.gram()

    def gram_into(self, out: Tensor, half: bool = False) -> Tensor:
        """See the base class."""
        return self.inner.gram_into(out, half)

    def matvec(self, delta: Tensor) -> Tensor:
        """See the base class."""
        return self.inner.matvec(delta)

    def rmatvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        return self.inner.rmatvec(v)

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """See the base class."""
        return self.inner.dense(start, stop)

    def primal(self) -> Tensor:
        """See the base class."""
        return self.inner.primal()

    def diagonal(self) -> Tensor:
        """See the base class."""
        return self.inner.diagonal()

    def gram_flops(self) -> float:
        """See the base class."""
        return self.inner.gram_flops()

    def primal_flops(self) -> float:
        """See the base class."""
        return self.inner.primal_flops()

    def matvec_flops(self) -> float:
        """See the base class."""
        return self.inner.matvec_flops()

    def to(self, dtype: torch.dtype) -> TimedRows:
        """See the base class."""
        return TimedRows(self.inner.to(dtype), self.weights)


class Layers:
    """Visits the nodes and keeps what the layers were given there, and their factors.

    Args:
        solve: the call of the flow.
        recorder: of the field.
        params: parameters that get rows, by id.
        N: samples.

    Attributes:
        units: which layer gives rows to which parameter.
        factors: by id of the layer, node after node, times the node's weight.
        weights: of the nodes.
    """

    def __init__(self, solve: Solve, recorder: Recorder, params: Mapping[int, Tensor], N: int) -> None:
        self.solve, self.recorder, self.params, self.N = solve, recorder, params, N
        self.units: list[Unit] = []
        self.factors: dict[int, list[CallFactor]] = {}
        self.weights: list[float] = []
        self.batched: bool | None = None

    def visit(self, node: Node) -> Tensor:
        """See :class:`~pullback.ode.path.Visitor`."""
        x = node.x.clone().requires_grad_()  # layers keep it, and not the whole path
        f = self.solve.field(node.t, x)
        if f.grad_fn is None:
            raise CoverageError(
                f"The field {type(self.solve.flow.func).__name__} gave dx/dt without a graph at t = {node.t:.6g}; "
                "it must be made from its input and parameters by differentiable operations."
            )
        with self.recorder.paused():
            found = reach(get_gradient_edge(f), self.recorder.key)
            if not self.units:
                self.units = self._decided(f, found, node.S)
            found = found.only({id(unit.module) for unit in self.units})
            pulled, *parts = columns(f, [x, *found.edges], node.S, self._batches(f, len(node.S)))
        # Never in place: to the summands of a + b autograd hands one and the same tensor.
        parts = [part * along(node.weight * node.units, part) for part in parts]
        for key, factors in gather(found, parts, len(node.S)).items():
            self.factors.setdefault(key, []).extend(factors)
        self.weights.append(node.weight)
        return torch.cat([f.detach()[None], -pulled])

    def _batches(self, f: Tensor, r: int) -> bool:
        if self.batched is None:
            self.batched = batches(f, r)
        return self.batched

    def _decided(self, f: Tensor, found: Reached, S: Tensor) -> list[Unit]:
        """The units, as the tape decides them for a model and by the same checks; once per structure."""
        flow, field = self.solve.flow, self.solve.flow.func
        wanted = {key: p for key, p in self.params.items() if key in found.params}
        structure = tuple((id(call.module), call.shape) for call, _ in found.calls), tuple(wanted), self.N > 1
        if structure in flow.units:
            return flow.units[structure]
        use = LossUse(get_gradient_edge(f), f.detach())
        self._apart()
        usable = usable_calls([call for call, _ in found.calls], self.N, mixed_calls(use, found, self.N))
        found.params = wanted
        forced: set[int] = set()
        for _ in range(2):
            units = assign(Names(field), usable, wanted, forced)
            uses = [id(p) for unit in units for p in unit.parameters()]
            wrong = {key for key in uses if uses.count(key) > 1} or set(missed(units, use, found, self.N, S[0]))
            if not wrong:
                flow.units[structure] = units
                return units
            forced |= wrong  # used by hand, or by two layers: rows from the field as a whole
        raise CoverageError(
            f"The field {type(field).__name__} uses parameters in a way that mixes samples or that its calls do not "
            "show; freeze them or change that use."
        )

    def _apart(self) -> None:
        """Refuse a field that mixes samples, where a sample's column spreads to others in time.

        Raises:
            MixingError: if it does.
        """
        x1 = self.solve.x1
        assert x1 is not None
        which = self.N // 2
        found = self.solve.solved(one_sample(x1, self.N, which)).begin[1].clone()
        found[which] = 0
        if bool((found != 0).any()):
            raise MixingError(
                f"In the field {type(self.solve.flow.func).__name__} dx/dt of one sample depends on other samples of "
                "the batch, so the metric has no rows; let it treat samples apart."
            )


@torch.no_grad()
def flow_rows(module: Flow, calls: Sequence[CallFactor], wanted: frozenset[str], N: int) -> Rows:
    """Rows of a flow's parameters.

    Args:
        module: the flow.
        calls: its calls in one term.
        wanted: names of the parameters, relative to the flow.
        N: samples.

    Raises:
        CoverageError: if the field mixes samples, or hides a parameter.
        SolverError: if the solver gives up.
    """
    params = {id(p): p for p in (module.get_parameter(name) for name in sorted(wanted))}
    factors: dict[int, list[CallFactor]] = {}
    weights: list[float] = []
    units: list[Unit] = []
    recorder = Recorder(module.func)
    try:
        for call in calls:
            solve = call.call.gate
            if not isinstance(solve, Solve):
                raise CoverageError(
                    f"Layers of the field {type(module.func).__name__} are not called with the batch along the first "
                    "axis, so their parameters have no rows; call them so, or solve with adjoint=True."
                )
            with unheard(recorder):
                _, seen = solve.over(partial(solve.path, call.factor()), partial(Layers, solve, recorder, params, N))
            solve.release()
            units = seen.units
            weights += seen.weights
            for key, own in seen.factors.items():
                factors.setdefault(key, []).extend(own)
    finally:
        recorder.close()
    parts: list[Rows] = [TimedRows(unit.rows(factors[id(unit.module)], N), weights) for unit in units]
    return parts[0] if len(parts) == 1 else BesideRows(parts, f"ODE ({type(module.func).__name__})")


register(Kind(Flow, flow_rows, whole=True))
