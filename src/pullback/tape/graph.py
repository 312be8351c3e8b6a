"""Reading the autograd graph: which recorded calls a prediction depends on, and how it left the model."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pullback.tape.call import Call, RootCall
from pullback.tape.recorder import notes

Glue = Callable[[Tensor], Tensor]


@dataclass
class Reached:
    """What a prediction depends on.

    Attributes:
        calls: recorded calls in the order they happened, each with the edges of its outputs that reach
            the prediction, by output index.
        roots: calls of the whole model among them.
        params: ids of the parameters reached.
        inputs: edges of the aliases that modules were given, by id of the entry and number of the tensor.
        wiring: a hash of the whole graph, where modules were given aliases: what holds for the tensors between them
            does not hold if the same modules are joined in another way.
    """

    calls: list[tuple[Call, dict[int, GradientEdge]]] = field(default_factory=list)
    roots: list[RootCall] = field(default_factory=list)
    params: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, dict[int, GradientEdge]] = field(default_factory=dict)
    wiring: int = 0

    def only(self, modules: Container[int]) -> Reached:
        """The calls of some modules (by id), for a sweep that needs no others."""
        kept = [(call, edges) for call, edges in self.calls if id(call.module) in modules]
        return Reached(kept, self.roots, self.params, self.inputs, self.wiring)

    @property
    def flat(self) -> list[tuple[Call, GradientEdge]]:
        """Calls and edges, one row per edge."""
        return [(call, edge) for call, edges in self.calls for edge in edges.values()]

    @property
    def edges(self) -> list[GradientEdge]:
        """All edges, in the order of :attr:`flat`."""
        return [edge for _, edges in self.calls for edge in edges.values()]


def reach(edge: GradientEdge, key: str) -> Reached:
    """Walk the graph of a prediction and collect the calls recorded under ``key``.

    Args:
        edge: where the prediction comes from.
        key: the recorder's key.
    """
    found: dict[int, tuple[Call, dict[int, GradientEdge]]] = {}
    out = Reached()
    seen, stack, links = {edge.node: 0}, [edge.node], list[int]()
    entering = key + ".in"
    while stack:
        node = stack.pop()
        following = node.next_functions
        if not following:
            variable = getattr(node, "variable", None)
            if variable is not None:
                out.params[id(variable)] = variable
            continue
        written = notes(node)
        if written:
            for call, index, number in written.get(key, ()):
                found.setdefault(id(call), (call, {}))[1][index] = GradientEdge(node, number)
            if entering in written:
                entry, index = written[entering]
                out.inputs.setdefault(id(entry), {})[index] = GradientEdge(node, 0)
        for child, number in following:
            if child is None:
                continue
            if child not in seen:
                seen[child] = len(seen)
                stack.append(child)
            links += (seen[child], number)
    if out.inputs:
        out.wiring = hash(tuple(links))
    out.calls = sorted(found.values(), key=lambda item: item[0].order)
    out.roots = [call for call, _ in out.calls if isinstance(call, RootCall)]
    return out


@dataclass
class Path:
    """How a prediction was made from an output of the model: by operations that can be replayed.

    Attributes:
        root: the call of the model.
        index: which of its output tensors.
        glue: operations applied since, first to last.
    """

    root: RootCall
    index: int
    glue: list[Glue]

    def follow(self, outputs: list[Tensor]) -> Tensor:
        """The prediction from a replayed call's output tensors."""
        z = outputs[self.index]
        for operation in self.glue:
            z = operation(z)
        return z


def _signed(value: int) -> int:
    # Autograd saves negative dimensions and indices as unsigned 64-bit numbers.
    return value - (1 << 64) if value >= (1 << 63) else value


def _reshape(shape: tuple[int, ...]) -> Glue:
    # The batch may be folded in a replay, so the first axis follows from the others.
    return lambda t: t.reshape(-1, *shape[1:]) if shape else t.reshape(())


def _step(node: Any, shape: tuple[int, ...]) -> tuple[Glue, tuple[int, ...]] | None:
    """Replay of one known operation and the shape it started from, given its output shape."""
    name = node.name().partition("Backward")[0]
    if name in ("View", "ReshapeAlias", "UnsafeView", "Squeeze"):
        return _reshape(shape), tuple(node._saved_self_sym_sizes)
    if name in ("Clone", "Alias"):
        return (lambda t: t), shape
    if name == "Unsqueeze":
        dim = _signed(node._saved_dim) % len(shape)
        return (lambda t: t.unsqueeze(dim)), shape[:dim] + shape[dim + 1 :]
    if name == "Transpose":
        a, b = (_signed(d) % len(shape) for d in (node._saved_dim0, node._saved_dim1))
        swapped = list(shape)
        swapped[a], swapped[b] = shape[b], shape[a]
        return (lambda t: t.transpose(a, b)), tuple(swapped)
    if name == "Permute":
        dims = [_signed(d) % len(shape) for d in node._saved_dims]
        return (lambda t: t.permute(dims)), tuple(shape[dims.index(k)] for k in range(len(shape)))
    if name == "Select":
        dim, index = _signed(node._saved_dim), _signed(node._saved_index)
        return (lambda t: t.select(dim, index)), tuple(node._saved_self_sym_sizes)
    if name == "Slice":
        before = tuple(node._saved_self_sym_sizes)
        dim = _signed(node._saved_dim)
        cut = slice(_signed(node._saved_start), _signed(node._saved_end), node._saved_step)
        cuts = (slice(None),) * (dim % len(before)) + (cut,)
        return (lambda t: t[cuts]), before
    if name == "LogSoftmax":
        dim = _signed(node._saved_dim)
        return (lambda t: torch.log_softmax(t, dim)), shape
    return None


def path_to(z: Tensor, key: str) -> Path | None:
    """How ``z`` came from an output of the model, or None if by other operations than the known ones.

    Args:
        z: a prediction with a graph.
        key: the recorder's key.
    """
    edge = get_gradient_edge(z)
    node, number, glue = edge.node, edge.output_nr, list[Glue]()
    shape = tuple(z.shape)
    while True:
        for call, index, out_number in notes(node).get(key, ()):
            if isinstance(call, RootCall) and out_number == number:
                return Path(call, index, glue[::-1])
        step = _step(node, shape) if len(node.next_functions) == 1 else None
        child = node.next_functions[0][0] if step is not None else None
        if step is None or child is None:
            return None
        glue.append(step[0])
        shape = step[1]
        node, number = child, node.next_functions[0][1]
