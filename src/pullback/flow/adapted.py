"""The adapted flow of a model: prepared, with its stopping time; then run, with its certificate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pullback.flow.aims import Aim, Path, Squared
from pullback.flow.checks import check_duplicates, check_inputs, check_start
from pullback.flow.classes import CrossEntropy
from pullback.flow.errors import FlowError
from pullback.flow.field import Bounds
from pullback.flow.integrate import METHODS
from pullback.flow.record import FlowRun
from pullback.flow.record import Path as Kept
from pullback.flow.regimes import Choice, choose
from pullback.flow.system import OutputSystem
from pullback.flow.work import HORIZON, Progress, Work


class AdaptedFlow:
    r"""The flow that makes the outputs of a model follow gradient descent in output space.

    With D the Jacobian of the stacked outputs x and :math:`C = c |x - y|^2`, parameters move by
    :math:`\theta' = -D^+ \nabla_x C` (C; docs/theory 14). While D has full row rank :math:`C(s) = e^{-4cs} C(0)`, so
    the time to a cost is known beforehand. The weights of the model are moved in place.

    Args:
        model: a model the tape can read; put it into eval mode if it draws random numbers.
        inputs: what it is called with, a tensor or a tuple.
        targets: floating targets in the shape of the outputs, a function of the time s that returns them (a path),
            int64 labels (cross entropy modulo the logits' constant direction), or an :class:`Aim`.
        c: the constant of the squared cost; None for 1 / (2N).
        regime: ``"auto"`` chooses by rank and dimensions; or ``"over-parametrised"``, ``"borderline"``,
            ``"under-parametrised"``, ``"any-rank"``.
        solver: ``"auto"``: Cholesky of the smaller Gram while it fits, QR where D is badly conditioned, LSMR beyond; or
            ``"cholesky"``, ``"qr"``, ``"lsmr"``.
        rank_tol: singular values at most this times the largest count as none; None for 1e-9 (docs/flow).
        alpha: 1 for the adapted flow, 0 for the standard gradient flow, between them the homotopy.
        memory: bytes for matrices; None for half of the machine's.
        iterations: most iterations of LSMR per solve.

    Attributes:
        regime: the regime.
        rank: rank of D at the start.
        condition: its condition there, None if not computed.
        notes: what there is to say, in sentences.

    Raises:
        FlowError: if inputs, targets or outputs do not make a flow; the message says why and what to do.
        CoverageError: if parameters cannot be given rows.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor | tuple[Any, ...],
        targets: Tensor | Path | Aim,
        *,
        c: float | None = None,
        regime: str = "auto",
        solver: str = "auto",
        rank_tol: float | None = None,
        alpha: float = 1.0,
        memory: float | None = None,
        iterations: int = 2000,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; give a number from 0 (standard) to 1 (adapted).")
        self.aim = aim_of(targets, c)
        self.alpha = float(alpha)
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        check_inputs(given)
        with torch.no_grad():
            z = model(*given)
        if isinstance(z, Tensor) and z.is_floating_point():
            self.aim.check(z)
        self.system = OutputSystem(model, given, self.aim.metric())
        try:
            z = self.system.outputs()
            self.x0 = self.aim.coordinates(z)
            self.initial = self.aim.cost(0.0, self.x0)
            check_start(self.aim, self.x0, self.initial, None)
            notes = check_duplicates(self.aim, given, self.x0, len(z), regime)
            self.choice: Choice = choose(
                self.system.linearise(),
                regime=regime,
                solver=solver,
                tolerance=rank_tol,
                memory=memory,
                iterations=iterations,
            )
        except BaseException:
            self.system.close()
            raise
        self.choice.notes[:0] = notes
        self.regime, self.rank = self.choice.regime, self.choice.rank
        self.condition, self.notes = self.choice.condition, self.choice.notes

    @property
    def promised(self) -> bool:
        """Whether a stopping time is promised."""
        return self.choice.promised and self.alpha == 1

    def stopping_time(self, eps: float) -> float:
        """The time s at which the cost will be eps, from the outputs at the start alone.

        Args:
            eps: a cost below the one at the start.

        Raises:
            FlowError: if the regime promises none, or eps is out of range.
        """
        check_start(self.aim, self.x0, self.initial, eps)
        if not self.promised:
            raise FlowError(
                f"The {self.regime} flow (alpha={self.alpha:g}) promises no stopping time: D is {self.choice.rows} x "
                f"{self.choice.columns} of rank {self.rank}. Run it without eps, or take a wider model or less data."
            )
        return self.aim.stopping_time(self.x0, eps)

    def run(
        self,
        eps: float | None = None,
        *,
        until: float | None = None,
        method: str = "dopri5",
        tol: float | None = None,
        evaluations: int = 20_000,
        seconds: float = math.inf,
        monitor: bool = True,
        keep_path: bool = False,
        progress: Progress | None = None,
    ) -> FlowRun:
        """Run the flow from the weights as they were when it was made.

        Args:
            eps: cost to stop at. Where a stopping time is promised the run ends there; else it ends at this cost's
                time if the law held, or at an equilibrium.
            until: time s to end at instead; None for the stopping time, or 40 units where none is promised.
            method: one of torchdiffeq's adaptive methods (``"dopri5"``, ``"dopri8"``, ...), or ``"discrete"``.
            tol: tolerance of a step relative to the way that is left; None for 1e-6 (float32 and discrete: 1e-3).
            evaluations: most evaluations of the field.
            seconds: most seconds.
            monitor: whether to watch the rank: singular values, the event, the continuation.
            keep_path: whether to keep the parameters along the run, for dense output.
            progress: called with the share of the time done and the smallest singular value.

        Returns:
            What the run left behind. A bound that was reached, or Ctrl-C, ends it with what was reached until then.

        Raises:
            FlowError: as :meth:`stopping_time`; if D^+ cannot be taken at the start.
            ValueError: if an option is none of those.
        """
        if method not in (*METHODS, "discrete"):
            raise ValueError(f"method must be one of {', '.join((*METHODS, 'discrete'))}, got {method!r}.")
        if method == "discrete" and self.alpha != 1:
            raise ValueError("The discrete scheme is for alpha=1; use an ODE method.")
        if until is None and eps is None and self.promised:
            raise ValueError("Give eps, the cost to stop at, or until, a time.")
        check_start(self.aim, self.x0, self.initial, eps)
        promise = self.stopping_time(eps) if eps is not None and self.promised else None
        end = until if until is not None else promise if promise is not None else HORIZON * self.aim.unit
        if not (end > 0 and math.isfinite(end)):
            raise ValueError(f"until is {end}; give a positive time.")
        coarse = method == "discrete" or self.x0.dtype != torch.float64
        work = Work(self, eps, promise, end, method, (1e-3 if coarse else 1e-6) if tol is None else tol)
        work.field.bounds = Bounds(evaluations, seconds)
        work.monitor, work.kept, work.progress = monitor, Kept() if keep_path else None, progress
        return work.go()

    def close(self) -> None:
        """Take the hooks off the model."""
        self.system.close()


def aim_of(targets: Tensor | Path | Aim, c: float | None) -> Aim:
    """The aim that targets stand for."""
    if isinstance(targets, Aim):
        return targets
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        if c is not None:
            raise FlowError("The constant c belongs to the squared cost; labels have none.")
        return CrossEntropy(targets)
    return Squared(targets, c)


def flow(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    targets: Tensor | Path | Aim,
    eps: float | None = None,
    *,
    until: float | None = None,
    method: str = "dopri5",
    tol: float | None = None,
    evaluations: int = 20_000,
    seconds: float = math.inf,
    monitor: bool = True,
    keep_path: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> FlowRun:
    """Make an :class:`AdaptedFlow` and run it; the model's weights are moved in place, its hooks taken off again.

    Args:
        model: see :class:`AdaptedFlow`.
        inputs: likewise.
        targets: likewise.
        eps: see :meth:`AdaptedFlow.run`, as all further arguments.
        until: likewise.
        method: likewise.
        tol: likewise.
        evaluations: likewise.
        seconds: likewise.
        monitor: likewise.
        keep_path: likewise.
        progress: likewise.
        options: those of :class:`AdaptedFlow`.

    Returns:
        What the run left behind.
    """
    adapted = AdaptedFlow(model, inputs, targets, **options)
    try:
        return adapted.run(
            eps, until=until, method=method, tol=tol, evaluations=evaluations, seconds=seconds, monitor=monitor,
            keep_path=keep_path, progress=progress,
        )  # fmt: skip
    finally:
        adapted.close()
