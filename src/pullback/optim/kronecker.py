"""Layerwise metrics in Kronecker form, amortised over mini-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pullback.curvature import Averaged, Averages, Form, Shared
from pullback.errors import StepError
from pullback.metric import Criteria, Empirical, Metrics, OutputMetric, Sampled
from pullback.optim.checks import check_model, check_rates
from pullback.optim.coverage import Treated
from pullback.optim.record import StepRecord
from pullback.optim.stride import Steps, Stride
from pullback.optim.taped import Taped
from pullback.optim.trust import Refresh, Trust
from pullback.tape import Term

Columns = Literal["sampled", "exact", "empirical"]


class Kronecker(Taped):
    r"""K-FAC and EKFAC from the pulled-back metric: for mini-batches and layers too large for the exact one.

    .. math:: d_l = (\bar A_l + \sqrt\delta\,\bar a_l I)^{-1} \otimes (\bar B_l + \sqrt\delta\,\bar b_l I)^{-1}\, g_l,
       \qquad v \leftarrow \beta v + (1-\beta)\,\nu d, \qquad w \leftarrow w - \eta v

    The two second moments of every layer are averaged over the batches at which the metric is looked at (Martens &
    Grosse 2015 for dense layers, Grosse & Martens 2016 for convolutions, George et al. 2018 for ``"ekfac"``; theory
    4). In between nothing is taped, and a step costs about as much as one of Adam. The length :math:`\nu` follows the
    agreement of successive gradients (:class:`~pullback.optim.trust.Trust`), so that there is no learning rate to
    search: ``lr=1``.

    Args:
        model: the model; its parameters are optimised and its calls observed.
        criterion: the loss module used in the loop; several in a list or dict, or None with ``metric``.
        metric: overrides the metric the criterion resolves to, and ``columns``.
        columns: of what the metric is made: ``"sampled"`` one random column per sample, unbiased; ``"exact"`` all of
            them; ``"empirical"`` the gradient of each sample itself, which is a different and often poorer metric.
        form: ``"kfac"``, or ``"ekfac"``: the diagonal in the eigenbasis of both sides is averaged by itself.
        shared: what the positions of a sequence or image are taken for: ``"expand"`` as if they were samples,
            ``"reduce"`` summed up per sample.
        refresh: when the metric is looked at.
        damping: delta, relative to the mean of each layer's metric.
        trust: how long a step may be; None takes ``lr`` times the whole direction.
        momentum: beta.
        decay: share of the average that is kept at a look, at most.
        memory: bytes that pulled-back factors may take.
        lr: factor eta on the step, for schedules.
        weight_decay: decoupled: weights are multiplied by ``1 - lr * weight_decay`` at every step.
        batch_norm: ``"frozen"``, or ``"refuse"`` a BatchNorm that uses batch statistics.
        fallback: makes an optimizer for parameters that cannot be given rows.
        grad_scaler: needed only if ``scaler.unscale_(opt)`` is called before ``scaler.step(opt)``.
        params: parameters or groups to optimise; default all of the model's.
        seed: of the random columns.

    Attributes:
        last: record of the last step, None before; its ``scale`` is nu.
        coverage: how each parameter is treated; print it.

    Raises:
        MetricError: if no metric is known for the criterion.
        TypeError, ValueError: if an option is not of its kind.

    Example:
        >>> import torch, pullback
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> criterion = nn.CrossEntropyLoss()
        >>> opt = pullback.Kronecker(model, criterion)
        >>> x = torch.randn(64, 3)
        >>> y = (x.sum(1) > 0).long()
        >>> for _ in range(30):
        ...     opt.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     _ = opt.step()
        >>> bool(loss < 0.1)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criteria,
        *,
        metric: Metrics = None,
        columns: Columns = "sampled",
        form: Form = "kfac",
        shared: Shared = "expand",
        refresh: Refresh | None = None,
        damping: float = 0.1,
        trust: Trust | None = Trust(),  # noqa: B008  # frozen
        momentum: float = 0.9,
        decay: float = 0.95,
        memory: float | None = None,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        batch_norm: str = "frozen",
        fallback: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        params: Iterable[Any] | None = None,
        seed: int = 0,
    ) -> None:
        name = type(self).__name__
        check_model(name, model)
        check_rates(damping=damping, lr=lr, weight_decay=weight_decay)
        if not damping > 0:
            raise ValueError(f"damping must be positive, got {damping}; 0.1 is the default.")
        for key, value in (("momentum", momentum), ("decay", decay)):
            if not 0 <= value < 1:
                raise ValueError(f"{key} must be at least 0 and below 1, got {value}.")
        if columns not in get_args(Columns):
            raise ValueError(f"columns must be 'sampled', 'exact' or 'empirical', got {columns!r}.")
        if metric is None and columns == "sampled":
            metric = sketches(criterion, lambda: Sampled(m=1, seed=seed))
        elif metric is None and columns == "empirical":
            metric = sketches(criterion, Empirical)
        super().__init__(
            model,
            criterion,
            metric=metric,
            memory=memory,
            lr=lr,
            weight_decay=weight_decay,
            sweep="loop",
            batch_norm=batch_norm,
            fallback=fallback,
            grad_scaler=grad_scaler,
            params=params,
        )
        self.schedule = refresh or Refresh()
        self.momentum = momentum
        self._averages = Averages(form, shared, damping, decay, self.schedule.basis)
        self._stride = Stride(trust)
        self._count = self._next = 0

    # -- the face ---------------------------------------------------------------------------------------

    @property
    def blocks(self) -> tuple[Averaged, ...]:
        """The running metric of every layer seen so far."""
        return tuple(self._averages.blocks)

    def refresh(self) -> None:
        """Look at the metric in the next backward pass, whatever the schedule says."""
        self._next = self._count
        self._tape.recorder.enabled = True

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step; see :meth:`pullback.optim.taped.Taped.step`."""
        out = super().step(closure)
        self._tape.recorder.enabled = not self._idle()
        return out

    def close(self) -> None:
        """Remove the hooks from model and criterion. Happens by itself when the optimizer is collected."""
        super().close()
        self._averages.clear()
        self._stride.clear()

    def _idle(self) -> bool:
        return bool(self._averages.blocks) and self._count < self._next

    # -- one step ---------------------------------------------------------------------------------------

    def _advance(self, terms: list[Term], loss: float, finite: bool, closure: Callable[[], Any] | None) -> None:
        if not finite:
            raise StepError(f"The loss is {loss}: no step was taken. Look for bad data or too large weights.")
        if terms:
            self._averages.follow(terms)
            self._treated = [Treated(block.params, block.rule) for block in self._averages.blocks]
            self._next = self.schedule.after(self._count)
            self._stride.begin(loss)
        strays = self._unseen(bool(terms))
        self._move(loss, bool(terms))
        self._count += 1
        if strays and self._fallback is not None:
            self._fallback.step(strays)

    def _unseen(self, looked: bool) -> list[Tensor]:
        """Parameters with a gradient and no metric: the fallback's, an error, or waiting for the next look."""
        seen = {id(p) for block in self._averages.blocks for p in block.params}
        if looked:
            return self._strays(seen)
        own = self._fallback.ids() if self._fallback is not None else set()
        rest = [p for key, p in self._with_gradient().items() if key not in seen]
        if any(id(p) not in own for p in rest):
            self._next = self._count + 1
        return [p for p in rest if id(p) in own]

    def _with_gradient(self) -> dict[int, Tensor]:
        return {id(p): p for group in self.param_groups for p in group["params"] if p.grad is not None}

    def _move(self, loss: float, looked: bool) -> None:
        """Direction, length, momentum, weights; one number is read before anything is changed."""
        before = self._before()
        blocks, grads = [], []
        for block in self._averages.blocks:
            own = [p.grad for p in block.params]
            if all(g is None for g in own):
                continue
            full = [torch.zeros_like(p) if g is None else g for p, g in zip(block.params, own, strict=True)]
            blocks.append(block)
            grads.append(block.gathered(full))
        directions = [block.solve(G) for block, G in zip(blocks, grads, strict=True)]
        if looked:
            self._stride.look()
        steps = self._stride.of(blocks, grads, directions)
        self._moves(before)
        self._apply(blocks, steps)
        spaces = tuple(block.describe() for block in blocks) if looked else ()
        self.last = StepRecord(
            loss=loss, predicted=steps.scale * steps.slope, actual=None, accepted=True, mu=self._averages.damping,
            scale=steps.scale, rank=0, trials=1, spaces=spaces, note="refresh" if looked else "",
        )  # fmt: skip

    def _apply(self, blocks: Sequence[Averaged], steps: Steps) -> None:
        velocity = [block.velocity_like(D) for block, D in zip(blocks, steps.parts, strict=True)]
        if velocity:
            torch._foreach_mul_(velocity, self.momentum)
            torch._foreach_add_(velocity, list(steps.parts), alpha=(1 - self.momentum) * steps.scale)
        moves = {
            id(p): view
            for block, v in zip(blocks, velocity, strict=True)
            for p, view in zip(block.params, block.parted(v), strict=True)
        }
        for group in self.param_groups:
            params = [p for p in group["params"] if id(p) in moves]
            if not params:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, [moves[id(p)] for p in params], alpha=-group["lr"])

    def _keep_state(self) -> object:
        """Velocity and stride; what a look has averaged is of weights that were solved for, and stays."""
        velocity = {block: None if block.velocity is None else block.velocity.clone() for block in self.blocks}
        return velocity, self._stride.keep()

    def _put_back(self, kept: object) -> None:
        """See the base class."""
        assert isinstance(kept, tuple)
        velocity, stride = kept
        for block in self.blocks:
            block.velocity = velocity.get(block)
        agreement = self._stride.agreement
        first = None if agreement is None else agreement.first
        self._stride.put_back(stride)
        if agreement is not None:
            agreement.first = first

    # -- resuming ---------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        place = {key: k for k, key in enumerate(self._order())}
        own: dict[str, Any] = {"count": self._count, "next": self._next}
        own["blocks"] = [
            {
                "params": [place[id(p)] for p in block.params],
                "average": block.state(),
                "velocity": block.velocity,
                **self._stride.state(block),
            }
            for block in self._averages.blocks
        ]
        if self._stride.agreement is not None:
            own["agreement"] = self._stride.agreement.state()
        return own

    def _load(self, own: dict[str, Any]) -> None:
        if "blocks" not in own:
            return
        params = [p for group in self.param_groups for p in group["params"]]
        self._count, self._next = own["count"], own["next"]
        self._averages.clear()
        self._stride.clear()
        for entry in own["blocks"]:
            block = self._averages.restore([params[k] for k in entry["params"]], entry["average"])
            block.velocity = None if entry["velocity"] is None else entry["velocity"].clone()
            self._stride.load(block, entry)
        if self._stride.agreement is not None and "agreement" in own:
            self._stride.agreement.load(own["agreement"])
        self._tape.recorder.enabled = not self._idle()


def sketches(criterion: Criteria, make: Callable[[], OutputMetric]) -> Metrics:
    """A sketch for every criterion, in the form in which those were given."""
    if isinstance(criterion, dict):
        return {key: make() for key in criterion}
    if isinstance(criterion, list | tuple):
        return [make() for _ in criterion]
    return make()
