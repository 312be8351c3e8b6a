"""A vector field, solved from t0 to t1, as a layer of any model."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from pullback.errors import SolverError
from pullback.ode.flow import Flow
from pullback.ode.solver import Solver
from pullback.ode.time import Time
from pullback.tape.recorder import unheard
from pullback.tape.solves import Solves


class ODEBlock(nn.Module, Solves):
    r"""The map from x(t0) to x(t1) of a neural ODE.

    .. math:: \dot x = F(t, x, \theta)

    All optimizers of this package, and torch's, train models that hold such blocks, several of them and beside ordinary
    layers. With the adjoint nothing of the solver's steps is kept: the backward pass integrates the state, and the
    costate or all columns of the factor, backwards in time (O; Chen et al. 2018), and the rows of the parameters are
    integrals over the same solve (docs/theory 17). Without it the layers inside the field are called as often as the
    solver says, and all derivatives are those of its steps, to round-off.

    Args:
        func: the field, called as ``func(t, x)`` with t a tensor without axes and x of shape (N, ...); returns dx/dt in
            the shape of x. Samples must not mix in it, nor numbers be drawn.
        t0: where the integration begins.
        t1: where it ends.
        solver: a method of torchdiffeq: of adaptive steps ``"dopri5"``, ``"adaptive_heun"``, ``"bosh3"``,
            ``"fehlberg2"``, ``"dopri8"``, of fixed ones ``"rk4"``, ``"midpoint"``, ``"euler"``, ``"heun2"``,
            ``"heun3"``.
        rtol: relative tolerance of a step, and with ``atol`` what the quadrature over time is held to.
        atol: absolute tolerance. Costates and factors are scaled to size 1 before.
        step: length of fixed steps; a tenth of the interval without.
        adjoint: whether to integrate backwards, or to go back through the solver's steps.
        learn: which of ``"t0"`` and ``"t1"`` are parameters.
        penalty: c of the cost c/2 t^2 of each of these, whose gradient every backward pass through the block adds, and
            whose curvature and value the optimizers of this package know.
        every: learned times take part in every so many forward passes that record gradients.
        shortest: the least t1 - t0 that learning may come to; a step to less is refused.
        longest: the most; a step beyond ends there.

    Attributes:
        flow: holds the field and the solver.
        start, end: the learned times, None where they are fixed.

    Raises:
        SolverError: in a forward or backward pass, if the ODE cannot be solved (with the time), or if learning has
            driven t1 to t0, which a pass in training puts back. What an optimizer does about it: docs/ode.
        PullbackError: if torchdiffeq is not installed.
        ValueError: if an option is not of its kind.

    Example:
        >>> import torch, pullback
        >>> from torch import nn
        >>> from pullback.ode import ODEBlock
        >>> _ = torch.manual_seed(0)
        >>> class Field(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        ...     def forward(self, t, x):
        ...         return self.layers(x)
        >>> model = nn.Sequential(ODEBlock(Field()), nn.Linear(2, 1)).double()
        >>> criterion = nn.MSELoss()
        >>> opt = pullback.GaussNewton(model, criterion)
        >>> x = torch.randn(32, 2, dtype=torch.float64)
        >>> y = (x[:, :1] * x[:, 1:]).tanh()
        >>> for _ in range(20):
        ...     opt.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     _ = opt.step()
        >>> bool(loss < 1e-2)
        True
    """

    def __init__(
        self,
        func: nn.Module,
        t0: float = 0.0,
        t1: float = 1.0,
        *,
        solver: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-6,
        step: float | None = None,
        adjoint: bool = True,
        learn: Collection[str] = (),
        penalty: float = 0.0,
        every: int = 1,
        shortest: float = 1e-2,
        longest: float = math.inf,
    ) -> None:
        super().__init__()
        learn = [learn] if isinstance(learn, str) else list(learn)
        if not (math.isfinite(t0) and math.isfinite(t1)) or t0 == t1:
            raise ValueError(f"t0 and t1 must be finite and differ, got {t0} and {t1}.")
        if set(learn) - {"t0", "t1"}:
            raise ValueError(f"learn may name 't0' and 't1', got {sorted(learn)}.")
        if learn and t1 - t0 < shortest:
            raise ValueError(f"A learned interval must be at least shortest={shortest} long, got t1 - t0 = {t1 - t0}.")
        if not (penalty >= 0 and math.isfinite(penalty)):
            raise ValueError(f"penalty must be finite and at least 0, got {penalty}.")
        if every < 1 or not shortest > 0:
            raise ValueError(f"every must be at least 1 and shortest positive, got {every} and {shortest}.")
        if learn and not t1 - t0 <= longest:
            raise ValueError(f"A learned interval may be at most longest={longest} long, got t1 - t0 = {t1 - t0}.")
        self.start = Time(t0, -1, penalty, every) if "t0" in learn else None
        self.flow = Flow(func, Solver(solver, rtol, atol, step), adjoint)
        self.end = Time(t1, 1, penalty, every) if "t1" in learn else None
        self._interval = (float(t0), float(t1))
        self.shortest, self.longest = shortest, longest

    @property
    def func(self) -> nn.Module:
        """The field."""
        return self.flow.func

    @property
    def nfe(self) -> int:
        """Evaluations of the field in the last forward pass's solve."""
        return self.flow.nfe

    @property
    def missed(self) -> float:
        """How far the adjoint's integrals over time missed those that are known, in the last backward pass.

        Relative to the state's size. With adaptive steps it is near the tolerances; with fixed ones it is the error of
        the steps themselves, and says whether they are short enough for the adjoint.
        """
        return self.flow.missed

    @property
    def nfe_backward(self) -> int:
        """Evaluations in the last solve backwards in time."""
        return self.flow.nfe_backward

    @property
    def t0(self) -> float:
        """Where the integration begins."""
        return self._interval[0] if self.start is None else self.start.value

    @property
    def t1(self) -> float:
        """Where it ends."""
        return self._interval[1] if self.end is None else self.end.value

    def forward(self, x: Tensor) -> Tensor:
        """x(t1) from x(t0).

        Args:
            x: shape (N, ...), floating point.

        Returns:
            Shape (N, ...).
        """
        if not x.is_floating_point():
            raise SolverError(f"The state must be floating point, got {x.dtype}; embed it before the block.")
        self._check()
        recorded = torch.is_grad_enabled()
        # Run again in training, the flow keeps to the times it was recorded with; what they did since is their own.
        t0, t1 = (self.t0, self.t1) if recorded or not self.training else self._recorded()
        if self.start is not None:
            x = self.start(x, self.flow.quietly(t0, x) if recorded else None, t0, self._leg)
        x = self.flow(x, t0, t1)
        if self.end is not None:
            x = self.end(x, self.flow.quietly(t1, x) if recorded else None, t1, self._leg)
        if recorded:
            for time in (self.start, self.end):
                if time is not None:
                    time.kept = time.value
                    time.passes += 1  # of a pass that was solved: both times take part in the same ones
        return x

    def _recorded(self) -> tuple[float, float]:
        """The times of the last pass that recorded gradients."""
        t0, t1 = self._interval
        return t0 if self.start is None else self.start.kept, t1 if self.end is None else self.end.kept

    def _leg(self, x: Tensor, start: float, stop: float) -> Tensor:
        """The rest of the way, or some of it back."""
        self._check()
        with unheard():
            return self.flow.solver.solve(self.func, x, (start, stop))[0][-1]

    def _check(self) -> None:
        """Keep learned times within their bounds: refuse too short an interval, and cut off one that is too long.

        Raises:
            SolverError: if it is too short; a pass in training puts the times back.
        """
        if self.start is None and self.end is None:
            return
        t0, t1 = self.t0, self.t1
        if self.longest < t1 - t0 < math.inf:
            # The nearest times that are allowed, as in a projected step.
            if self.end is not None:
                self.end.t.detach().fill_(t0 + self.longest)
            elif self.start is not None:
                self.start.t.detach().fill_(t1 - self.longest)
            return
        training = self.training and torch.is_grad_enabled()
        if t1 - t0 >= self.shortest and math.isfinite(t1 - t0):
            return
        words = f"drove the interval to t0 = {t0:.6g}, t1 = {t1:.6g}, shorter than {self.shortest}"
        if training:
            for time in (self.start, self.end):
                if time is not None:
                    time.t.detach().fill_(time.kept)
            words += f"; they were put back to {self.t0:.6g} and {self.t1:.6g}"
        raise SolverError(
            f"A step {words}. Take a smaller penalty or learning rate for times, or a smaller shortest=.",
            t1,
        )
