"""Twins: two trainings whose data differ in one sample, beside what the bounds promise for them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pullback.stability.bounds import Bound
from pullback.stability.errors import StabilityError
from pullback.stability.objective import Data, check_data

State = TypeVar("State")


@dataclass
class Pair(Generic[State]):
    """Two data sets that differ in one sample, and what was trained on them.

    Attributes:
        data: the first data set, n samples.
        twin: the second.
        index: the row in which they differ.
        state: what was trained on the first.
        other: what was trained on the second.
        points: samples at which losses are compared: both data sets and the held-out samples.
    """

    data: Data
    twin: Data
    index: int
    state: State
    other: State
    points: Data

    def union(self) -> Data:
        """The n + 1 samples of both data sets."""
        here = slice(self.index, self.index + 1)
        return _joined(self.data, (self.twin[0][here], self.twin[1][here]))


class Learner(Protocol[State]):
    """Something that can be trained on data, and knows bounds for twins."""

    def train(self, data: Data) -> State:
        """Train; the same data must give the same state."""
        ...

    def distance(self, a: State, b: State) -> float:
        """The distance of two trained states that the bounds speak of."""
        ...

    def losses(self, state: State, data: Data) -> Tensor:
        """The losses of single samples, (n,)."""
        ...

    def bounds(self, pair: Pair[State]) -> list[Bound]:
        """Bounds for a pair, the one to be held against first; none is allowed."""
        ...


@dataclass(frozen=True)
class Twin:
    """What one pair of twins did.

    Attributes:
        index: the row that was replaced.
        distance: of the trained states.
        loss_change: the largest change of a loss, over both data sets and held-out samples.
        gap: mean loss of held-out samples minus that of the data, of the first twin; None without held-out ones.
        bounds: what was promised.
    """

    index: int
    distance: float
    loss_change: float
    gap: float | None
    bounds: tuple[Bound, ...]

    def ratio(self, bound: Bound) -> float:
        """Measured over promised: of the distance, or of the loss change where a bound is silent on distance."""
        if bound.distance is None:
            return self.loss_change / bound.loss if bound.loss else 0.0
        return self.distance / bound.distance if bound.distance else 0.0

    def loss_ratio(self, bound: Bound) -> float:
        """Measured over promised loss change."""
        return self.loss_change / bound.loss if bound.loss else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers and words."""
        own = {"index": self.index, "distance": self.distance, "loss_change": self.loss_change, "gap": self.gap}
        return own | {"bounds": [bound.to_dict() for bound in self.bounds]}


@dataclass
class Twins:
    """A report over pairs of twins; print it.

    Attributes:
        n: samples of each data set.
        pairs: what each pair did.
    """

    n: int
    pairs: list[Twin] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether every derived bound held for every pair."""
        return not any(self.broken(name) for name, bound in self._first().items() if bound.derived)

    def broken(self, name: str) -> int:
        """Pairs in which the distance or the loss change is above the bound of that name."""
        found = [(twin, b) for twin in self.pairs for b in twin.bounds if b.name == name]
        return sum(twin.ratio(b) > 1 or twin.loss_ratio(b) > 1 for twin, b in found)

    def ratios(self, name: str, loss: bool = False) -> list[float]:
        """Measured over promised by the bound of that name, pair by pair: distances, or loss changes."""
        found = [(twin, b) for twin in self.pairs for b in twin.bounds if b.name == name]
        return [twin.loss_ratio(b) if loss else twin.ratio(b) for twin, b in found]

    def _first(self) -> dict[str, Bound]:
        return {bound.name: bound for twin in self.pairs for bound in twin.bounds}

    def __str__(self) -> str:
        distances, changes = [t.distance for t in self.pairs], [t.loss_change for t in self.pairs]
        gaps = [t.gap for t in self.pairs if t.gap is not None]
        lines = [
            f"{len(self.pairs)} pairs of twins, n = {self.n}",
            f"measured: distance {statistics.median(distances):.3g} (largest {max(distances):.3g}), "
            f"loss change {statistics.median(changes):.3g} (largest {max(changes):.3g})",
        ]
        if gaps:
            lines.append(f"measured: generalisation gap {statistics.median(gaps):.3g}")
        for name, bound in self._first().items():
            far, loss = self.ratios(name), self.ratios(name, loss=True)
            parts = (
                [] if bound.distance is None else [f"distance {statistics.median(far):.2g} (largest {max(far):.2g})"]
            )
            parts.append(f"loss change {statistics.median(loss):.2g} (largest {max(loss):.2g})")
            kind = (
                bound.kind
                if bound.kind == bound.distance_kind
                else f"distance {bound.distance_kind}, loss {bound.kind}"
            )
            lines.append(f"measured / {name} ({kind}): {', '.join(parts)}; broken {self.broken(name)} times")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers and words."""
        return {"n": self.n, "held": self.held, "pairs": [twin.to_dict() for twin in self.pairs]}


def twins(
    learner: Learner[State],
    data: Data,
    n_pairs: int,
    *,
    spare: Data,
    held_out: Data | None = None,
    seed: int = 0,
) -> Twins:
    """Train on data, and on data sets that differ from them in one sample each.

    Args:
        learner: what is trained.
        data: n samples, at least two.
        n_pairs: how many replacements to draw: a row of ``data``, and a row of ``spare`` to put there.
        spare: samples that are not in ``data``.
        held_out: samples for the generalisation gap and for the loss change.
        seed: of the draws.

    Returns:
        What was measured, beside the learner's bounds.

    Raises:
        StabilityError: if n < 2, data are not finite or do not fit together, or training does not repeat itself.
    """
    check_data(data)
    check_data(spare, 1)
    if n_pairs < 1:
        raise StabilityError(f"n_pairs is {n_pairs}; give at least one.")
    generator = torch.Generator().manual_seed(seed)
    state = learner.train(data)
    if learner.distance(state, learner.train(data)) != 0:
        raise StabilityError("Training on the same data twice ends elsewhere; fix seeds, order and dropout first.")
    report = Twins(len(data[0]))
    for _ in range(n_pairs):
        j = int(torch.randint(len(data[0]), (), generator=generator))
        k = int(torch.randint(len(spare[0]), (), generator=generator))
        other = replaced(data, j, (spare[0][k], spare[1][k]))
        report.pairs.append(compare(learner, data, other, held_out, state))
    return report


def compare(
    learner: Learner[State], data: Data, twin: Data, held_out: Data | None = None, state: State | None = None
) -> Twin:
    """Train on two given data sets that differ in one sample.

    Args:
        learner: what is trained.
        data: the first data set.
        twin: the second.
        held_out: samples for the generalisation gap and for the loss change.
        state: what was trained on the first, if it is there already.

    Raises:
        StabilityError: if the data sets differ in none, in more than one sample, or in size.
    """
    index = difference(check_data(data), check_data(twin))
    own = learner.train(data) if state is None else state
    other = learner.train(twin)
    here = slice(index, index + 1)
    points = _joined(data, (twin[0][here], twin[1][here]), *(() if held_out is None else (check_data(held_out, 1),)))
    pair = Pair(data, twin, index, own, other, points)
    change = float((learner.losses(own, points) - learner.losses(other, points)).abs().max())
    gap = None
    if held_out is not None:
        gap = float(learner.losses(own, held_out).mean() - learner.losses(own, data).mean())
    return Twin(index, learner.distance(own, other), change, gap, tuple(learner.bounds(pair)))


def replaced(data: Data, index: int, sample: tuple[Tensor, Tensor]) -> Data:
    """The data with one row replaced; the given data stay as they are."""
    x, y = data[0].clone(), data[1].clone()
    x[index], y[index] = sample
    return x, y


def difference(data: Data, twin: Data) -> int:
    """The one row in which two data sets differ.

    Raises:
        StabilityError: if they differ in size, in no row or in more than one.
    """
    if any(a.shape != b.shape for a, b in zip(data, twin, strict=True)):
        sizes = [tuple(part.shape) for part in (*data, *twin)]
        raise StabilityError(f"Twin data have the same shapes, got {sizes[:2]} and {sizes[2:]}; replace a row instead.")
    apart = torch.zeros(len(data[0]), dtype=torch.bool, device=data[0].device)
    for a, b in zip(data, twin, strict=True):
        apart |= (a != b).reshape(len(a), -1).any(1).to(apart.device)
    rows = apart.nonzero()[:, 0].tolist()
    if len(rows) != 1:
        shown = ", ".join(map(str, rows[:4])) + (", ..." if len(rows) > 4 else "")
        raise StabilityError(
            f"Twin data differ in one sample, these in {len(rows)} ({shown or 'none'}); replace one row."
        )
    return int(rows[0])


def _joined(*parts: Data) -> Data:
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
