"""Where rates are sampled: balls, boxes, or what a user draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pullback.contraction.errors import ContractionError


class Region(Protocol):
    """What can be drawn from and asked whether a point lies in it."""

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Independent points, (samples, n)."""
        ...

    def contains(self, x: Tensor) -> bool:
        """Whether the point x, (n,), lies in it."""
        ...


@dataclass(frozen=True)
class Ball:
    """All points within a radius.

    Attributes:
        centre: (n,).
        radius: positive.
    """

    centre: Tensor
    radius: float

    def __post_init__(self) -> None:
        if not 0 < self.radius < float("inf"):
            raise ContractionError(f"The radius of the ball is {self.radius}; give a positive one.")

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Uniform in volume."""
        n = len(self.centre)
        way = torch.randn(samples, n, dtype=self.centre.dtype, generator=generator)
        share = torch.rand(samples, 1, dtype=self.centre.dtype, generator=generator) ** (1 / n)
        points: Tensor = self.centre + self.radius * share * way / way.norm(dim=1, keepdim=True)
        return points

    def contains(self, x: Tensor) -> bool:
        """See :class:`Region`."""
        return bool((x - self.centre).norm() <= self.radius)

    def __str__(self) -> str:
        """As it stands in a certificate."""
        return f"ball of radius {self.radius:g} in {len(self.centre)} dimensions"


@dataclass(frozen=True)
class Box:
    """All points between two corners.

    Attributes:
        low: (n,).
        high: (n,).
    """

    low: Tensor
    high: Tensor

    def __post_init__(self) -> None:
        if self.low.shape != self.high.shape:
            raise ContractionError(
                f"The corners of the box have shapes {tuple(self.low.shape)} and {tuple(self.high.shape)}; they must "
                "be the same."
            )
        if not bool((self.low <= self.high).all()):
            raise ContractionError("A lower corner of the box lies above the upper one; swap them.")

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Uniform in volume."""
        share = torch.rand(samples, len(self.low), dtype=self.low.dtype, generator=generator)
        return self.low + share * (self.high - self.low)

    def contains(self, x: Tensor) -> bool:
        """See :class:`Region`."""
        return bool(((self.low <= x) & (x <= self.high)).all())

    def __str__(self) -> str:
        """As it stands in a certificate."""
        return f"box in {len(self.low)} dimensions"


@dataclass(frozen=True)
class Sampled:
    """A region of the user's own.

    Attributes:
        sampler: (samples, generator) to independent points, (samples, n).
        inside: whether a point lies in it; None if that cannot be told: then no trajectory can be shown to stay.
        name: as it stands in a certificate.
    """

    sampler: Callable[[int, torch.Generator], Tensor]
    inside: Callable[[Tensor], bool] | None = None
    name: str = "the user's region"

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """See :class:`Region`."""
        points = self.sampler(samples, generator)
        if points.ndim != 2 or len(points) != samples:
            raise ContractionError(f"The sampler gave {tuple(points.shape)} for {samples} samples; give (samples, n).")
        return points

    def contains(self, x: Tensor) -> bool:
        """See :class:`Region`."""
        return self.inside is not None and bool(self.inside(x))

    def __str__(self) -> str:
        """Its name."""
        return self.name
