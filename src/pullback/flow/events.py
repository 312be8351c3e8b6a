"""What ends a run before its time: a lost rank, an equilibrium; each a function that is positive until then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pullback.flow.field import Field, Point
from pullback.flow.inverse import Extremes

#: Positive until the event, from a point.
Event = Callable[[Point], float]

#: Singular vectors of two points are those of one mode if their inner products are at least this.
_SAME = 0.7
#: A singular value below this share of the largest may pass zero between two points.
NEAR = 1e-2


@dataclass
class RankLoss:
    """The smallest singular value of D falls to a share of the largest, or passes through zero.

    Singular values have no sign, so a step may jump over a zero: sigma -> -sigma turns one of the two singular
    vectors round. If both of the smallest are still those of the last point but for one sign, zero was passed.

    Args:
        field: evaluates the ends of the spectrum.
        tolerance: the share.
    """

    field: Field
    tolerance: float
    last: Extremes | None = None

    def __call__(self, point: Point) -> float:
        """The share above the tolerance; negative behind a zero."""
        now = self.field.look(point)
        if now is None:
            return 1.0
        return self.sign(now) * now.ratio - self.tolerance

    def sign(self, now: Extremes) -> float:
        """-1 if the smallest singular value passed through zero since the last point."""
        last = self.last
        if last is None or last.left is None or last.right is None or now.left is None or now.right is None:
            return 1.0
        if now.ratio > NEAR:
            return 1.0
        left, right = float(last.left @ now.left), float(last.right @ now.right)
        same = min(abs(left), abs(right)) >= _SAME
        return -1.0 if same and left * right < 0 else 1.0

    def accepted(self, point: Point) -> None:
        """Compare with this point from now on."""
        self.last = self.field.look(point)


@dataclass
class Equilibrium:
    """What the range of D still takes of the wanted velocity falls to a share of it: ``|P v| <= share |v|``.

    Args:
        share: the share.
    """

    share: float

    def __call__(self, point: Point) -> float:
        """The share left above the tolerance."""
        if point.D is None:
            return 1.0
        moved = point.D.matvec(point.slope)
        return float(moved.norm() / point.wanted.norm().clamp_min(torch.finfo(moved.dtype).tiny)) - self.share
