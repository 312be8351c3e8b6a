"""Several criteria at once, each with a metric of its own."""

from __future__ import annotations

from dataclasses import dataclass

from pullback.metric.base import OutputMetric


@dataclass(frozen=True)
class Heads:
    """The metrics of several criteria, for reports.

    Attributes:
        metrics: one per criterion.
    """

    metrics: tuple[OutputMetric, ...]

    @property
    def exact(self) -> bool:
        """Whether every one is exact."""
        return all(metric.exact for metric in self.metrics)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.metrics))
