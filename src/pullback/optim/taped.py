"""What all optimizers with a tape share: the loop around a step, closures, scaled losses, state."""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pullback.errors import CoverageError, SolverError, StepError
from pullback.manifolds import Manifold, edition, manifolds_of, refuse_manifolds
from pullback.metric import Criteria, Heads, Metrics, OutputMetric, Sampled
from pullback.optim.checks import check_weights
from pullback.optim.coverage import Treated, report
from pullback.optim.fallback import Fallback
from pullback.optim.record import Coverage, StepRecord
from pullback.optim.scaling import Scaling
from pullback.optim.undone import Guarded
from pullback.tape import (
    ClosureReplay,
    Region,
    Tape,
    Term,
    Wiring,
    as_loss,
    region_of,
    replay,
    replayable,
    without_autocast,
)


class Taped(Guarded, torch.optim.Optimizer):
    """An optimizer that reads the linearisation of a model off the user's own backward pass.

    A subclass says in :meth:`_advance` what it does with it.

    Args:
        model: the model.
        criterion: the loss module, several of them, or None.
        metric: overrides the metric the criterion resolves to.
        memory: bytes that the pulled-back factors of a step may take.
        lr: factor on the step.
        weight_decay: decoupled decay per step, times lr.
        sweep: how factor columns are pulled back.
        batch_norm: ``"refuse"`` or ``"frozen"``.
        fallback: makes an optimizer for parameters that cannot be given rows.
        grad_scaler: the scaler, if its ``unscale_`` is called before its ``step``.
        params: parameters or groups to optimise; default all of the model's.

    Attributes:
        last: record of the last step, None before.
        losses: every criterion with its metric.
    """

    _wiring: Wiring = "none"
    #: the kind of tape
    _taping: type[Tape] = Tape
    #: tells torch.amp.GradScaler to hand its scale over with the step
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        criterion: Criteria,
        *,
        metric: Metrics,
        memory: float | None,
        lr: float,
        weight_decay: float,
        sweep: str,
        batch_norm: str,
        fallback: Callable[[list[Tensor]], torch.optim.Optimizer] | None,
        grad_scaler: torch.amp.GradScaler | None,
        params: Iterable[Any] | None,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(list(model.parameters()) if params is None else params, defaults)
        check_weights(p for group in self.param_groups for p in group["params"])
        self.model = model
        self.criterion = criterion
        self.grad_scaler = grad_scaler
        self.batch_norm = batch_norm
        self.memory = memory
        self.last: StepRecord | None = None
        self._fallback = None if fallback is None else Fallback(fallback)
        self._tape = self._taping(
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
        self._closed = False
        self._rng: Tensor | None = None
        self._autocast: Region | None = None
        self._first_root = 0
        self._held: Mapping[int, Manifold] = {}
        self._begin_guard(model, self._tape.recorder)
        self._hold()

    @abstractmethod
    def _advance(self, terms: list[Term], loss: float, finite: bool, closure: Callable[[], Any] | None) -> None:
        """Move the weights.

        Args:
            terms: the uses of the loss that were swept since the last step.
            loss: their loss, nan where it is not known.
            finite: False if a use could not be swept because its numbers are not finite.
            closure: what computes the loss, if the user gave it.
        """

    def _idle(self) -> bool:
        """Whether this step needs no linearisation."""
        return False

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
        if self._guard is not None:
            self._guard.clear()
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
            SolverError: if an equation in the model has no solution. See :meth:`undo`; with a closure, that is done
                here, and the closure run again.
        """
        while True:
            try:
                return self._once(closure)
            except SolverError as error:
                if closure is None or not self.undo(error):
                    raise

    def _once(self, closure: Callable[[], Any] | None) -> Tensor | None:
        scaling = self._scaling(closure)
        loss = None if closure is None else self._run(closure)
        terms, finite = self._tape.terms, self._tape.finite
        self._tape.clear()
        if scaling is not None and scaling.overflow:
            return None
        if finite and not terms and not self._idle():
            raise StepError(self._why_empty())
        if scaling is not None:
            scaling.undo(terms, self._params())
        before = loss if loss is not None else (_loss_of(terms) if terms else None)
        value = math.nan if before is None or not finite else float(before)
        finite = finite and (before is None or math.isfinite(value))
        device = self.param_groups[0]["params"][0].device.type
        if self._edition != edition():
            self._hold()
        with torch.no_grad(), self._tape.recorder.paused(), without_autocast(device), self._guarded():
            self._advance(terms, value, finite, closure)
        if torch.is_autocast_enabled(device):
            torch.clear_autocast_cache()  # it holds casts of the old weights
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State to resume from: torch's own, ours, the random stream of a sampled metric."""
        out = super().state_dict()
        out["pullback"] = self._state()
        if self._guard is not None:
            out["pullback"] |= self._guard.saved()
        out["pullback"]["generators"] = [m.state() for m in self._sketches()]
        if self._fallback is not None:
            out["pullback"]["fallback"] = self._fallback.state(self._order())
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        state_dict = dict(state_dict)
        own = state_dict.pop("pullback", {})
        if self._guard is not None:
            self._guard.load(own)
        super().load_state_dict(state_dict)
        self._load(own)
        for sketch, state in zip(self._sketches(), own.get("generators", ()), strict=False):
            sketch.load_state(state)
        if self._fallback is not None and "fallback" in own:
            self._fallback.load(own["fallback"], [p for group in self.param_groups for p in group["params"]])

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What a subclass needs beyond torch's own state to resume."""

    @abstractmethod
    def _load(self, own: dict[str, Any]) -> None:
        """Take up :meth:`_state`; entries may be missing."""

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

    # -- parameters on manifolds -------------------------------------------------------------------------

    def _hold(self) -> None:
        """Look which parameters live on manifolds, now and after every declaration."""
        self._edition = edition()
        own = set(self._order())
        self._accept({key: manifold for key, manifold in manifolds_of(self.model).items() if key in own})

    def _accept(self, held: Mapping[int, Manifold]) -> None:
        """Take notice of them, or refuse.

        Args:
            held: manifolds by id of the parameter.
        """
        if held:
            refuse_manifolds(type(self).__name__, self.model, set(held))

    # -- closure ----------------------------------------------------------------------------------------

    def _run(self, closure: Callable[[], Any]) -> Tensor:
        self._tape.clear()
        params = self._params()
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

    # -- parts ------------------------------------------------------------------------------------------

    def _strays(self, seen: set[int]) -> list[Tensor]:
        """Parameters with a gradient but without rows: the fallback's, or an error."""
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

    def _again(self, terms: list[Term], closure: Callable[[], Any] | None) -> Callable[[], Tensor] | None:
        """Runs model and loss again at the present weights; None if the loss cannot be had without a closure."""
        if closure is not None:
            return ClosureReplay(self.model, closure, self._rng, self._autocast)
        return (lambda: replay(self.model, terms)) if replayable(terms) else None


def _ids_of(owner: weakref.ref[Taped]) -> Callable[[], set[int]]:
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
