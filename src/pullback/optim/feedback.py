"""Feedback Gauss-Newton: every module answers to what the modules before it really did."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Unpack

from torch import nn

from pullback.control import Route, key_of
from pullback.curvature import Linearisation, Tails
from pullback.metric import Criteria
from pullback.optim.attempt import Policy
from pullback.optim.base import PullbackOptimizer
from pullback.optim.closed_loop import ClosedLoop
from pullback.optim.coverage import Treated
from pullback.optim.options import Damping, Options
from pullback.optim.search import Clock
from pullback.optim.system import Groups
from pullback.tape import Passage, in_time, rerun


class ClosedLoops:
    """Makes closed-loop policies for an optimizer, and remembers the routes through its model.

    Args:
        anticipate: whether the downstream remainder is anticipated.
    """

    def __init__(self, anticipate: bool) -> None:
        self.anticipate = anticipate
        self._routes: dict[object, Route] = {}

    def check(self, opt: PullbackOptimizer) -> None:
        """Refuse options that have no meaning in closed loop.

        Raises:
            ValueError: if one is set.
        """
        if opt.batch_norm != "refuse":
            raise ValueError(
                "Feedback and geodesic steps run the model with moved weights, where batch statistics differ; put "
                "BatchNorm layers in eval mode or use GroupNorm instead of batch_norm='frozen'."
            )
        if opt.momentum is not None and opt.momentum.kind != "spring":
            raise ValueError(
                "Feedback and geodesic steps take Momentum(kind='spring'); 'model' mixes directions, which they do not "
                "have."
            )
        if opt.solver == "cg":
            raise ValueError(
                "Feedback and geodesic steps solve with factorised matrices: solver must be 'auto', 'dual' or 'primal'."
            )

    def policy(
        self,
        opt: PullbackOptimizer,
        lin: Linearisation,
        closure: Callable[[], Any] | None,
        loss: float,
        clock: Clock,
    ) -> Policy:
        """The policy of one step.

        Args:
            opt: the optimizer.
            lin: its linearisation.
            closure: what ``step`` was called with.
            loss: loss before the step.
            clock: counts the phases.
        """
        groups = Groups(
            lin,
            partition=opt.partition,
            mass=opt.mass,
            names=opt._tape.names.full,
            largest=opt._largest,
            ridge=opt.ridge.weight,
        )
        key = key_of(lin.terms, groups.plain)
        known = key in self._routes
        route = self._routes[key] if known else Route(lin.terms, groups.plain)
        run, roots = self._runner(opt, lin, closure)
        tails = Tails([groups.blocks[k] for k in route.order], opt.solver, groups.room(opt.memory), opt._workspace)
        broken = {id(block): why for k, why in route.broken.items() for block in groups.plain[k]}
        opt._treated = [Treated(block.params, block.rule, broken.get(id(block))) for block in lin.blocks]
        policy = ClosedLoop(
            groups=groups,
            route=route,
            tails=tails,
            unit=groups.unit_of(tails.trace()),
            anticipate=self.anticipate,
            momentum=opt.momentum,
            previous=opt._previous(),
            rates=opt._rates(),
            roots=roots,
            run=run,
            whole=closure is not None,
            loss=loss,
            tried=opt.damping.control == "gain",
            arc=lambda: opt._control.arc,
            clock=clock,
        )
        if not known:
            policy.verify()
            self._routes[key] = route
        return policy

    def _runner(
        self, opt: PullbackOptimizer, lin: Linearisation, closure: Callable[[], Any] | None
    ) -> tuple[Callable[[Passage], float], Sequence[int] | int]:
        """How the model is run again, and which of its calls that repeats."""
        recorder, model, terms = opt._tape.recorder, opt.model, lin.terms
        again = (opt._trial if opt.damping.control == "gain" else opt._again)(terms, closure)

        def run(passage: Passage) -> float:
            with recorder.heard(passage):
                if again is not None:
                    return float(again())
                rerun(model, terms)
                return math.nan

        if closure is not None:
            return run, opt._first_root
        return run, [root.serial for root in in_time(root for term in terms for root in term.roots)]


class FeedbackGaussNewton(PullbackOptimizer):
    r"""Gauss-Newton in which every module answers to what the modules before it really did.

    .. math:: \delta_l = -U_l^\top \Bigl(\mu I + \sum_{j \ge l} U_j U_j^\top\Bigr)^{-1} (e_0 + e_l + \rho_l)

    :math:`e_l` is measured in a new forward pass in which each module is moved as it is reached: differential dynamic
    programming on the stacked batch (Liu, Chen & Theodorou, arXiv 2510.14168, in exact form; docs/theory 9 to 11).
    :math:`\rho_l` anticipates the curvature behind module l. It is the method for many digits on one batch and deep
    models; for a handful of modules ``GaussNewton(geodesic=True)`` does as well.

    Args:
        model: see :class:`~pullback.optim.base.PullbackOptimizer`.
        criterion: likewise.
        anticipate: whether to measure the downstream remainder by one more forward pass; a sweep that raises the loss
            all the same is tried without it, then shortened. False for plain feedback, which is also what half
            precision (autocast) gets.
        **options: see :class:`~pullback.optim.base.PullbackOptimizer`. ``partition`` says which modules move jointly
            inside the sweep.

    Example:
        >>> import torch, pullback
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1)).double()
        >>> criterion = nn.MSELoss()
        >>> opt = pullback.FeedbackGaussNewton(model, criterion)
        >>> x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
        >>> y = torch.sin(4 * x)
        >>> for _ in range(60):
        ...     opt.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     _ = opt.step()
        >>> bool(loss < 1e-9)
        True
    """

    _partition = "layerwise"
    _wiring = "all"
    #: closed loops need less of it at the start: what goes too far is found out on the way
    default_damping = Damping(initial=0.1)

    def __init__(
        self, model: nn.Module, criterion: Criteria, *, anticipate: bool = True, **options: Unpack[Options]
    ) -> None:
        super().__init__(model, criterion, **options)
        self.anticipate = anticipate
        self._loops = ClosedLoops(anticipate)
        self._loops.check(self)

    def _policy(self, lin: Linearisation, closure: Callable[[], Any] | None, loss: float, clock: Clock) -> Policy:
        return self._loops.policy(self, lin, closure, loss, clock)
