"""Sweeps through modules that pull columns back by themselves, all at once.

Autograd would go through such a module once per column. Here the sweep stops at its output, where the factor is
complete once everything behind it has been swept, hands over all columns, and goes on from its input; factors add up
where ways meet. Stopping is the module's part: while its gate is closed, its backward pass returns zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.autograd.graph import GradientEdge

from pullback.tape.call import Gate
from pullback.tape.graph import Reached

Way = Callable[[GradientEdge, Sequence[GradientEdge], Tensor], list[Tensor]]


def gates_of(found: Reached) -> list[tuple[Gate, GradientEdge]]:
    """The gates among the calls that reach a prediction, with the edges of their outputs, the last call first."""
    return [(call.gate, edges[0]) for call, edges in reversed(found.calls) if call.gate is not None and 0 in edges]


def through(
    way: Way, z: GradientEdge, edges: Sequence[GradientEdge], S: Tensor, gates: Sequence[tuple[Gate, GradientEdge]]
) -> list[Tensor]:
    """Sweep as ``way`` does, with every gate passed once.

    Args:
        way: pulls columns back through what autograd knows; every edge it is given must be reached.
        z: where the prediction comes from.
        edges: outputs of the recorded calls.
        S: cotangents, shape (r, B, *out).
        gates: gates in the way, the last call first.

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
            node, number = out.node.next_functions[0]
            if node is None:  # nothing upstream
                continue
            before = GradientEdge(node, number)
            upstream = _reached(before, wanted)
            if not upstream:
                continue
            pulled = gate.pull(total[len(edges) + k])
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
