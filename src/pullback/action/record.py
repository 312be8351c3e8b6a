"""What an action is made of: plain records to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Action:
    r"""The action of a path or of a step, :math:`S = \tfrac12 \int |\theta' + M^{-1} \nabla L|_M^2 dt`.

    Attributes:
        total: S.
        kinetic: half the integral of :math:`\theta'^\top M \theta'`.
        force: half the integral of :math:`\nabla L^\top M^{-1} \nabla L`.
        work: L at the end minus L at the start; None where the loss is not known.
        remainder: in discrete time, what of ``work`` the gradients at the steps do not explain; zero for a path.
        modules: each module's share of S, adding up to it. Where the metric couples modules a share counts half of the
            coupling and may be negative.
        time: the time that passed.
        defects: by pair of names, in order, the part of S that is a product of both defects (twice, if they differ).
    """

    total: float
    kinetic: float
    force: float
    work: float | None
    remainder: float
    modules: dict[str, float]
    time: float
    defects: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def gap(self) -> float | None:
        """What the identity S = kinetic + force + work - remainder misses; None where the loss is not known."""
        return None if self.work is None else self.total - (self.kinetic + self.force + self.work - self.remainder)

    def shares(self) -> dict[str, float]:
        """Parts of S by defect and by pair of defects, over S; they add up to one."""
        return {
            " x ".join(dict.fromkeys(pair)): (value / self.total if self.total else 0.0)
            for pair, value in self.defects.items()
        }

    def __str__(self) -> str:
        lines = [f"action {self.total:.6g} over time {self.time:.4g}"]
        work = (
            "" if self.work is None else f", work {self.work:.6g}, remainder {self.remainder:.3g}, gap {self.gap:.1e}"
        )
        lines.append(f"kinetic {self.kinetic:.6g}, force {self.force:.6g}{work}")
        lines += [f"  {name}: {value:.6g}" for name, value in self.modules.items()]
        lines += [f"  {name}: {100 * share:.3g} %" for name, share in self.shares().items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers."""
        own = {k: getattr(self, k) for k in ("total", "kinetic", "force", "work", "remainder", "gap", "time")}
        return own | {"modules": dict(self.modules), "shares": self.shares()}


def summed(parts: Sequence[Action]) -> Action:
    """The action of parts that follow each other."""
    known = [part.work for part in parts if part.work is not None]
    modules: dict[str, float] = {}
    defects: dict[tuple[str, str], float] = {}
    for part in parts:
        for name, value in part.modules.items():
            modules[name] = modules.get(name, 0.0) + value
        for pair, value in part.defects.items():
            defects[pair] = defects.get(pair, 0.0) + value
    return Action(
        total=sum(part.total for part in parts),
        kinetic=sum(part.kinetic for part in parts),
        force=sum(part.force for part in parts),
        work=sum(known) if len(known) == len(parts) else None,
        remainder=sum(part.remainder for part in parts),
        modules=modules,
        time=sum(part.time for part in parts),
        defects=defects,
    )
