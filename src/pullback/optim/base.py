"""The step all optimizers share: gather, solve, scale, try, keep or undo."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pullback.curvature import Block, Gradient, Group, Linearisation
from pullback.errors import CoverageError, StepError
from pullback.metric import OutputMetric, Sampled, resolve
from pullback.optim.coverage import report
from pullback.optim.damping import DampingControl
from pullback.optim.options import Damping
from pullback.optim.record import Coverage, StepRecord
from pullback.optim.search import Clock, Search
from pullback.tape import ClosureReplay, Tape, Term, as_loss, replay, replayable

Partition = Literal["layerwise", "global"]


class PullbackOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that solve in a pulled-back metric.

    Args:
        model: the model; its parameters are optimised and its calls observed.
        criterion: the loss module used in the loop; None for a functional loss, which then needs
            ``metric`` and a closure.
        metric: overrides the metric the criterion resolves to.
        partition: ``"layerwise"`` (every module for itself) or ``"global"`` (all jointly).
        damping: how mu is chosen.
        lr: factor on the step; 1 is the minimiser of the quadratic model.
        sweep: ``"auto"``, ``"loop"``, ``"vmap"`` or ``"fold"``: how factor columns are pulled back.
            ``"auto"`` chooses by time, so that two runs may differ in rounding; name one for bitwise
            reproducible runs.
        params: parameters or groups to optimise; default all of the model's.

    Attributes:
        last: record of the last step, None before.
        coverage: how each parameter is treated; print it.

    Raises:
        MetricError: if no metric is known for the criterion.
        TypeError, ValueError: if an option is not of its kind.
    """

    _partition: Partition = "layerwise"

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None,
        *,
        metric: OutputMetric | None = None,
        partition: Partition | None = None,
        damping: Damping | None = None,
        momentum: None = None,
        lr: float = 1.0,
        sweep: str = "auto",
        params: Iterable[Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{type(self).__name__} takes the model itself (an nn.Module), got {type(model).__name__}; "
                "write it as (model, criterion)."
            )
        if damping is not None and not isinstance(damping, Damping):
            raise TypeError(f"damping must be Damping(...), got {damping!r}; write Damping(initial={damping!r}).")
        if momentum is not None:
            raise TypeError(f"momentum={momentum!r} is not supported yet; leave it None.")
        if not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be finite and at least 0, got {lr}.")
        partition = partition or self._partition
        if partition not in ("layerwise", "global"):
            raise ValueError(f"partition must be 'layerwise' or 'global', got {partition!r}.")
        self.metric = resolve(criterion, metric)
        super().__init__(list(model.parameters()) if params is None else params, {"lr": lr})
        self.model = model
        self.criterion = criterion
        self.partition = partition
        self.damping = damping or Damping()
        self.last: StepRecord | None = None
        self._control = DampingControl(self.damping)
        self._tape = Tape(model, criterion, self.metric, sweep)
        self._blocks: list[Block] = []

    # -- the face ---------------------------------------------------------------------------------------

    @property
    def coverage(self) -> Coverage:
        """How every parameter is treated, as observed in the last step."""
        return report(self.model, self._blocks, self._tape)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and the terms of the metric that came with them."""
        super().zero_grad(set_to_none)
        self._tape.clear()

    def close(self) -> None:
        """Remove the hooks from model and criterion. Happens by itself when the optimizer is collected."""
        self._tape.close()

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
        loss = None if closure is None else self._run(closure)
        terms, finite = self._tape.terms, self._tape.finite
        self._tape.clear()
        if not finite:
            raise StepError("The loss or its gradient is not finite; no step was taken. Look for bad data.")
        if not terms:
            raise StepError(self._why_empty())
        before = loss if loss is not None else _loss_of(terms)
        value = math.nan if before is None else float(before)
        if before is not None and not math.isfinite(value):
            raise StepError(f"The loss is {value}; no step was taken. Look for bad data or too large weights.")
        with torch.no_grad(), self._tape.recorder.paused():
            self._step(terms, value, closure)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State to resume from: torch's own, the damping, the random stream of a sampled metric."""
        out = super().state_dict()
        out["pullback"] = {"damping": self._control.state(self._order())}
        if isinstance(self.metric, Sampled):
            out["pullback"]["generator"] = self.metric.state()
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        state_dict = dict(state_dict)
        own = state_dict.pop("pullback", {})
        super().load_state_dict(state_dict)
        if "damping" in own:
            self._control.load(own["damping"], self._order())
        if isinstance(self.metric, Sampled):
            self.metric.load_state(own.get("generator"))

    def _order(self) -> list[int]:
        return [id(p) for group in self.param_groups for p in group["params"]]

    # -- closure ----------------------------------------------------------------------------------------

    def _run(self, closure: Callable[[], Any]) -> Tensor:
        self._tape.clear()
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad():
            for p in params:
                p.grad = None
            value = closure()
            loss = as_loss(value)
            if not self._tape.terms and value.requires_grad:
                value.backward()
        return loss

    def _why_empty(self) -> str:
        called = any(p.grad is not None for group in self.param_groups for p in group["params"])
        if called and self.criterion is not None:
            name = type(self.criterion).__name__
            return (
                f"No backward pass went through the {name} given to {type(self).__name__} since the last step; "
                "call that very module on the model's output, or pass criterion=None and metric=..."
            )
        return "step() without a backward pass since the last step; call loss.backward() first."

    # -- one step ---------------------------------------------------------------------------------------

    def _step(self, terms: list[Term], loss: float, closure: Callable[[], Any] | None) -> None:
        clock = Clock()
        clock.add("sweep", sum(term.seconds for term in terms))
        lin = Linearisation(terms)
        rates = self._rates(lin.blocks)
        self._blocks = lin.blocks
        groups = self._groups(lin)
        whole = lin.gradient(lin.blocks)
        trace = float(sum((group.trace() for group in groups), start=lin.e0.new_zeros(())))
        if not (math.isfinite(trace) and all(math.isfinite(float(g @ g)) for g in whole.g)):
            raise StepError("A gradient or the metric is not finite; no step was taken.")
        unit = trace / max(1, lin.R)
        grads = {id(p): p.grad for block in lin.blocks for p in block.params if p.grad is not None}
        self._control.start(unit, loss, grads, lin.e0.dtype)
        clock.mark("curvature")
        self.last = Search(
            lin=lin,
            groups=groups,
            split=_by_group(groups, lin.blocks, whole),
            control=self._control,
            rates=rates,
            loss=loss,
            unit=unit,
            trial=self._trial(terms, closure),
            whole=closure is not None,
            clock=clock,
        ).run()

    # -- parts ------------------------------------------------------------------------------------------

    def _groups(self, lin: Linearisation) -> list[Group]:
        if self.partition == "global":
            return [Group(lin.blocks)]
        return [Group([block]) for block in lin.blocks]

    def _rates(self, blocks: Sequence[Block]) -> dict[int, float]:
        """Learning rate by parameter; refuses gradients the tape cannot account for."""
        rates = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        seen = {id(p) for block in blocks for p in block.params}
        names = self._tape.names.full
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.requires_grad and id(p) not in seen:
                    raise CoverageError(
                        f"Parameter '{names.get(id(p), '?')}' has a gradient, but the loss that was taped does "
                        "not depend on it; add its term to a closure's loss or freeze it."
                    )
        for key in seen - rates.keys():
            raise CoverageError(
                f"Parameter '{names[key]}' is trained but is not in this optimizer's params; freeze it with "
                "requires_grad_(False)."
            )
        return rates

    def _trial(self, terms: list[Term], closure: Callable[[], Any] | None) -> Callable[[], Tensor] | None:
        if self.damping.control != "gain":
            return None
        if closure is not None:
            return ClosureReplay(self.model, closure)
        if not replayable(terms):
            raise StepError(
                "The loss cannot be evaluated again: the criterion did not get the model's output itself, or "
                "none was given; pass step() a closure, or use damping=Damping(control='slope')."
            )
        return lambda: replay(self.model, terms)


def _loss_of(terms: Sequence[Term]) -> Tensor | None:
    values = [term.use.weighted(term.use.value) for term in terms if term.use.value is not None]
    return torch.stack(values).sum() if len(values) == len(terms) else None


def _by_group(groups: Sequence[Group], blocks: Sequence[Block], whole: Gradient) -> list[Gradient]:
    index = {id(block): k for k, block in enumerate(blocks)}
    out = []
    for group in groups:
        own = [index[id(block)] for block in group.blocks]
        rest = None if whole.rest is None else [whole.rest[k] for k in own]
        out.append(Gradient([whole.g[k] for k in own], whole.e0, rest))
    return out
