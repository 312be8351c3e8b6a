"""The step all optimizers share: gather, solve, scale, try, keep or undo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pullback.curvature import (
    Block,
    Linearisation,
    Mass,
    Partition,
    Space,
    Workspace,
    check_mass,
    check_partition,
)
from pullback.errors import StepError
from pullback.manifolds import Manifold
from pullback.metric import Criteria, Metrics
from pullback.optim.attempt import OpenLoop, Policy
from pullback.optim.checks import check_options
from pullback.optim.coverage import Treated
from pullback.optim.damping import AMPLE, DampingControl
from pullback.optim.held import refuse_pulls, refuse_strays, tangent
from pullback.optim.options import Damping, Momentum
from pullback.optim.ridge import Ridge, check_ridge
from pullback.optim.search import Clock, Search
from pullback.optim.system import System
from pullback.optim.taped import Taped
from pullback.optim.undo import take_back, untouched
from pullback.tape import (
    Term,
    inputs_finite,
)


class PullbackOptimizer(Taped):
    """Base of the optimizers that solve in a pulled-back metric.

    Args:
        model: the model; its parameters are optimised and its calls observed. Those that live on a manifold
            (:func:`pullback.manifolds.constrain`) move in its tangent space and are retracted.
        criterion: the loss module used in the loop; several in a list or dict, one per head of the model; None for
            a functional loss, which then needs ``metric`` and a closure.
        metric: overrides the metric the criterion resolves to; for several criteria as many, in the same form.
        partition: ``"layerwise"`` (every module for itself), ``"global"`` (all jointly) or coalitions as lists of
            name patterns, ``[["encoder.*"], ["head.*"]]``; what no pattern matches moves alone.
        damping: how mu is chosen.
        mass: D in M = mu D + U^T U: ``"identity"``, ``"module"``, ``"marquardt"`` or numbers by parameter name.
        momentum: how the previous step enters; None for not at all.
        solver: ``"auto"``, ``"dual"``, ``"primal"`` or ``"cg"``.
        memory: bytes that pulled-back factors and the solvers' matrices may take in a step; None for half of the
            machine's. Estimated from shapes before they are taken; what does not fit is solved without matrices
            (``solver="auto"``), swept column by column (``sweep="auto"``), or refused.
        lr: factor on the step; 1 is the minimiser of the quadratic model.
        weight_decay: decoupled: weights are multiplied by ``1 - lr * weight_decay`` after a step that was kept.
        ridge: c of a cost c/2 |w|^2 of all weights beside the loss, which gradient, curvature, trials and records know
            (``weight_decay`` of torch's Adam has its gradient): maximum a posteriori under a normal prior.
        sweep: ``"auto"``, ``"loop"``, ``"vmap"`` or ``"fold"``: how factor columns are pulled back.
            ``"auto"`` chooses by time, so that two runs may differ in rounding; name one for bitwise
            reproducible runs.
        batch_norm: ``"refuse"`` a BatchNorm that uses batch statistics, or ``"frozen"``: the gradient stays exact
            and the metric holds the statistics constant.
        fallback: makes an optimizer for parameters that cannot be given rows, as in
            ``fallback=lambda params: torch.optim.AdamW(params)``; without it they are an error.
        grad_scaler: needed only if ``scaler.unscale_(opt)`` is called before ``scaler.step(opt)``, to clip.
        params: parameters or groups to optimise; default all of the model's. Others are left alone.

    Attributes:
        last: record of the last step, None before.
        coverage: how each parameter is treated; print it.

    Raises:
        MetricError: if no metric is known for the criterion.
        ManifoldError: if weight decay is asked for a parameter on a manifold.
        TypeError, ValueError: if an option is not of its kind.
    """

    _partition: Partition = "layerwise"
    #: the damping where none is given
    default_damping = Damping()

    def __init__(
        self,
        model: nn.Module,
        criterion: Criteria,
        *,
        metric: Metrics = None,
        partition: Partition | None = None,
        damping: Damping | None = None,
        mass: Mass = "identity",
        momentum: Momentum | None = None,
        solver: Space = "auto",
        memory: float | None = None,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        ridge: float = 0.0,
        sweep: str = "auto",
        batch_norm: str = "refuse",
        fallback: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        params: Iterable[Any] | None = None,
    ) -> None:
        rates = {"lr": lr, "weight_decay": weight_decay, "ridge": ridge}
        check_options(type(self).__name__, model, damping, momentum, solver, memory, **rates)
        check_ridge(ridge, mass, fallback is not None)
        self.partition = check_partition(self._partition if partition is None else partition)
        self.mass = check_mass(mass)
        self.ridge = Ridge(ridge)
        super().__init__(
            model,
            criterion,
            metric=metric,
            memory=memory,
            lr=lr,
            weight_decay=weight_decay,
            sweep=sweep,
            batch_norm=batch_norm,
            fallback=fallback,
            grad_scaler=grad_scaler,
            params=params,
        )
        self.damping = damping or self.default_damping
        self.momentum = momentum
        self.solver = solver
        self._control = DampingControl(self.damping)
        self._workspace = Workspace()
        self._masses: dict[Tensor, Tensor] = {}

    def _advance(self, terms: list[Term], loss: float, finite: bool, closure: Callable[[], Any] | None) -> None:
        loss += self.ridge.cost(self._params())
        # The loss is asked first: it is at hand, the rest reads every input and every weight.
        overshot = bool(terms) and self._control.overshot(loss)
        if overshot and inputs_finite(terms) and untouched(self.param_groups, self._control, self._held):
            self._take_back(loss)
            return
        if not finite:
            raise StepError(f"The loss is {loss}: no step was taken. Look for bad data or too large weights.")
        state = self._control.copy()
        try:
            self._step(terms, loss, closure)
        except BaseException:
            self._control = state
            self._masses.clear()
            raise

    def close(self) -> None:
        """Remove the hooks from model and criterion. Happens by itself when the optimizer is collected."""
        super().close()
        self._workspace.clear()

    def _state(self) -> dict[str, Any]:
        return {"damping": self._control.state(self._order())}

    def _load(self, own: dict[str, Any]) -> None:
        if "damping" in own:
            self._control.load(own["damping"], self._order())

    # -- one step ---------------------------------------------------------------------------------------

    def _step(self, terms: list[Term], loss: float, closure: Callable[[], Any] | None) -> None:
        clock = Clock()
        clock.add("sweep", sum(term.seconds for term in terms))
        if self._held:
            self._check_held()
        lin = Linearisation(terms, self._held)
        policy = self._policy(lin, closure, loss, clock)
        strays = self._strays({id(p) for block in lin.blocks for p in block.params})
        ample = AMPLE * sum(block.n for block in lin.blocks) <= lin.R
        before = self._before()
        self._control.start(policy.unit, loss, self._slopes(), lin.e0.dtype, ample)
        clock.mark("curvature")
        self._moves(before)
        self.last = Search(policy, self._control, loss, self.damping.control == "gain", clock).run()
        self._finish(policy.params)
        if self._fallback is not None and strays:
            self._fallback.step(strays)

    def _accept(self, held: Mapping[int, Manifold]) -> None:
        self._held = held
        self._check_held()

    def _check_held(self) -> None:
        refuse_pulls(self._held, self.param_groups, self.ridge.weight, self._tape.names.full)

    def _strays(self, seen: set[int]) -> list[Tensor]:
        strays = super()._strays(seen)
        refuse_strays(self._held, strays, self._tape.names.full)
        return strays

    def _policy(self, lin: Linearisation, closure: Callable[[], Any] | None, loss: float, clock: Clock) -> Policy:
        """How attempts are made from a linearisation."""
        trial = self._trial(lin.terms, closure)
        system = System(
            lin,
            partition=self.partition,
            mass=self.mass,
            space=self.solver,
            budget=self.memory,
            names=self._tape.names.full,
            largest=self._largest,
            workspace=self._workspace,
            ridge=self.ridge.weight,
        )
        self._treated = [Treated(block.params, block.rule) for block in lin.blocks]
        return OpenLoop(
            system=system,
            momentum=self.momentum,
            previous=self._previous(),
            rates=self._rates(),
            trial=trial,
            whole=closure is not None,
            clock=clock,
        )

    def _slopes(self) -> dict[int, Tensor]:
        """The gradient by parameter; of a constrained one only what is tangent, for the rest is no slope."""
        params = self._params()
        return tangent(self._held, self.ridge.sloped(self._gradients(), params), params)

    def _keep_state(self) -> object:
        steps = {p: s["step"] for p, s in self.state.items() if "step" in s}
        return self._control.copy(), steps

    def _put_back(self, kept: object) -> None:
        assert isinstance(kept, tuple)
        self._control, steps = kept
        self._control.taken = None  # it was judged when the step that failed began
        if self._control.mu is not None:
            self._control.fail()
        for p, state in self.state.items():
            state.pop("step", None)
            state.update({"step": steps[p]} if p in steps else {})

    def _previous(self) -> dict[int, Tensor]:
        """The previous step by parameter."""
        return {id(p): s["step"] for p, s in self.state.items() if "step" in s}

    def _rates(self) -> dict[int, float]:
        """Learning rate by parameter."""
        return {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}

    def _take_back(self, loss: float) -> None:
        """Undo the last step, which no trial had guarded, now that the next batch has judged it."""
        assert self.last is not None
        start = take_back(self.param_groups, self._control)
        for p in self.state:
            self.state[p].pop("step", None)
        self.last = dataclasses.replace(self.last, accepted=False, actual=start - loss)

    def _finish(self, params: Sequence[Tensor]) -> None:
        """What follows a step that was kept: decay, and memory for the momentum."""
        for p, mass in self._masses.items():
            self.state[p]["mass"] = mass
        self._masses.clear()
        kept = self._control.taken
        if kept is None:
            for p in params:
                self.state[p].pop("step", None)
            return
        for group in self.param_groups:
            if group["weight_decay"]:
                for p in group["params"]:
                    if id(p) in kept.step:
                        p.mul_(1 - group["lr"] * group["weight_decay"])
        if self.momentum is not None:
            for p in params:
                self.state[p]["step"] = kept.step[id(p)]

    def _largest(self, block: Block, diagonal: Tensor) -> Tensor:
        """The largest diagonal of U^T U seen so far, by parameter."""
        seen = [
            torch.maximum(self.state[p]["mass"], own) if "mass" in self.state.get(p, {}) else own
            for p, own in zip(block.params, block.unpack(diagonal), strict=True)
        ]
        # They become state once the step is through: an exception on the way must leave no trace.
        self._masses.update(zip(block.params, (own.clone() for own in seen), strict=True))
        return block.pack(seen)

    def _again(self, terms: list[Term], closure: Callable[[], Any] | None) -> Callable[[], Tensor] | None:
        return self.ridge.tried(super()._again(terms, closure), self._params())

    def _trial(self, terms: list[Term], closure: Callable[[], Any] | None) -> Callable[[], Tensor] | None:
        """How a trial evaluates the loss; None if steps are taken untried."""
        if self.damping.control != "gain":
            return None
        again = self._again(terms, closure)
        if again is None:
            raise StepError(
                "The loss cannot be evaluated again: the criterion did not get the model's output itself, or "
                "none was given; pass step() a closure, or use damping=Damping(control='slope')."
            )
        return again
