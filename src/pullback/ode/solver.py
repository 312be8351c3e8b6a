"""Initial value problems by torchdiffeq, as it comes: steps without a gradient of their own, errors in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.errors import PullbackError, SolverError
from pullback.tape.recorder import unheard

#: dx/dt from (t, x); t is a tensor without axes
Velocity = Callable[[Tensor, Tensor], Tensor]

#: order of every method
ADAPTIVE = {"dopri8": 8, "dopri5": 5, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}
#: those whose solution between steps is as good as the tolerance; the others are made to stop at every time
DENSE = ("dopri5", "adaptive_heun")
FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}

#: Steps from one time asked for to the next after which a solve is given up.
MOST_STEPS = 10_000
#: Steps into numbers that are not finite, each tried again a fifth as long, after which a solve is given up.
MOST_OVERSHOT = 20
#: No error above this share passes for one of the solver.
_LOOSE = 0.2
#: Evaluations a step takes.
_STAGES = {
    "dopri8": 13, "dopri5": 6, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 1,
    "euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4,
}  # fmt: skip
#: A relative tolerance below so many units of round-off cannot be met.
ROUND_OFF = 8.0


@dataclass(frozen=True)
class Solver:
    """How solutions are computed.

    Attributes:
        method: one of torchdiffeq's explicit methods, of adaptive or fixed steps.
        rtol: relative tolerance of a step of an adaptive method.
        atol: absolute tolerance of it.
        step: length of the steps of a method of fixed ones; None for a tenth of the interval.

    Raises:
        ValueError: if an option is not of its kind.
        PullbackError: if torchdiffeq is not installed.
    """

    method: str
    rtol: float
    atol: float
    step: float | None

    def __post_init__(self) -> None:
        if self.method not in ADAPTIVE and self.method not in FIXED:
            raise ValueError(f"solver must be one of {', '.join([*ADAPTIVE, *FIXED])}, got {self.method!r}.")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        if self.step is not None and not (self.step > 0 and math.isfinite(self.step)):
            raise ValueError(f"step must be positive and finite, got {self.step}.")
        if self.step is not None and self.method in ADAPTIVE:
            raise ValueError(f"'{self.method}' chooses its own steps; leave step out, or take 'rk4'.")
        _odeint()  # here rather than in the first step: it loads scipy, and is missed early if it is not there

    @property
    def tolerance(self) -> float:
        """What errors of numbers of size 1 are held to."""
        return self.rtol + self.atol

    @property
    def acceptable(self) -> float:
        """What the solution between its steps may be off: its own error, not known for fixed steps."""
        return min(_LOOSE, 100 * self.tolerance) if self.method in ADAPTIVE else _LOOSE

    def steps(self, evaluations: int) -> float:
        """How many steps so many evaluations were, about."""
        return evaluations / _STAGES[self.method]

    def solve(self, velocity: Velocity, x: Tensor, times: Sequence[float]) -> tuple[Tensor, int]:
        """The solution at times.

        Args:
            velocity: dx/dt; where gradients are recorded, they go through the steps, whose lengths count as constants.
            x: the state at the first time.
            times: strictly ascending or descending, at least two.

        Returns:
            Shape (times, *x.shape), and how often ``velocity`` was evaluated.

        Raises:
            SolverError: if the solver gave up or the state is not finite.
        """
        if times[0] == times[-1]:
            raise SolverError(
                f"t0 = t1 = {times[0]:.6g}: the block would do nothing; give it an interval with t1 > t0.", times[0]
            )
        watched = _Watched(velocity, times[0], self)
        t = torch.tensor(times, dtype=torch.float64, device=x.device)
        options: dict[str, Any]
        if self.method in ADAPTIVE:
            self._meetable(x, times[0])
            with torch.no_grad(), unheard():
                first = min(self._first_step(watched, x, t), abs(times[-1] - times[0]))
            ends = t[-1:] if self.method in DENSE else t[1:]
            options = {"norm": watched.norm, "first_step": first, "step_t": ends, "max_num_steps": MOST_STEPS}
        else:
            step = abs(times[-1] - times[0]) / 10 if self.step is None else self.step
            # As many steps as fit, all of one length: a short one at the end would spoil the order.
            count = max(1, math.ceil(abs(times[-1] - times[0]) / step - 1e-9))
            options = {"grid_constructor": _grid(count), "interp": "cubic" if len(times) > 2 else "linear"}
        try:
            path = _odeint()(
                watched, x, t.to(x.dtype) if self.method in FIXED else t,
                rtol=self.rtol, atol=self.atol, method=self.method, options=options,
            )  # fmt: skip
        except AssertionError as error:  # torchdiffeq's own
            raise watched.gave_up(str(error), self) from error
        if not bool(torch.isfinite(path[-1]).all()):
            raise watched.not_finite(self)
        return path, watched.count

    def _meetable(self, x: Tensor, time: float) -> None:
        least = ROUND_OFF * torch.finfo(x.dtype).eps
        if self.rtol < least:
            raise SolverError(
                f"rtol = {self.rtol:.1e} cannot be met in {x.dtype}, whose numbers are {least / ROUND_OFF:.1e} apart: "
                f"take rtol >= {least:.1e}, or a model and inputs in float64.",
                time,
            )

    def _first_step(self, velocity: _Watched, x: Tensor, t: Tensor) -> float:
        """Length of the first step (Hairer, Norsett & Wanner, Solving ODEs I, II.4).

        torchdiffeq's own would be differentiated, and depends on all samples.
        """
        way = 1.0 if t[-1] > t[0] else -1.0
        f = velocity(t[0].to(x.dtype), x)
        scale = self.atol + self.rtol * x.abs()
        d0, d1 = (float(velocity.norm(v / scale)) for v in (x, f))
        if not math.isfinite(d0 + d1) and not bool((torch.isfinite(f) & torch.isfinite(x)).all()):
            raise velocity.not_finite(self)  # no step is short enough for that
        h = 1e-6 if d0 < 1e-5 or d1 < 1e-5 or not math.isfinite(d0 + d1) else 0.01 * d0 / d1
        h = min(h, abs(float(t[-1] - t[0])))
        g = velocity((t[0] + way * h).to(x.dtype), x + way * h * f)
        d2 = float(velocity.norm((g - f) / scale)) / h
        largest = max(d1, d2)
        if not math.isfinite(largest):
            return h  # too long, but torchdiffeq shortens what overshoots
        second = max(1e-6, 1e-3 * h) if largest <= 1e-15 else (0.01 / largest) ** (1 / ADAPTIVE[self.method])
        return min(100 * h, second)


class _Watched:
    """The function torchdiffeq integrates; knows where it is, for messages.

    Args:
        velocity: dx/dt.
        start: the first time.
        solver: who asks.

    Attributes:
        count: evaluations, those of steps that were not taken included.
        overshot: steps that were tried into numbers that are not finite.
    """

    def __init__(self, velocity: Velocity, start: float, solver: Solver) -> None:
        self.velocity, self.solver = velocity, solver
        self.count = self.overshot = 0
        self.at = start
        self.last: Tensor | None = None

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.count += 1
        f = self.velocity(t, x)
        if f.shape != x.shape:
            raise SolverError(
                f"The field gave {tuple(f.shape)} for a state {tuple(x.shape)}; dx/dt must have the shape of x.",
                float(t),
            )
        self.last = f.detach()
        return f

    def callback_step(self, t: Tensor, x: Tensor, dt: Tensor) -> None:
        """A step is tried.

        Raises:
            SolverError: if too many have overshot: the solution or the field itself is not finite there.
        """
        now = float(t)
        if now == self.at and not self._finite():  # the step before was not taken
            self.overshot += 1
            if self.overshot > MOST_OVERSHOT:
                raise self.not_finite(self.solver)
        self.at = now

    @staticmethod
    def norm(t: Tensor) -> Tensor:
        """Root mean square; infinite for NaN, so that an error that is none makes a step shorter and not the last."""
        return t.detach().square().mean().sqrt().nan_to_num(nan=torch.inf, posinf=torch.inf)

    def _finite(self) -> bool:
        """Whether the field was finite where it was evaluated last."""
        return self.last is None or bool(torch.isfinite(self.last).all())

    def gave_up(self, words: str, solver: Solver) -> SolverError:
        """What to say when torchdiffeq stops."""
        if not self._finite() or "non-finite" in words:
            return self.not_finite(solver)
        if "max_num_steps" in words:
            why = f"took {MOST_STEPS} steps and is still at t = {self.at:.6g}"
        else:
            why = f"needs steps below round-off at t = {self.at:.6g}"
        return SolverError(
            f"'{solver.method}' {why}: the solution blows up or is stiff there. Take smaller or decayed weights, a "
            f"shorter interval, looser tolerances (rtol = {solver.rtol:.1e}) or float64.",
            self.at,
        )

    def not_finite(self, solver: Solver) -> SolverError:
        """What to say when numbers overflow."""
        return SolverError(
            f"The field or the solution is not finite at t = {self.at:.6g} ('{solver.method}'): it blows up there, or "
            "the inputs or weights hold NaN. Look for these, or take a shorter interval or step.",
            self.at,
        )


def _grid(count: int) -> Callable[[Any, Tensor, Tensor], Tensor]:
    def grid(velocity: Any, x: Tensor, t: Tensor) -> Tensor:
        out = torch.linspace(0, 1, count + 1, dtype=t.dtype, device=t.device) * (t[-1] - t[0]) + t[0]
        out[-1] = t[-1]
        return out

    return grid


def _odeint() -> Callable[..., Any]:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise PullbackError('ODE blocks need torchdiffeq: pip install "pullback[ode]".') from error
    found: Callable[..., Any] = odeint
    return found
