"""OCNOpt: feedback of single samples on the curvature of an ordinary optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pullback.control import meanwise
from pullback.control.answering import Round
from pullback.control.forms import all_forms, formed
from pullback.control.host import Host, MakeHost, Raised, host_of
from pullback.control.realised import Course
from pullback.control.route import Route, key_of
from pullback.control.samplewise import Policy, recursion
from pullback.curvature.block import Block, blocks_of
from pullback.errors import StepError
from pullback.metric import Criteria, Metrics, Sampled
from pullback.optim.checks import check_model
from pullback.optim.counting import (
    Counting,
    all_finite,
    check_penalties,
    check_policies,
    check_roots,
    not_finite,
    too_far,
)
from pullback.optim.coverage import Treated
from pullback.optim.kronecker import sketches
from pullback.optim.kronecker_host import KroneckerHost, adapted
from pullback.optim.record import StepRecord
from pullback.optim.scaling import Scaling
from pullback.optim.taped import Taped
from pullback.optim.trust import Trust
from pullback.tape import ClosureReplay, Passage, Tape, Term, in_time, rerun
from pullback.tape.costates import CostateTape, CostateTerm


@dataclass(frozen=True)
class PolicyRecord(StepRecord):
    """One step of :class:`OCNOpt`.

    ``predicted`` is nan: no model of the loss is asked. ``mu`` is ``eps``, ``scale`` the share of the host's step that
    was taken.

    Attributes:
        clamped: eigenvalues of value functions clamped at 0, over all samples and stages.
    """

    clamped: int = 0


class OCNOpt(Taped):
    r"""An ordinary optimizer whose layers answer, sample by sample, to what the layers before them did.

    .. math:: u_l \leftarrow u_l + \tfrac1N \textstyle\sum_n (k_n + K_n (x_n^{new} - x_n)), \qquad
              k = -Q_{uu}^{-1} Q_u, \quad K = -Q_{uu}^{-1} Q_{ux}

    in a second forward pass (Liu, Chen & Theodorou, arXiv 2002.08809 and 2510.14168; formulas in
    :mod:`pullback.control.samplewise`). :math:`Q_{uu}` is the host's curvature, so that without feedback the host is
    left: with ``feedback=False`` this is torch's optimizer bit for bit. With feedback the host takes its own step on
    ``p.grad`` (momentum, weight decay, averages and a clipped gradient included), and what the policies add comes on
    top, with the same learning rate. A step that would change the predictions too much is shortened, host's share and
    policies' alike (``bound``). Parameter groups and state are the host's own: schedules reach both, and ``state_dict``
    holds what torch's would.

    Per-sample policies are an approximation for batches of more than one, where the answers are averaged.
    :class:`~pullback.FeedbackGaussNewton` is exact for the batch.

    Args:
        model: the model; its parameters are optimised and its calls observed.
        criterion: the loss module used in the loop; several in a list or dict (for ``form="mean"``), or None with a
            ``metric``.
        host: ``"sgd"``, ``"rmsprop"``, ``"adam"``, ``"kronecker"``; what makes a torch optimizer of these kinds or a
            :class:`~pullback.Kronecker` from parameters; or what makes a :class:`pullback.control.Host`.
        rank: columns of the output metric, drawn anew in every step; None for the exact factor. A
            :class:`~pullback.Kronecker` that is given has its own.
        feedback: False for the host alone.
        form: what a policy counts on: ``"mean"`` on what the mean over the batch does
            (:mod:`pullback.control.meanwise`), ``"positive"`` and ``"clamped"`` on its own answer, as if the sample
            were alone. A sample's curvature is the host's and its own factor, or in ``"clamped"`` the host's, and
            eigenvalues of value functions that would turn negative are set to 0 (``opt.last.clamped``).
        bound: for ``form="mean"``: how far the predictions may move in a step, squared and in the metric, in parts of
            the step that brings a least squares loss to 0 (that is, of twice the loss); longer steps are shortened.
            No weight changes by more than ``Trust().share(L)`` of itself, L the number of weights. None for neither
            bound. A loss that is not known or not positive does not bound predictions.
        eps: Tikhonov term, added to the curvature that the policies use; the host's own step stays as it is.
        metric: the output metric itself; with it ``rank`` has no meaning.
        seed: seed of the columns.
        lr: learning rate of a named host; None for torch's default.
        memory: bytes that pulled-back factors may take in a step; None for half of the machine's. Costates and their
            copies beside the factors come on top, r + 2 columns for the r of the factor, or up to 2^24 numbers of rows
            that are kept.
        sweep: how factor columns are pulled back: ``"auto"``, ``"loop"``, ``"vmap"`` or ``"fold"``.
        batch_norm: ``"refuse"`` BatchNorm on batch statistics, which would differ in the second pass.
        grad_scaler: see :class:`~pullback.optim.PullbackOptimizer`.
        params: parameters or groups; default all of the model's.
        **options: further options of a named host, as in ``momentum=0.9``.

    Attributes:
        last: record of the last step, None before and without feedback.
        host: the host.

    Raises:
        MetricError: if no metric is known for the criterion.
        TypeError, ValueError: if an option is not of its kind.

    Example:
        >>> import torch, pullback
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> criterion = nn.CrossEntropyLoss()
        >>> opt = pullback.OCNOpt(model, criterion, host="rmsprop", lr=1e-2)
        >>> x = torch.randn(16, 2)
        >>> y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        >>> for _ in range(40):
        ...     opt.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     _ = opt.step()
        >>> bool(loss < 0.5)
        True
    """

    _wiring = "all"

    def __init__(
        self,
        model: nn.Module,
        criterion: Criteria,
        *,
        host: str | MakeHost = "sgd",
        rank: int | None = 1,
        feedback: bool = True,
        form: Counting = "mean",
        bound: float | None = 0.1,
        eps: float = 0.0,
        metric: Metrics = None,
        seed: int = 0,
        lr: float | None = None,
        memory: float | None = None,
        sweep: str = "auto",
        batch_norm: str = "refuse",
        grad_scaler: torch.amp.GradScaler | None = None,
        params: Iterable[Any] | None = None,
        **options: Any,
    ) -> None:
        check_model(type(self).__name__, model)
        check_policies(criterion, rank, form, bound, eps, batch_norm)
        # Only a sample that counts on itself needs a gradient of its own.
        self._taping = Tape if form == "mean" else CostateTape
        if metric is None and rank is not None:
            metric = sketches(criterion, lambda: Sampled(m=rank, seed=seed))
        given = list(model.parameters() if params is None else params)
        self.host: Host
        if host == "kronecker":
            self.host = KroneckerHost.named(model, criterion, metric, given, lr, options)
        else:
            self.host = host_of(adapted(host), given, lr, options)
        self._kronecker = self.host if isinstance(self.host, KroneckerHost) else None
        if self._kronecker is not None:
            metric, sweep = self._kronecker.metric, "loop"  # as it has it, bit for bit
        inner = self.host.optimizer
        super().__init__(
            model,
            criterion,
            metric=metric,
            memory=memory,
            lr=float(inner.defaults["lr"]),
            weight_decay=float(inner.defaults.get("weight_decay", 0.0)),
            sweep=sweep,
            batch_norm=batch_norm,
            fallback=None,
            grad_scaler=grad_scaler,
            params=inner.param_groups,
        )
        self.defaults = inner.defaults
        self._share()
        self.form: Counting = form
        self.bound = math.inf if bound is None else float(bound)
        self._curvature = Raised(self.host, float(eps))
        self._routes: dict[object, Route] = {}
        self._scale = 1.0
        self.feedback = feedback

    @property
    def feedback(self) -> bool:
        """Whether policies answer; may be switched between steps, before the forward pass."""
        return self._feedback

    @feedback.setter
    def feedback(self, value: bool) -> None:
        self._feedback = bool(value)
        self._tape.recorder.enabled = not self._idle()

    @property
    def eps(self) -> float:
        """The Tikhonov term."""
        return self._curvature.eps

    # -- one step ---------------------------------------------------------------------------------------

    def _advance(self, terms: list[Term], loss: float, finite: bool, closure: Callable[[], Any] | None) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(g.is_sparse for g in grads):
            raise StepError("Sparse gradients are not supported; build the Embedding with sparse=False.")
        # With feedback the weights are looked at once, after the step.
        if not finite or not (self.feedback or all_finite(grads)):
            raise not_finite(loss)
        if self._kronecker is not None:
            self._kronecker.note(terms, loss)
        if not self.feedback:
            self._moves(self._before())
            self.host.advance()
            self.last = None if self._kronecker is None else self._kronecker.optimizer.last
            return
        check_penalties(terms)
        if self.form != "mean":
            check_roots(terms)
        blocks = blocks_of(terms)
        if any(p.grad is None for block in blocks for p in block.params):
            raise StepError("A parameter on the tape has no gradient; call backward() on the loss before step().")
        self._strays({id(p) for block in blocks for p in block.params})
        key = key_of(terms, [[block] for block in blocks])
        known = key in self._routes
        route = self._routes[key] if known else Route(terms, [[block] for block in blocks])
        near = formed(blocks) if self.form == "mean" else blocks
        stages = [[near[k]] for k in route.order]
        round_ = Round(Course(route, terms, stages), *self._runner(terms, closure))
        if not known:
            round_.verify()
            self._routes[key] = route
        share, clamped = self._move(round_, loss)
        broken = route.broken
        self._treated = [Treated(block.params, block.rule, broken.get(k)) for k, block in enumerate(blocks)]
        rank = sum(term.R for term in terms)
        runs = 1 if known else 2
        self.last = PolicyRecord(
            loss, math.nan, None, True, self.eps, share, rank, 1, (), runs=runs, note="feedback", clamped=clamped
        )

    def _move(self, round_: Round, loss: float) -> tuple[float, int]:
        """The host's step, and the policies' in a run of the model; all of it or nothing.

        Returns:
            The share of the step that was taken, and the number of eigenvalues clamped.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        course = round_.course
        share, clamped = 1.0, 0
        alone = None if self.form == "mean" else self._beside(course.terms, course.stages)
        self._moves(self._before())
        with self._whole(params) as before:
            self.host.prepare([block for blocks in course.stages for block in blocks])
            self.host.advance()
            if alone is None:
                share, policies = self._together(round_, before, params, loss)
            else:
                forms = [all_forms(blocks, self._curvature, len(course.terms)) for blocks in alone]
                policies, clamped = recursion(forms, [term.N for term in course.terms], self.form == "positive")
            round_.sweep(policies, self._curvature, before, self._change(course.stages))
            if not all_finite(params):
                if not all_finite([p.grad for p in params if p.grad is not None]):
                    raise not_finite(loss)
                raise too_far()
        return share, clamped

    def _together(
        self, round_: Round, before: Mapping[int, Tensor], params: Sequence[Tensor], loss: float
    ) -> tuple[float, list[list[Policy]]]:
        """Policies that count on the mean, around a host's step that was shortened; its share."""
        course = round_.course
        plan = meanwise.plan(course.stages, course.terms, self._curvature, before)
        share = plan.share(2 * self.bound * loss if loss > 0 else math.inf)
        if math.isnan(share):
            if not all_finite([p.grad for p in params if p.grad is not None]):
                raise not_finite(loss)
            raise too_far()
        if share < 1:
            plan.shorten(share)
            self.host.shorten(share)
            old = [before[id(p)] for p in params]
            moves = torch._foreach_sub(list(params), old)
            torch._foreach_copy_(list(params), torch._foreach_add(old, moves, alpha=share))
        return share, plan.policies

    def _change(self, stages: Sequence[Sequence[Block]]) -> float:
        """Relative change that a stage's weights may make."""
        if self.form != "mean" or not math.isfinite(self.bound):
            return math.inf
        return Trust().share(sum(p.ndim > 1 for blocks in stages for block in blocks for p in block.params[:1]))

    def _beside(self, terms: Sequence[Term], stages: Sequence[Sequence[Block]]) -> list[list[Block]]:
        """Blocks of the stages with the gradients of single samples beside the factor; of the first only if asked."""
        first = set() if self.form == "positive" else {id(p) for block in stages[0] for p in block.params}
        every = blocks_of([term.beside(self._scale, first) for term in terms if isinstance(term, CostateTerm)])
        found = {block.params: block for block in every}
        return [[found[block.params] for block in blocks if block.params in found] for blocks in stages]

    @contextmanager
    def _whole(self, params: Sequence[Tensor]) -> Iterator[Mapping[int, Tensor]]:
        """Weights and the host's state as before if anything goes wrong inside; gives the weights before, by id."""
        weights, state = [p.detach().clone() for p in params], self.host.keep()
        try:
            yield dict(zip(map(id, params), weights, strict=True))
        except BaseException:
            torch._foreach_copy_(list(params), weights)
            self.host.put_back(state)
            raise

    def _runner(
        self, terms: Sequence[Term], closure: Callable[[], Any] | None
    ) -> tuple[Callable[[Passage], None], Sequence[int] | int]:
        """How the model is run again, and which of its calls that repeats."""
        recorder, model = self._tape.recorder, self.model
        again = None if closure is None else ClosureReplay(model, closure, self._rng, self._autocast)

        def run(passage: Passage) -> None:
            with recorder.heard(passage):
                if again is None:
                    rerun(model, terms)
                else:
                    again()

        if closure is not None:
            return run, self._first_root
        return run, [root.serial for root in in_time(root for term in terms for root in term.roots)]

    # -- the loop around it -----------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step; see :meth:`pullback.optim.taped.Taped.step`."""
        out = super().step(closure)
        self._tape.recorder.enabled = not self._idle()
        return out

    def _idle(self) -> bool:
        return not self.feedback and (self._kronecker is None or not self._kronecker.looks)

    def _scaling(self, closure: Callable[[], Any] | None) -> Scaling | None:
        scaling = super()._scaling(closure)
        self._scale = 1.0 if scaling is None else scaling.scale
        return scaling

    def _keep_state(self) -> object:
        return self.host.keep() if self._kronecker is None else self._kronecker.optimizer._keep_state()

    def _put_back(self, kept: object) -> None:
        if self._kronecker is None:
            self.host.put_back(kept)
        else:
            self._kronecker.optimizer._put_back(kept)

    def _share(self) -> None:
        """Let the host work on our groups and our state."""
        self.param_groups = self.host.optimizer.param_groups
        self.state = self.host.optimizer.state

    def _state(self) -> dict[str, Any]:
        return {} if self._kronecker is None else self._kronecker.optimizer._state()

    def _load(self, own: dict[str, Any]) -> None:
        # torch has put new groups and a new state in place of those that were shared.
        self.host.optimizer.param_groups, self.host.optimizer.state = self.param_groups, self.state
        if self._kronecker is not None:
            self._kronecker.optimizer._load(own)
            self._tape.recorder.enabled = not self._idle()
