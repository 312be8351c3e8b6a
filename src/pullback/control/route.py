"""The order in which the model reaches the stages, and what is known in front of each: decided once per structure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pullback.curvature import Block
from pullback.tape import Entry, Term


@dataclass(frozen=True)
class Later:
    """Parameters of a block decided before a cut and used (again) behind it.

    Attributes:
        stage: number of the stage, in the order of the route.
        block: number of the block in it.
        params: positions of the parameters all uses of which are behind; None if single calls are.
        calls: the calls behind, as (unit, positions among its calls).
    """

    stage: int
    block: int
    params: frozenset[int] | None
    calls: tuple[tuple[int, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class CutPlan:
    """What is known in front of a stage, in one term.

    Attributes:
        rank: the cut among what the term sees.
        broken: why the deviation cannot be measured there; None if it can.
        later: what must be added by products.
        elsewhere: whether the stage is decided in a call of the model that the term does not rest on.
    """

    rank: int
    broken: str | None
    later: tuple[Later, ...]
    elsewhere: bool = False


class Route:
    """Stages in the order of the model's calls.

    Args:
        terms: terms of a linearisation, with ports.
        stages: blocks that move jointly, in any order.

    Attributes:
        order: numbers of ``stages`` in the order of the model's calls.
        plans: for every cut and term what is known there; the last cut is the one in front of the loss.
    """

    def __init__(self, terms: Sequence[Term], stages: Sequence[Sequence[Block]]) -> None:
        firsts = [_first_call(terms, blocks) for blocks in stages]
        moment = {k: -1 if first is None else _entry(terms, first).order for k, first in enumerate(firsts)}
        self.order = sorted(moment, key=lambda k: moment[k])
        self._firsts = [firsts[k] for k in self.order]
        ordered = [stages[k] for k in self.order]
        self.plans: list[list[CutPlan]] = []
        for cut in range(len(stages) + 1):
            time = math.inf if cut == len(stages) else moment[self.order[cut]]
            first = self._firsts[cut] if cut < len(stages) else None
            root = None if first is None else _entry(terms, first).root
            self.plans.append([_plan(t, term, ordered[:cut], time, root) for t, term in enumerate(terms)])

    def moments(self, terms: Sequence[Term]) -> list[Entry | None]:
        """The entry in front of which each stage is decided, in this step; None for before everything.

        Args:
            terms: terms of the same structure.
        """
        return [None if first is None else _entry(terms, first) for first in self._firsts]

    @property
    def broken(self) -> dict[int, str]:
        """Why the deviation is linearised, by number of the stage as it was given."""
        out = {}
        for k, plans in zip(self.order, self.plans, strict=False):
            for plan in plans:
                if plan.broken is not None:
                    out[k] = plan.broken
                elif plan.elsewhere and plan.later:
                    out.setdefault(k, "another call of the model, which had not begun when the stage was decided")
        return out


def key_of(terms: Sequence[Term], stages: Sequence[Sequence[Block]]) -> object:
    """What a route depends on."""
    serials = [sorted({root.serial for root in term.roots}) for term in terms]
    start = min((s for own in serials for s in own), default=0)
    return (
        tuple(id(term.plan) for term in terms),
        tuple(tuple(s - start for s in own) for own in serials),
        tuple(tuple(id(p) for block in blocks for p in block.params) for blocks in stages),
    )


def _first_call(terms: Sequence[Term], blocks: Sequence[Block]) -> tuple[int, int, int] | None:
    """Term, unit and number of the first call that gives rows to a block; None if that is the model's own."""
    own = {id(p) for block in blocks for p in block.params}
    found: list[tuple[int, tuple[int, int, int]]] = []
    for t, term in enumerate(terms):
        for u, unit in enumerate(term.plan.units):
            if own & {id(p) for p in unit.parameters()}:
                for c, factor in enumerate(term.factors[id(unit.module)]):
                    if factor.call.entry is None:
                        return None
                    found.append((factor.call.entry.order, (t, u, c)))
    return min(found)[1]


def _entry(terms: Sequence[Term], first: tuple[int, int, int]) -> Entry:
    t, u, c = first
    term = terms[t]
    entry = term.factors[id(term.plan.units[u].module)][c].call.entry
    assert entry is not None
    return entry


def _plan(t: int, term: Term, decided: Sequence[Sequence[Block]], time: float, root: int | None) -> CutPlan:
    ports = term.ports
    if ports is None:  # the cost of a parameter itself, which no tensor carries
        return CutPlan(-1, None, ())
    rank = -1 if time == -1 else ports.rank(time)
    broken = ports.wires.cut(rank).broken
    later: list[Later] = []
    for k, blocks in enumerate(decided):
        for b, block in enumerate(blocks):
            if broken is not None or t not in block.rows:
                continue
            found = _later(term, block, rank)
            if isinstance(found, str):
                broken = found
            elif found is not None:
                later.append(Later(k, b, *found))
    elsewhere = root is not None and all(own.serial != root for own in term.roots)
    return CutPlan(rank, broken, tuple(later), elsewhere)


def _later(
    term: Term, block: Block, rank: int
) -> tuple[frozenset[int] | None, tuple[tuple[int, tuple[int, ...]], ...]] | str | None:
    """How a decided block is used behind a cut; a phrase if its uses cannot be told apart, None if not at all."""
    ports = term.ports
    assert ports is not None
    wires = ports.wires
    unseen = [wires.unseen(id(p), rank) for p in block.params]
    every = [wires.first.get(id(p), set()) for p in block.params]
    if not any(unseen):
        return None
    if all(not some or some == whole for some, whole in zip(unseen, every, strict=True)):
        return frozenset(k for k, some in enumerate(unseen) if some), ()
    # Used on both sides: separate the calls, if its uses are the calls of modules that hold it.
    own = {id(p) for p in block.params}
    returned: set[int] = set()
    behind = []
    for u, unit in enumerate(term.plan.units):
        if not own & {id(p) for p in unit.parameters()}:
            continue
        outputs = [wires.outputs[ports.positions[id(factor.call)]] for factor in term.factors[id(unit.module)]]
        returned = returned.union(*outputs)
        numbers = tuple(c for c, out in enumerate(outputs) if any(wires.moments[v] > rank for v in out))
        if numbers:
            behind.append((u, numbers))
    if any(whole - returned for whole in every):
        return "a parameter is used on both sides of the cut, outside the calls of its module"
    return None, tuple(behind)
