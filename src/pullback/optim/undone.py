r"""Steps that no trial had guarded, taken back when the next pass finds an equation without a solution.

Weights that a step has moved too far show it in the next pass: the model's ODE blows up, or a learned time has left
its bounds. A trial finds that out, on its own batch and where trials are made; all else needs a guard. On models that
solve equations, and only there, optimizers keep the weights before each step until the next one begins. If a pass in
training fails in between, they are put back, and steps are half as long until they have grown again:
:math:`\eta \leftarrow \eta/2` when a step is undone, :math:`\eta \leftarrow 1.1\,\eta` up to the user's own after each
that proved solvable (the usual rule of trust regions, on the learning rate, so that momentum and what a policy adds are
shortened as well).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pullback.errors import SolverError
from pullback.optim.fallback import Fallback
from pullback.optim.record import StepRecord
from pullback.tape import tensors
from pullback.tape.recorder import Hook, Recorder
from pullback.tape.solves import Solves

SHORTER, LONGER = 0.5, 1.1
#: Steps undone one after the other for which a pass is worth making again; they shorten steps to a thousandth.
PATIENCE = 10


class Guard:
    """Keeps what was before the last step.

    Attributes:
        share: factor on learning rates.
        undone: steps taken back since the last that proved solvable.
        moving: whether a step is under way.
    """

    def __init__(self) -> None:
        self.share = 1.0
        self.undone = 0
        self.moving = False
        self._weights: list[Tensor] = []
        self._state: object = None
        self._versions: list[int] | None = None

    @property
    def patient(self) -> bool:
        """Whether going on is worth it."""
        return self.undone <= PATIENCE

    def drop(self) -> None:
        """Forget the last step: it is not to be taken back any more."""
        self._versions = self._state = None
        self.moving = False

    def clear(self) -> None:
        """Forget it, and give the memory back."""
        self.drop()
        self._weights = []

    def begins(self, params: Sequence[Tensor], state: object) -> None:
        """A step begins, so the one before has proved solvable.

        Args:
            params: what it may move; copied.
            state: what the optimizer needs to be as before.
        """
        if self._versions is not None:
            self.share, self.undone = min(1.0, LONGER * self.share), 0
        self.drop()
        if [(w.shape, w.dtype, w.device) for w in self._weights] == [(p.shape, p.dtype, p.device) for p in params]:
            torch._foreach_copy_(self._weights, list(params))
        else:
            self._weights = [p.detach().clone() for p in params]
        self._state = state
        self.moving = True

    def ended(self, params: Sequence[Tensor]) -> None:
        """The step is through; nothing if it had not begun.

        Args:
            params: those that :meth:`begins` got.
        """
        if not self.moving:
            return
        self.moving = False
        self._versions = [p._version for p in params]

    def seen(self, params: Sequence[Tensor]) -> None:
        """A pass begins: what others have changed since the step, as by loading a checkpoint, is not ours to undo.

        Args:
            params: those that :meth:`begins` got.
        """
        if self._versions is not None and self._versions != [p._version for p in params]:
            self.drop()

    def saved(self) -> dict[str, Any]:
        """What to resume from."""
        return {"share": self.share}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from :meth:`saved`; the last step is not known any more."""
        self.drop()
        self.share = saved.get("share", 1.0)

    def failed(self) -> None:
        """The step was no good: the next ones are shorter."""
        self.share *= SHORTER
        self.undone += 1
        self.drop()

    def waits(self) -> bool:
        """Whether there is a step to take back."""
        return self._versions is not None

    def take_back(self, params: Sequence[Tensor]) -> object:
        """Put the weights before the last step back, bit for bit.

        Args:
            params: those that :meth:`begins` got.

        Returns:
            The state that :meth:`begins` got.
        """
        torch._foreach_copy_(list(params), self._weights)
        state = self._state
        self.failed()
        return state

    def tell(self, error: SolverError) -> None:
        """Say it in the error."""
        if not error.undone:
            error.add(
                "The step that led there was undone: weights, times and momentum are as before it, and the next steps "
                f"are {self.share:.2g} times as long. "
                + ("Make the pass again to go on." if self.patient else f"It is number {self.undone} in succession.")
            )
        error.undone = True


@contextmanager
def slowed(groups: Iterable[dict[str, Any]], share: float) -> Iterator[None]:
    """Learning rates times a factor, inside.

    Args:
        groups: the optimizer's param_groups.
        share: the factor.
    """
    rates = [(group, group["lr"]) for group in groups] if share < 1 else []
    for group, rate in rates:
        group["lr"] = share * rate
    try:
        yield
    finally:
        for group, rate in rates:
            group["lr"] = rate


class Guarded:
    """An optimizer's part in it.

    Attributes:
        param_groups: the optimizer's.
        last: record of the last step, None before.
    """

    param_groups: list[dict[str, Any]]
    last: StepRecord | None
    _fallback: Fallback | None
    _guard: Guard | None = None

    def _begin_guard(self, model: nn.Module, recorder: Recorder) -> None:
        """Listen to the passes of a model that solves equations.

        Args:
            model: the model.
            recorder: of the tape; removes the hooks with its own.
        """
        if any(isinstance(module, Solves) for module in model.modules()):
            self._guard = Guard()
            recorder.hold(model.register_forward_pre_hook(Hook(self, "_enters")))
            recorder.hold(model.register_forward_hook(Hook(self, "_left"), with_kwargs=True, always_call=True))
            for module in model.modules():
                if isinstance(module, Solves):
                    recorder.hold(module.listen(Hook(self, "undo")))

    @torch.no_grad()
    def undo(self, error: SolverError) -> bool:
        """Take the last step back because a pass at the weights it left has failed.

        Passes of the model in training that fail, forward or backward, do so by themselves. It remains to be called for
        an evaluation whose failure is to count.

        Args:
            error: what was raised; it is told that the step was undone.

        Returns:
            Whether it was, by this call or before, so that the pass is worth making again. False if there is no step
            to undo, weights were changed since, or ten in succession were undone.
        """
        guard, params = self._guard, self._params()
        if guard is not None and guard.waits():
            self._put_back(guard.take_back(params))
            if self.last is not None:
                self.last = dataclasses.replace(self.last, accepted=False, note=f"undone: {error}")
            guard.tell(error)
            if torch.is_autocast_enabled(params[0].device.type):
                torch.clear_autocast_cache()  # it holds casts of the weights that were moved
        return error.undone and (guard is None or guard.patient)

    def _keep_state(self) -> object:
        """What a guarded step changes beside the weights, for :meth:`_put_back`."""

    def _put_back(self, kept: object) -> None:
        """Be as before the step, but for the weights.

        Args:
            kept: what :meth:`_keep_state` returned.
        """

    def _before(self) -> object:
        """The state before a step, for :meth:`_moves`; None where nothing is guarded."""
        return None if self._guard is None else self._keep_state()

    def _moves(self, before: object) -> None:
        """Weights are about to move: a subclass says so in every step.

        Args:
            before: what :meth:`_before` returned.
        """
        if self._guard is not None:
            self._guard.begins(self._params(), before)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """A step that can be taken back, shortened as the guard says."""
        guard = self._guard
        if guard is None:
            yield
            return
        own = None if self._fallback is None else self._fallback.optimizer
        try:
            with slowed([*self.param_groups, *([] if own is None else own.param_groups)], guard.share):
                yield
        except SolverError as error:
            if guard.moving:  # a pass in the step itself, which has put everything back
                guard.failed()
                guard.tell(error)
            else:
                self.undo(error)  # the rows of this pass are of weights that the last step has left
            raise
        except BaseException:
            if guard.moving:
                guard.drop()
            raise
        guard.ended(self._params())

    def _enters(self, module: nn.Module, args: Any) -> None:
        """A pass of the model begins."""
        if self._guard is not None:
            self._guard.seen(self._params())

    def _left(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A pass of the model has ended, or failed: then there is no output."""
        error = sys.exc_info()[1]
        training = module.training and torch.is_grad_enabled()
        if output is not None or not training or not isinstance(error, SolverError) or self._guard is None:
            return
        given = [t for t in tensors((args, kwargs)) if t.is_floating_point()]
        if all(bool(torch.isfinite(t).all()) for t in given):  # else the data are to blame, not the weights
            self.undo(error)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]
