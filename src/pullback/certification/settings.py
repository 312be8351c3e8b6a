"""What is asked of a certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pullback.problems.errors import SpecError, nearest
from pullback.problems.optimizer_spec import OptimizerSpec, parse_optimizer
from pullback.problems.optimizers import optimizer_entries
from pullback.problems.options import check_options, format_spec, parse_spec

#: The optimizer whose twins have derived bounds.
DESCENT = "descent"
_STEPS = 200
#: Drives itself, so that its steps cannot be observed.
_UNSEEN = "least-squares"


@dataclass(frozen=True)
class DescentSpec:
    """Full-batch steps of one length in the identity metric, on the loss with its decay.

    Attributes:
        lr: length of a step.
        decay: weight decay, part of the loss.
        steps: how many.
    """

    lr: float = 0.3
    decay: float = 0.01
    steps: int = 200

    @property
    def name(self) -> str:
        """As on the command line."""
        return DESCENT

    @property
    def label(self) -> str:
        """With its options."""
        return format_spec(DESCENT, {"lr": self.lr, "decay": self.decay})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained with and how much is measured.

    Attributes:
        optimizer: ``descent``, ``descent:lr=...,decay=...,steps=...``, or one of the registry with options.
        steps: of every training; None for 200.
        pairs: of twins at each n.
        points: places along the path, both ends among them, at which rates are measured.
        sizes: numbers of samples at which twins are trained; None for seven up to all of them with descent, else for
            all of them alone.
        seed: of the initial weights, batches, the order of the data and the draws of twins.
        seconds: after which no further rate or pair is begun; None for no limit.

    Raises:
        SpecError: if a number makes no sense, or the optimizer does not exist.
        MissingExtraError: if the optimizer is in a package that is not installed.
    """

    optimizer: str = DESCENT
    steps: int | None = None
    pairs: int = 3
    points: int = 9
    sizes: tuple[int, ...] | None = None
    seed: int = 0
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("steps", self.steps, 1), ("pairs", self.pairs, 1), ("points", self.points, 2)):
            if value is not None and value < least:
                raise SpecError(f"{name} is {value}; give {least} or more.")
        if self.sizes is not None and (not self.sizes or min(self.sizes) < 2):
            raise SpecError(f"sizes are {list(self.sizes)}; twins differ in one sample, so give numbers of at least 2.")
        if self.seconds is not None and not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise SpecError(f"seconds is {self.seconds}; give a positive number.")
        _ = self.spec  # refuses what does not exist

    @property
    def spec(self) -> DescentSpec | OptimizerSpec:
        """The optimizer with its options."""
        return parse_spec_of(self.optimizer, self.steps)

    @property
    def count(self) -> int:
        """Steps of every training."""
        spec = self.spec
        return spec.steps if isinstance(spec, DescentSpec) else self.steps or _STEPS


def parse_spec_of(text: str, steps: int | None = None) -> DescentSpec | OptimizerSpec:
    """Reads an optimizer, ``descent`` among them.

    Args:
        text: ``name:key=value,...``.
        steps: Stated elsewhere, or None.

    Raises:
        SpecError: If name or option do not exist, a value makes no sense, or steps are stated twice.
        MissingExtraError: If the optimizer is in a package that is not installed.
    """
    name, options = parse_spec(text)
    if name != DESCENT:
        known = [DESCENT, *(entry.name for entry in optimizer_entries())]
        if name not in known:
            raise SpecError(f"there is no optimizer called {name!r}.{nearest(name, known)}")
        if name == _UNSEEN:
            raise SpecError(f"{_UNSEEN} drives itself and cannot be observed step by step; take gauss-newton.")
        return parse_optimizer(text)
    checked = check_options(DESCENT, options, {"lr": float, "decay": float, "steps": int})
    if steps is not None and checked.setdefault("steps", steps) != steps:
        raise SpecError(f"steps are {checked['steps']} in {text!r} and {steps} beside it; keep one.")
    spec = DescentSpec(**checked)
    if spec.steps < 1 or not 0 < spec.lr < math.inf or not 0 <= spec.decay < math.inf:
        raise SpecError(f"{text!r} makes no sense: lr and steps are positive, decay is not negative.")
    return spec


def default_sizes(n: int) -> tuple[int, ...]:
    """Seven numbers from a fourteenth of n to n, in equal ratios and two digits; fewer where n is small."""
    found = {_two_digits(n * 14 ** (-k / 6)) for k in range(7)}
    return tuple(sorted(size for size in found if size >= min(n, 10)))


def _two_digits(value: float) -> int:
    unit = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return int(value // unit * unit)
