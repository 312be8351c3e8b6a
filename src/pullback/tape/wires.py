r"""What crosses the cut in front of a module: the tensors that carry what the modules before it did.

A tensor is *seen* where a module is given it or returns it. In front of a module that is about to be called, the
tensors seen so far that something still to come will use carry the whole influence of what was done before; each
with its *remaining* factor, the total factor less what those who already used it sent back (docs/theory 10). To first
order

.. math:: e_l = \sum_{x \text{ across the cut}} \langle S^{\text{remaining}}_x, x^{\text{new}} - x \rangle
          = \sum_{j < l} U_j \delta_j

and what happened between the module and x is in it exactly. All of this is read from the user's own graph, once
per structure of calls.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pullback.tape import sweep
from pullback.tape.graph import Reached
from pullback.tape.term import LossUse, one_sample

#: the prediction, among the tensors that follow another
END = -1

Side = Literal["in", "from", "out"]

#: a total factor, by number of the tensor, or the part of it that w sends back to v through what lies between: (w, v)
Part = int | tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Where a tensor is seen: given to a call (in its alias, or as it came), or returned by one.

    Attributes:
        call: position among the calls that reach the prediction.
        side: ``"in"`` for the call's own alias, ``"from"`` for the tensor itself, ``"out"`` for what it returned.
        index: which of the call's tensors.
    """

    call: int
    side: Side
    index: int

    def edge(self, found: Reached) -> GradientEdge:
        """The tensor's edge in the graph of this step."""
        call, edges = found.calls[self.call]
        if self.side == "out":
            return edges[self.index]
        alias = found.inputs[id(call.entry)][self.index]
        return alias if self.side == "in" else _following(alias.node)

    def nominal(self, found: Reached) -> Tensor | None:
        """Its value in the recorded pass; None if it was overwritten since."""
        call = found.calls[self.call][0]
        kept = call.returned if self.side == "out" else call.entry.given if call.entry is not None else []
        value, version = kept[self.index]
        return value if value._version == version else None

    def moment(self, found: Reached) -> int:
        """When it is seen."""
        call = found.calls[self.call][0]
        return call.order if self.side == "out" or call.entry is None else call.entry.order


@dataclass(frozen=True)
class Cut:
    """What is across one cut.

    Attributes:
        carriers: tensors, each with the signed total factors that make up its remaining factor.
        broken: why the cut cannot be had; None if it can.
    """

    carriers: tuple[tuple[int, tuple[tuple[float, Part], ...]], ...]
    broken: str | None = None


@dataclass
class Wires:
    """The tensors seen between modules on the way to one prediction.

    Attributes:
        places: where each is seen first.
        moments: when, as a rank.
        after: for each, the tensors seen next that use it, and whether as it is.
        first: tensors seen first behind each parameter, by its id.
        axes: axis of the samples of each tensor; None where they are not apart or its value was overwritten.
        needed: the tensors whose factors the cuts in front of single modules take.
        bridges: the parts of factors they take, see :data:`Part`.
        outputs: tensors that each call returned, by its position.
        ranks: the cuts that can be had: in front of single modules, and the end.
    """

    places: list[Place] = field(default_factory=list)
    moments: list[int] = field(default_factory=list)
    after: list[list[tuple[int, bool]]] = field(default_factory=list)
    first: dict[int, set[int]] = field(default_factory=dict)
    axes: dict[int, int | None] = field(default_factory=dict)
    needed: list[int] = field(default_factory=list)
    bridges: list[tuple[int, int]] = field(default_factory=list)
    outputs: list[set[int]] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    _cuts: dict[int, Cut] = field(default_factory=dict)
    _straight: dict[tuple[int, int], bool] = field(default_factory=dict)
    _before: list[set[int]] = field(default_factory=list)

    def edges(self, found: Reached) -> list[GradientEdge]:
        """Edges of the needed tensors in the graph of this step."""
        return [self.places[v].edge(found) for v in self.needed]

    def clocks(self, found: Reached) -> list[int]:
        """Times of this step at which the places are seen, in their order."""
        return sorted({place.moment(found) for place in self.places})

    def cut(self, rank: int) -> Cut:
        """The cut after all that is seen up to ``rank``.

        Args:
            rank: a position among :meth:`clocks`; -1 is before everything.
        """
        if rank not in self._cuts:
            self._cuts[rank] = self._make(rank)
        return self._cuts[rank]

    def forget(self) -> None:
        """Drop the cuts made so far."""
        self._cuts.clear()

    def end(self) -> int:
        """Rank of the cut in front of the loss."""
        return max(self.moments, default=-1)

    def unseen(self, param: int, rank: int) -> set[int]:
        """Tensors seen first behind a parameter that come after a cut."""
        return {w for w in self.first.get(param, ()) if w == END or self.moments[w] > rank}

    def _make(self, rank: int) -> Cut:
        carriers: list[tuple[int, tuple[tuple[float, Part], ...]]] = []
        for v, following in enumerate(self.after):
            if self.moments[v] > rank:
                continue
            pending = [(w, same) for w, same in following if w == END or self.moments[w] > rank]
            used = [(w, same) for w, same in following if w != END and self.moments[w] <= rank]
            if not pending:
                continue
            if self.axes.get(v, 0) is None:
                return Cut((), "a tensor across the cut was overwritten in place, or its samples are not apart")
            if not used:
                carriers.append((v, ((1.0, v),)))
            elif all(same and w != END for w, same in pending):
                # No difference of large numbers where it can be had as a sum.
                carriers.append((v, tuple((1.0, w) for w, _ in pending)))
            elif all(same or self._direct(w, v) for w, same in used):
                carriers.append((v, ((1.0, v), *((-1.0, w if same else (w, v)) for w, same in used))))
            else:
                return Cut((), "a tensor that no module was given is used on both sides of the cut")
        return Cut(tuple(carriers))

    def _direct(self, w: int, v: int) -> bool:
        """Whether what lies between v and w is on no way from v to w through other tensors."""
        if (w, v) not in self._straight:
            if not self._before:
                self._before = [set() for _ in self.after]
                for u, following in enumerate(self.after):
                    for x, _ in following:
                        if x != END:
                            self._before[x].add(u)
            self._straight[w, v] = not any(self._reaches(v, u) for u in self._before[w] if u != v)
        return self._straight[w, v]

    def _reaches(self, v: int, w: int) -> bool:
        """Whether there is a way from v to w; all on it is seen no later than w."""
        stack, done = [v], {v}
        while stack:
            for x, _ in self.after[stack.pop()]:
                if x == w:
                    return True
                if x != END and x not in done and self.moments[x] <= self.moments[w]:
                    done.add(x)
                    stack.append(x)
        return False


def wires_of(use: LossUse, found: Reached, N: int, modules: Iterable[int]) -> Wires:
    """Read the wires from the graph.

    Args:
        use: the use of the loss.
        found: the calls that reach its prediction.
        N: samples.
        modules: ids of the modules that give rows, in front of which there will be cuts.
    """
    wires = Wires()
    known = _places(found, wires)
    links = [(v, *link) for v in range(len(wires.places)) for link in _sources(wires.places[v], found, known, wires)]
    links += [(END, *link) for link in _behind(use.edge, known, wires, END)]
    wires.after = [[] for _ in wires.places]
    for w, v, same in links:
        wires.after[v].append((w, same))
    own = set(modules)
    clocks = wires.clocks(found)
    ranks = {wires.end()}
    for call, _ in found.calls:
        if id(call.module) in own and call.entry is not None:
            ranks.add(bisect_right(clocks, call.entry.order) - 1)
    wires.ranks = sorted(ranks)
    every = {v for rank in ranks for v in _involved(wires.cut(rank))}
    wires.forget()
    wires.axes = _axes(use, found, N, sorted(every), wires)
    wires.needed = sorted({w for rank in ranks for w in _involved(wires.cut(rank))})
    parts = [part for rank in ranks for _, own in wires.cut(rank).carriers for _, part in own]
    wires.bridges = sorted({part for part in parts if isinstance(part, tuple)})
    return wires


def _involved(cut: Cut) -> set[int]:
    found = {part for _, parts in cut.carriers for _, part in parts}
    return {v for v, _ in cut.carriers} | {part if isinstance(part, int) else part[0] for part in found}


def _following(node: Node) -> GradientEdge:
    (child, number), *_ = node.next_functions
    assert child is not None
    return GradientEdge(child, number)


def _places(found: Reached, wires: Wires) -> dict[tuple[Node, int], int]:
    """Fill in the places and their moments; returns their numbers by edge."""
    seen: dict[tuple[Node, int], Place] = {}

    def put(place: Place) -> None:
        edge = place.edge(found)
        key = (edge.node, edge.output_nr)
        if key not in seen or place.moment(found) < seen[key].moment(found):
            seen[key] = place

    for number, (call, edges) in enumerate(found.calls):
        if call.returned:
            for index in edges:
                put(Place(number, "out", index))
        for index in found.inputs.get(id(call.entry), ()) if call.entry is not None else ():
            put(Place(number, "in", index))
            put(Place(number, "from", index))
    wires.places = list(seen.values())
    clocks = wires.clocks(found)
    wires.moments = [clocks.index(place.moment(found)) for place in wires.places]
    known = {key: k for k, key in enumerate(seen)}
    for _, edges in found.calls:
        here = {(edge.node, edge.output_nr) for edge in edges.values()}
        wires.outputs.append({known[key] for key in here if key in known})
    return known


def _sources(place: Place, found: Reached, known: dict[tuple[Node, int], int], wires: Wires) -> list[tuple[int, bool]]:
    """The tensors seen last before a place, each with whether it is the same one."""
    edge = place.edge(found)
    v = known[edge.node, edge.output_nr]
    if place.side == "in":
        origin = _following(edge.node)
        return [(known[origin.node, origin.output_nr], True)]
    return _behind(edge, known, wires, v, inside=True)


def _behind(
    edge: GradientEdge, known: dict[tuple[Node, int], int], wires: Wires, v: int, inside: bool = False
) -> list[tuple[int, bool]]:
    """Walk back from an edge to the tensors seen last before it.

    Args:
        edge: where to start.
        known: numbers of the tensors by edge.
        wires: takes the parameters met on the way.
        v: number of the tensor at ``edge``.
        inside: whether the walk starts behind the edge, which is a tensor itself.
    """
    start = (edge.node, edge.output_nr)
    if not inside and start in known:
        return [(known[start], True)]
    out: dict[int, bool] = {}
    stack, done = [edge.node], {edge.node}
    while stack:
        node = stack.pop()
        for child, number in node.next_functions:
            if child is None:
                continue
            if (child, number) in known:
                out[known[child, number]] = False
            elif not child.next_functions:
                variable = getattr(child, "variable", None)
                if variable is not None:
                    wires.first.setdefault(id(variable), set()).add(v)
            elif child not in done:
                done.add(child)
                stack.append(child)
    return list(out.items())


def _axes(use: LossUse, found: Reached, N: int, ids: Sequence[int], wires: Wires) -> dict[int, int | None]:
    """Along which axis each tensor holds the samples, from the factors of one sample alone."""
    axes: dict[int, int | None] = {}
    edges = [wires.places[v].edge(found) for v in ids]
    if not edges:
        return axes
    probes = []
    for which in (0, N // 2):
        probes.append((which, sweep.loop(use.edge, edges, one_sample(use.z, N, which))))
    for k, v in enumerate(ids):
        axes[v] = next((axis for axis in (0, 1) if all(_apart(p[k][0], N, axis, i) for i, p in probes)), None)
        if wires.places[v].nominal(found) is None:
            axes[v] = None
    return axes


def _apart(part: Tensor, N: int, axis: int, which: int) -> bool:
    """Whether a factor of one sample is zero elsewhere along an axis."""
    if part.ndim <= axis or part.shape[axis] % N or (axis and part.shape[axis] != N):
        return False
    others = part.movedim(axis, 0).reshape(N, -1).clone()
    others[which] = 0
    return not bool((others != 0).any())
