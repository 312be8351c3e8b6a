"""The wires of one step: what the tensors between modules were, and the factors they had."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pullback.errors import CoverageError
from pullback.tape import sweep
from pullback.tape.call import Call, wide
from pullback.tape.graph import Reached
from pullback.tape.wires import Part, Place, Wires


def by_sample(t: Tensor, N: int, axis: int, lead: int = 0) -> Tensor:
    """A tensor as (*lead, N, numbers of one sample).

    Args:
        t: the tensor.
        N: samples.
        axis: axis of the samples, after the leading ones.
        lead: number of leading axes.
    """
    if axis == 0 and t.ndim == lead + 2 and t.shape[lead] == N:
        return t
    return t.movedim(lead + axis, lead).reshape(*t.shape[:lead], N, -1)


@dataclass
class Ports:
    """The wires of one step: totals of the factors, nominal values, and the clock.

    Attributes:
        wires: the structure.
        N: samples.
        totals: total factor of every needed tensor, and its needed parts, (r, N, numbers).
        values: its value in the recorded pass, (N, numbers).
        shapes: the shape it had.
        sources: call and place of every needed tensor.
        clocks: the times of this step.
        positions: position of every call among those that reach the prediction, by its id.
    """

    wires: Wires
    N: int
    totals: dict[Part, Tensor]
    values: dict[int, Tensor]
    shapes: dict[int, tuple[int, ...]]
    sources: dict[int, tuple[Call, Place]]
    clocks: list[int]
    positions: dict[int, int]
    _remaining: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def rank(self, moment: float) -> int:
        """Rank of the last cut up to a time that can be had, -1 for the one before everything.

        A module of another head may be called where this prediction has no cut: then what happened since the last one
        is not measured.
        """
        if moment == math.inf:
            return self.wires.end()
        seen, ranks = bisect_right(self.clocks, moment) - 1, self.wires.ranks
        place = bisect_right(ranks, seen) - 1
        return ranks[place] if place >= 0 else -1

    def divide(self, number: float) -> None:
        """Divide all factors, before any is used."""
        self.totals = {part: total / number for part, total in self.totals.items()}

    def measure(self, rank: int, deviations: dict[int, Tensor]) -> Tensor:
        """The realised deviation at a cut that can be had, shape (r, N).

        Args:
            rank: the cut.
            deviations: new minus nominal of the tensors seen, (N, numbers).
        """
        out: Tensor | None = None
        for v, parts in self.wires.cut(rank).carriers:
            S = self._factor(rank, v, parts)
            term = torch.linalg.vecdot(S, deviations[v])
            out = term if out is None else out + term
        if out is None:
            r = next(iter(self.totals.values())).shape[0]
            return next(iter(self.values.values())).new_zeros(r, self.N)
        return out

    def carriers(self, rank: int) -> list[tuple[Tensor, Tensor]]:
        """The tensors across a cut that can be had, (N, numbers), with their remaining factors, (r, N, numbers)."""
        return [(self.values[v], self._factor(rank, v, parts)) for v, parts in self.wires.cut(rank).carriers]

    def _factor(self, rank: int, v: int, parts: Sequence[tuple[float, Part]]) -> Tensor:
        if parts == ((1.0, v),):
            return self.totals[v]
        key = (rank, v)
        if key not in self._remaining:
            total = self.totals[parts[0][1]] * parts[0][0]
            for sign, w in parts[1:]:
                total = total + sign * self.totals[w]
            self._remaining[key] = total
        return self._remaining[key]


def ports_of(wires: Wires | None, found: Reached, N: int, factors: Sequence[Tensor]) -> Ports | None:
    """Factors and values of the needed tensors in this step.

    Args:
        wires: the structure.
        found: the calls of this step.
        N: samples.
        factors: swept to the needed tensors, in their order, (r, *shape).

    Returns:
        None without wires.
    """
    if wires is None:
        return None
    positions = {id(call): k for k, (call, _) in enumerate(found.calls)}
    ports = Ports(wires, N, {}, {}, {}, {}, wires.clocks(found), positions)
    for v, factor in zip(wires.needed, factors, strict=True):
        place, axis = wires.places[v], wires.axes[v]
        assert axis is not None
        value = place.nominal(found)
        if value is None:
            raise CoverageError(
                "A tensor between modules was overwritten in place after it was used; write y = f(x) instead of f_(x) "
                "or x += ... there."
            )
        ports.totals[v] = by_sample(wide(factor), N, axis, 1)
        ports.values[v] = by_sample(wide(value), N, axis)
        ports.shapes[v] = tuple(value.shape)
        ports.sources[v] = (found.calls[place.call][0], place)
    swept = dict(zip(wires.needed, factors, strict=True))
    for w, v in wires.bridges:
        start, end, axis = wires.places[w].edge(found), wires.places[v].edge(found), wires.axes[v]
        assert axis is not None
        (part,) = sweep.loop(start, [end], swept[w])
        ports.totals[w, v] = by_sample(wide(part), N, axis, 1)
    return ports
