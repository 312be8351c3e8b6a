"""The step all optimizers share: gather, solve, scale, try, keep or undo."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pullback.curvature import (
    SOLVERS,
    Block,
    Linearisation,
    Mass,
    Partition,
    Space,
    Workspace,
    check_mass,
    check_partition,
)
from pullback.errors import CoverageError, StepError
from pullback.metric import Criteria, Heads, Metrics, OutputMetric, Sampled
from pullback.optim.attempt import OpenLoop, Policy
from pullback.optim.coverage import Treated, report
from pullback.optim.damping import AMPLE, DampingControl
from pullback.optim.fallback import Fallback
from pullback.optim.options import Damping, Momentum
from pullback.optim.record import Coverage, StepRecord
from pullback.optim.scaling import Scaling
from pullback.optim.search import Clock, Search
from pullback.optim.system import System
from pullback.optim.undo import take_back, untouched
from pullback.tape import (
    ClosureReplay,
    Region,
    Tape,
    Term,
    Wiring,
    as_loss,
    inputs_finite,
    region_of,
    replay,
    replayable,
    without_autocast,
)


class PullbackOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that solve in a pulled-back metric.

    Args:
        model: the model; its parameters are optimised and its calls observed.
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
        TypeError, ValueError: if an option is not of its kind.
    """

    _partition: Partition = "layerwise"
    _wiring: Wiring = "none"
    #: the damping where none is given
    default_damping = Damping()
    #: tells torch.amp.GradScaler to hand its scale over with the step
    _step_supports_amp_scaling = True

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
        sweep: str = "auto",
        batch_norm: str = "refuse",
        fallback: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        params: Iterable[Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{type(self).__name__} takes the model itself (an nn.Module), got {type(model).__name__}; "
                "write it as (model, criterion)."
            )
        if damping is not None and not isinstance(damping, Damping):
            raise TypeError(f"damping must be Damping(...), got {damping!r}; write Damping(initial={damping!r}).")
        if momentum is not None and not isinstance(momentum, Momentum):
            raise TypeError(f"momentum must be Momentum(...), got {momentum!r}; write Momentum() for the model's own.")
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be finite and at least 0, got {value}.")
        if solver not in ("auto", *SOLVERS):
            raise ValueError(f"solver must be 'auto' or one of {', '.join(SOLVERS)}, got {solver!r}.")
        if memory is not None and not memory > 0:
            raise ValueError(f"memory must be a positive number of bytes, got {memory}.")
        self.partition = check_partition(self._partition if partition is None else partition)
        self.mass = check_mass(mass)
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(list(model.parameters()) if params is None else params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype not in (torch.float32, torch.float64) or p.is_meta:
                    raise TypeError(
                        f"A parameter is {'on the meta device' if p.is_meta else f'of dtype {p.dtype}'}; metrics need "
                        "float32 or float64 weights (half precision: keep float32 weights and use torch.autocast)."
                    )
        self.model = model
        self.criterion = criterion
        self.damping = damping or self.default_damping
        self.momentum = momentum
        self.grad_scaler = grad_scaler
        self.solver = solver
        self.batch_norm = batch_norm
        self.memory = memory
        self.last: StepRecord | None = None
        self._control = DampingControl(self.damping)
        self._fallback = None if fallback is None else Fallback(fallback)
        self._tape = Tape(
            model,
            criterion,
            metric,
            sweep,
            batch_norm=batch_norm,
            mine=_ids_of(weakref.ref(self)),
            lenient=fallback is not None,
            wiring=self._wiring,
            memory=memory,
        )
        self.losses = self._tape.losses
        self._treated: list[Treated] = []
        self._workspace = Workspace()
        self._masses: dict[Tensor, Tensor] = {}
        self._closed = False
        self._rng: Tensor | None = None
        self._autocast: Region | None = None
        self._first_root = 0

    # -- the face ---------------------------------------------------------------------------------------

    @property
    def metric(self) -> OutputMetric | Heads:
        """The output metric in use, or those of several criteria."""
        return self._tape.metric

    @property
    def coverage(self) -> Coverage:
        """How every parameter is treated, as observed in the last step."""
        return report(self.model, self._treated, self._tape, self._fallback, self._order())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and the terms of the metric that came with them."""
        super().zero_grad(set_to_none)
        self._tape.clear()

    def close(self) -> None:
        """Remove the hooks from model and criterion. Happens by itself when the optimizer is collected."""
        self._closed = True
        self._tape.close()
        self._workspace.clear()
        self._treated = []

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step.

        Without a closure, ``backward`` must have been called on a loss of the criterion since the last step.
        A closure computes the loss (calling ``backward`` or not); it is run again for trial losses.

        Args:
            closure: returns the loss as a scalar tensor.

        Returns:
            The closure's loss before the step, or None without a closure.

        Raises:
            StepError: if there is nothing to step on, or the loss or a gradient is not finite. Weights are
                then as they were.
            CoverageError: if a parameter has a gradient that the tape cannot account for.
        """
        scaling = self._scaling(closure)
        loss = None if closure is None else self._run(closure)
        terms, finite = self._tape.terms, self._tape.finite
        self._tape.clear()
        if scaling is not None and scaling.overflow:
            return None
        if finite and not terms:
            raise StepError(self._why_empty())
        if scaling is not None:
            scaling.undo(terms, [p for group in self.param_groups for p in group["params"]])
        before = loss if loss is not None else (_loss_of(terms) if terms else None)
        value = math.nan if before is None or not finite else float(before)
        state = self._control.copy()
        device = self.param_groups[0]["params"][0].device.type
        with torch.no_grad(), self._tape.recorder.paused(), without_autocast(device):
            # The loss is asked first: it is at hand, the rest reads every input and every weight.
            overshot = bool(terms) and self._control.overshot(value)
            if overshot and inputs_finite(terms) and untouched(self.param_groups, self._control):
                self._take_back(value)
                return loss
            if not finite or (before is not None and not math.isfinite(value)):
                raise StepError(f"The loss is {value}: no step was taken. Look for bad data or too large weights.")
            try:
                self._step(terms, value, closure)
            except BaseException:
                self._control = state
                self._masses.clear()
                raise
        if torch.is_autocast_enabled(device):
            torch.clear_autocast_cache()  # it holds casts of the old weights
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State to resume from: torch's own, the damping, the random stream of a sampled metric."""
        out = super().state_dict()
        out["pullback"] = {"damping": self._control.state(self._order())}
        out["pullback"]["generators"] = [m.state() for m in self._sketches()]
        if self._fallback is not None:
            out["pullback"]["fallback"] = self._fallback.state(self._order())
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        state_dict = dict(state_dict)
        own = state_dict.pop("pullback", {})
        super().load_state_dict(state_dict)
        if "damping" in own:
            self._control.load(own["damping"], self._order())
        for sketch, state in zip(self._sketches(), own.get("generators", ()), strict=False):
            sketch.load_state(state)
        if self._fallback is not None and "fallback" in own:
            self._fallback.load(own["fallback"], [p for group in self.param_groups for p in group["params"]])

    def _gradients(self) -> dict[int, Tensor]:
        return {id(p): p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}

    def _sketches(self) -> list[Sampled]:
        return [metric for _, metric in self.losses if isinstance(metric, Sampled)]

    def _order(self) -> list[int]:
        return [id(p) for group in self.param_groups for p in group["params"]]

    def _scaling(self, closure: Callable[[], Any] | None) -> Scaling | None:
        """What a torch.amp.GradScaler has left for this step, if one is in use."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is None and found_inf is None:
            return None
        if closure is not None:
            raise StepError("scaler.step(opt, closure) cannot unscale inside a closure; use the loop without one.")
        return Scaling.of(scale, found_inf, self.grad_scaler)

    # -- closure ----------------------------------------------------------------------------------------

    def _run(self, closure: Callable[[], Any]) -> Tensor:
        self._tape.clear()
        params = [p for group in self.param_groups for p in group["params"]]
        self._rng = torch.get_rng_state()
        self._autocast = region_of(params[0].device.type)
        self._first_root = self._tape.recorder.roots
        with torch.enable_grad():
            for p in params:
                p.grad = None
            value = closure()
            loss = as_loss(value)
            unswept = not self._tape.terms and self._tape.finite
            if unswept and not self._gradients() and value.requires_grad:
                value.backward()
        return loss

    def _why_empty(self) -> str:
        if self._closed:
            return f"This {type(self).__name__} was closed, its hooks are gone; make a new one to go on."
        if self._gradients() and self.losses[0][0] is not None:
            name = " or ".join(type(criterion).__name__ for criterion, _ in self.losses)
            return (
                f"No backward pass went through the {name} given to {type(self).__name__} since the last step: call "
                "loss.backward() before each step, on a loss computed by that very module (or pass criterion=None and "
                "metric=...)."
            )
        return "step() without a backward pass since the last step; call loss.backward() first."

    # -- one step ---------------------------------------------------------------------------------------

    def _step(self, terms: list[Term], loss: float, closure: Callable[[], Any] | None) -> None:
        clock = Clock()
        clock.add("sweep", sum(term.seconds for term in terms))
        lin = Linearisation(terms)
        policy = self._policy(lin, closure, loss, clock)
        strays = self._strays(lin.blocks)
        ample = AMPLE * sum(block.n for block in lin.blocks) <= lin.R
        self._control.start(policy.unit, loss, self._gradients(), lin.e0.dtype, ample)
        clock.mark("curvature")
        self.last = Search(policy, self._control, loss, self.damping.control == "gain", clock).run()
        self._finish(policy.params)
        if self._fallback is not None and strays:
            self._fallback.step(strays)

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

    # -- parts ------------------------------------------------------------------------------------------

    def _strays(self, blocks: Sequence[Block]) -> list[Tensor]:
        """Parameters with a gradient but without rows: the fallback's, or an error."""
        seen = {id(p) for block in blocks for p in block.params}
        names = self._tape.names.full
        strays = [
            p
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and p.requires_grad and id(p) not in seen
        ]
        if strays and self._fallback is None:
            raise CoverageError(
                f"Parameter '{names.get(id(strays[0]), '?')}' has a gradient, but the loss that was taped does not "
                "depend on it; freeze it, or name an optimizer for it with fallback=..."
            )
        return strays

    def _trial(self, terms: list[Term], closure: Callable[[], Any] | None) -> Callable[[], Tensor] | None:
        if self.damping.control != "gain":
            return None
        if closure is not None:
            return ClosureReplay(self.model, closure, self._rng, self._autocast)
        if not replayable(terms):
            raise StepError(
                "The loss cannot be evaluated again: the criterion did not get the model's output itself, or "
                "none was given; pass step() a closure, or use damping=Damping(control='slope')."
            )
        return lambda: replay(self.model, terms)


def _ids_of(owner: weakref.ref[PullbackOptimizer]) -> Callable[[], set[int]]:
    """Ids of an optimizer's parameters, without keeping it alive."""

    def ids() -> set[int]:
        found = owner()
        return set() if found is None else set(found._order())

    return ids


def _loss_of(terms: Sequence[Term]) -> Tensor | None:
    values = [term.use.weighted(term.use.value) for term in terms if term.use.value is not None]
    if len(values) != len(terms):
        return None
    return values[0] if len(values) == 1 else torch.stack(values).sum()
