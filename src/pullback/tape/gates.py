"""Sweeps through modules that pull columns back by themselves, all at once.

Autograd would go through such a module once per column. Here the sweep stops at its output, where the factor is
complete once everything behind it has been swept, hands over all columns, and goes on from its input; factors add up
where ways meet. Stopping is the module's part: while its gate is closed, its backward pass returns zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pullback.tape.call import Gate
from pullback.tape.graph import Reached

Way = Callable[[GradientEdge, Sequence[GradientEdge], Tensor], list[Tensor]]


def gates_of(found: Reached) -> list[tuple[Gate, GradientEdge]]:
    """The gates among the calls that reach a prediction, with the edges of their outputs, the last call first."""
    return [(call.gate, edges[0]) for call, edges in reversed(found.calls) if call.gate is not None and 0 in edges]


def weights_of(S: Tensor, costate: Tensor, e0: Tensor, N: int) -> Tensor | None:
    r"""The costate as a sum of the columns, so that a gate need not pull it back once more in the user's own pass.

    Samples stay apart on the way, so :math:`\lambda_n = \sum_a e_{an} s_{an}`, if it holds at the prediction, holds at
    every gate (derived here). It does for the residual :math:`e_0` of a metric itself. Beside a sketch it does not;
    there the user's pass has a solve of its own, which takes less memory than one more column would.

    Args:
        S: factor at the prediction, (r, *z.shape).
        costate: gradient of the loss there.
        e0: residual in R-space, (r * N,).
        N: samples.

    Returns:
        The weights e of the sum, (r, N); None if the columns do not span the costate.
    """
    weights = e0.view(-1, N)
    total = (S.reshape(*weights.shape, -1) * weights[:, :, None]).sum(0).view_as(costate)
    found = float((total - costate).abs().max()) <= 100 * torch.finfo(S.dtype).eps * float(costate.abs().max())
    return weights if found else None


def through(
    way: Way,
    z: GradientEdge,
    edges: Sequence[GradientEdge],
    S: Tensor,
    gates: Sequence[tuple[Gate, GradientEdge]],
    weights: Tensor | None = None,
) -> list[Tensor]:
    """Sweep as ``way`` does, with every gate passed once.

    Args:
        way: pulls columns back through what autograd knows; every edge it is given must be reached.
        z: where the prediction comes from.
        edges: outputs of the recorded calls.
        S: cotangents, shape (r, B, *out).
        gates: gates in the way, the last call first.
        weights: the costate as a sum of columns, see :func:`weights_of`; None if it is none.

    Returns:
        As :func:`pullback.tape.sweep.loop`.
    """
    stops = [edge for _, edge in gates]
    wanted = [*edges, *stops]
    for gate, _ in gates:
        gate.closed = True
    try:
        total = way(z, wanted, S)
        for k, (gate, out) in enumerate(gates):
            arrived = total[len(edges) + k]
            gate.arrive(arrived, weights)
            node, number = out.node.next_functions[0]
            if node is None:  # nothing upstream
                continue
            before = GradientEdge(node, number)
            upstream = _reached(before, wanted)
            if not upstream:
                continue
            pulled = gate.pull(arrived)
            for index, part in zip(upstream, way(before, [wanted[i] for i in upstream], pulled), strict=True):
                total[index] = total[index] + part
    finally:
        for gate, _ in gates:
            gate.closed = False
    return total[: len(edges)]


def _reached(start: GradientEdge, edges: Sequence[GradientEdge]) -> list[int]:
    """Which edges lie upstream of one, that one included."""
    seen, stack = {start.node}, [start.node]
    nodes = {edge.node for edge in edges}
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    live = nodes & seen
    return [k for k, edge in enumerate(edges) if edge.node in live and (edge.node is not start.node or edge == start)]
