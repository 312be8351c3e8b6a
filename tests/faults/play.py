"""Plays a drawn case: healthy steps, one with a fault, healthy steps again; and passes a verdict on each."""

from __future__ import annotations

import copy
import math
import re
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from draw import Batch, Draw
from injuries import InjectedError, InjectedRuntimeError, Injury
from torch import Tensor, nn
from twin import compare

import pullback

INJECTED = (InjectedError, InjectedRuntimeError, KeyboardInterrupt)
LIBRARY = str(Path(pullback.__file__).parent)

#: What torch itself says of some faulty batches before it refuses them or takes them.
WARNINGS = ("Using a target size", "There is a performance drop", "Casting complex values", "Using padding='same'",
            "Complex modules are a new feature",
            "LSTM with projections", "Mismatch dtype between input")  # fmt: skip

#: Clear words of torch's own engine, whoever calls it.
ENGINE = ("backward through the graph a second time", "modified by an inplace operation")


class WrongError(AssertionError):
    """A step that is neither correct nor refused as it should be."""


@dataclass
class Run:
    """A model in training.

    Attributes:
        draw: what was drawn.
        outcomes: how every step ended.
    """

    draw: Draw
    outcomes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model, self.criterion, self.make_batch = self.draw.build()
        self.fixed: Batch | None = None
        self.undone: list[Tensor] | None = None
        self.seen: list[float] = []
        for p in list(self.model.parameters())[: self.draw.frozen]:
            p.requires_grad_(False)
        if not any(p.requires_grad for p in self.model.parameters()):
            self.model.requires_grad_(True)

    # -- what injuries use ------------------------------------------------------------------------------

    def batch(self, n: int) -> Batch:
        """A new batch."""
        return self.make_batch(n)

    def make_optimizer(self) -> None:
        """A new optimizer."""
        criterion = None if self.draw.functional else self.criterion
        options = {k: copy.deepcopy(v) for k, v in self.draw.options.items()}
        self.opt = self.draw.optimizer(self.model, criterion, **options)
        self.undone = None

    def forward(self, args: Any, kwargs: Any, trial: bool = False) -> Tensor:
        """The user's own forward pass, which may write buffers; that of a trial loss may not."""
        try:
            return self.draw.loss.head(self.model(*args, **kwargs))
        finally:
            if not trial:
                self.buffers = [b.clone() for b in self.model.buffers()]

    def loss(self, args: Any, kwargs: Any, y: Any, trial: bool = False) -> Tensor:
        """The loss of a batch."""
        z = self.forward(args, kwargs, trial)
        return F.mse_loss(z, y) if self.draw.functional else self.criterion(z, y).mean()

    def note_weights(self) -> None:
        """Weights that a faulty step must leave as they are."""
        self.before = [p.detach().clone() for p in self.model.parameters()]

    # -- one step ---------------------------------------------------------------------------------------

    def take(self, batch: Batch, injury: Injury) -> None:
        """One step on a batch; the injury acts in the first evaluation of the loss."""
        self.seen = []

        def evaluate(backward: bool) -> Tensor:
            first = not self.seen
            loss = self.loss(*batch, trial=not first)
            self.seen.append(float(loss.detach()) if loss.numel() == 1 and not loss.is_complex() else math.nan)
            if first:
                injury.forwarded(self, loss)
            if backward and first:
                injury.backward(self, loss)
                injury.backwarded(self)
            elif backward:
                loss.backward()
            return loss

        if self.draw.closure is None:
            self.opt.zero_grad()
            evaluate(True)
            self.opt.step()
            return

        def closure() -> Tensor:
            self.opt.zero_grad()
            return evaluate(bool(self.draw.closure))

        self.opt.step(closure)

    def step(self, injury: Injury, may_fail: bool) -> str:
        """One step and the verdict on it.

        Raises:
            WrongError: if it is bad.
        """
        n = injury.size(self.draw.n)
        if self.fixed is None or self.draw.fresh or n != self.draw.n:
            batch = self.batch(n)
            if n == self.draw.n:
                self.fixed = batch
        else:
            batch = self.fixed
        injury.before(self)
        batch = injury.batch(*batch)
        self.note_weights()
        self.buffers = [b.clone() for b in self.model.buffers()]
        state = _copied(self.opt.state_dict())
        hooks = _hooks(self.model, self.criterion)
        record, error = self.opt.last, None
        twin = compare(self) if self.draw.dense and injury.comparable and not may_fail else None
        try:
            self.take(batch, injury)
        except (Exception, KeyboardInterrupt) as caught:
            error = caught
        injury.disarm(self)
        _require(torch.is_grad_enabled(), "gradients are switched off")
        _require(_hooks(self.model, self.criterion) == hooks, "hooks were left behind")
        _require(
            all(_equal(a, b) for a, b in zip(self.buffers, self.model.buffers(), strict=True)), "buffers have changed"
        )
        if error is not None:
            fixed = self.draw.options["damping"].control == "fixed"
            if not may_fail and fixed and isinstance(error, pullback.StepError) and self._weights_are(self.before):
                return "diverged"  # a fixed damping takes every step, and says so when it has gone too far
            if not may_fail:
                raise WrongError(f"a healthy step raised {type(error).__name__}: {error}") from error
            try:
                self._judge_error(error, injury)
            except WrongError as wrong:
                raise wrong from error
            _require(self._weights_are(self.before), "weights have changed in a step that raised")
            _same_state(state, self.opt.state_dict())
            return type(error).__name__
        _require(self.opt.last is not record, "no step was taken and nothing was said")
        outcome = self._judge_step(batch, injury)
        if twin is not None and outcome == "step":
            twin(batch)
        return outcome

    # -- verdicts ---------------------------------------------------------------------------------------

    def _judge_error(self, error: BaseException, injury: Injury) -> None:
        text = str(error)
        ours = isinstance(error, pullback.PullbackError)
        if isinstance(error, INJECTED):
            return
        _require(
            ours or isinstance(error, TypeError | ValueError | RuntimeError | IndexError | AssertionError),
            f"an error of type {type(error).__name__}: {text}",
        )
        engine = injury.breaks_the_graph and any(words in text for words in ENGINE)
        inside = _raised_inside(error, own_backward=self.draw.closure is False) and not engine
        if not ours:
            _require(not inside, f"{type(error).__name__} from inside the library: {text[:300]}")
            return
        _require(len(text) < 400, f"a message of {len(text)} characters: {text}")
        sentences = [part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z'])", text) if part]
        _require(len(sentences) <= 2, f"a message of {len(sentences)} sentences: {text}")
        _require(error.__context__ is None or error.__cause__ is not None, f"two errors at once: {text}")
        if injury.about_numbers:
            _require(re.search(r"finite|The loss is|overflow", text) is not None, f"not clear of bad numbers: {text}")

    def _judge_step(self, batch: Batch, injury: Injury) -> str:
        last, before = self.opt.last, self.before
        poisoned = [~torch.isfinite(b) for b in before]
        for p, bad in zip(self.model.parameters(), poisoned, strict=True):
            _require(bool((torch.isfinite(p.detach()) | bad).all()), "weights are not finite")
        for s in self.opt.state.values():
            for key, t in s.items():
                _require(bool(torch.isfinite(t).all()), f"the state {key!r} is not finite")
        mu = self.opt.state_dict()["pullback"]["damping"]["mu"]
        _require(mu is not None and 0 < mu < math.inf, f"mu is {mu}")
        for p, old in zip(self.model.parameters(), before, strict=True):
            if not p.requires_grad and last.accepted:
                _require(_equal(p, old), "a frozen parameter has moved")
        control = self.draw.options["damping"].control
        if not last.accepted:
            if control != "gain" and self.undone is not None and not self._weights_are(before):
                self._judge_taken_back()
                self.undone = None
                return "taken back"
            self.undone = None
            _require(self._weights_are(before), "weights have changed in a step that was not accepted")
            return "undone"
        self.undone = before
        _require(math.isfinite(last.loss), f"a step was taken on a loss of {last.loss}")
        if control == "gain":
            eps = torch.finfo(self.draw.dtype).eps
            small = 8 * eps * abs(last.loss)
            _require(last.actual >= 0 or max(abs(last.actual), abs(last.predicted)) <= small, "the trial loss rose")
            self._compare_loss(batch, injury, eps)
        return "step"

    def _judge_taken_back(self) -> None:
        """An untried step is undone when the next batch condemns it; what did not move in it stays as it is."""
        for p, old, now in zip(self.model.parameters(), self.undone, self.before, strict=True):
            _require(
                _equal(p, old) or (not p.requires_grad and _equal(p, now)),
                "weights of a step taken back are not those before it",
            )

    def _compare_loss(self, batch: Batch, injury: Injury, eps: float) -> None:
        """The loss evaluated once more by the user must not have risen."""
        random = any(isinstance(m, nn.Dropout) or (m.training and m._buffers) for m in self.model.modules())
        if not injury.comparable or random or self.draw.options["weight_decay"]:
            return
        with torch.no_grad():
            after = float(self.loss(*batch))
        limit = self.seen[0] * (1 + 64 * eps) + 1e-30
        _require(after <= limit, f"the loss rose from {self.seen[0]:.9g} to {after:.9g}")

    def _weights_are(self, expected: list[Tensor]) -> bool:
        return all(_equal(a, p) for a, p in zip(expected, self.model.parameters(), strict=True))


def play(draw: Draw) -> list[str]:
    """Play a case.

    Returns:
        How every step ended; the one with the fault is at ``draw.steps[0]``.

    Raises:
        WrongError: if a step is neither correct nor refused as it should be.
    """
    torch.manual_seed(draw.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for words in WARNINGS:
            warnings.filterwarnings("ignore", words)
        return _play(draw)


def _play(draw: Draw) -> list[str]:
    run = Run(draw)
    refused = draw.injury.convert(run.model)
    if refused is not None:
        return _construct(run, refused)
    run.make_optimizer()
    healthy = Injury(draw.injury.r)
    for _ in range(draw.steps[0]):
        run.outcomes.append(run.step(healthy, False))
    saved = [p.detach().clone() for p in run.model.parameters()]
    run.outcomes.append(run.step(draw.injury, True))
    draw.injury.after(run)
    with torch.no_grad():
        for p, old in zip(run.model.parameters(), saved, strict=True):
            if not torch.isfinite(p).all():
                p.copy_(old)  # what the last step left, so that it may still be taken back
    for _ in range(draw.steps[1]):
        run.outcomes.append(run.step(healthy, False))
    return run.outcomes


def _construct(run: Run, refused: nn.Module) -> list[str]:
    """An optimizer that must be refused, and a model that it must leave alone."""
    whole = run.model
    run.model = refused
    try:
        run.make_optimizer()
    except TypeError as error:
        _require(len(str(error)) < 400, f"a message of {len(str(error))} characters: {error}")
    else:
        raise WrongError("the parameters were not refused")
    _require(_hooks(refused, run.criterion) == 0, "hooks were left behind")
    del whole
    again = Run(run.draw)
    again.make_optimizer()
    return ["TypeError", again.step(Injury(run.draw.injury.r), False)]


# -- tools --------------------------------------------------------------------------------------------------


def _require(ok: bool, otherwise: str) -> None:
    if not ok:
        raise WrongError(otherwise)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, a number that is not finite equal to itself."""
    return torch.equal(torch.nan_to_num(a.detach(), nan=1.25e30), torch.nan_to_num(b.detach(), nan=1.25e30))


def _hooks(*modules: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for top in modules for m in top.modules())


def _copied(tree: Any) -> Any:
    return copy.deepcopy(tree)


def _same_state(a: Any, b: Any, where: str = "state") -> None:
    """The optimizer's own state as before; but the random stream of a sketch goes on."""
    if isinstance(a, dict) and isinstance(b, dict):
        _require(a.keys() == b.keys(), f"{where} has other keys: {sorted(map(str, a.keys() ^ b.keys()))}")
        for key in a:
            if key not in ("generator", "generators"):
                _same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        _require(len(a) == len(b), f"{where} has another length")
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            _same_state(x, y, f"{where}.{k}")
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        _require(_equal(a, b), f"{where} has changed in a step that raised")
    else:
        _require(a == b or (a != a and b != b), f"{where} was {a} and is {b} after a step that raised")


def _raised_inside(error: BaseException, own_backward: bool) -> bool:
    """Whether the last frame that is not torch's belongs to the library.

    Args:
        error: the error.
        own_backward: whether the library calls backward in the user's place, for a closure that does not.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(LIBRARY):
            return not (own_backward and frame.name == "_run")
        if f"{Path(torch.__file__).parent}" not in frame.filename:
            return False
    return False
