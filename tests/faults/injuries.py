"""The faults: what is done to a run before, in and after one of its steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class InjectedError(Exception):
    """Thrown by a fault."""


class InjectedRuntimeError(RuntimeError):
    """Thrown by a fault, of the kind that torch throws itself."""


class Injury:
    """No fault at all; every fault overrides some of the moments below. ``run`` is a :class:`play.Run`."""

    #: whether the closure must call backward for the fault to happen
    needs_backward = False
    #: whether the loss of the faulty step can be evaluated again, to see that it did not rise
    comparable = True
    #: whether an error must speak of numbers that are not finite
    about_numbers = False
    #: whether torch's engine may refuse the backward pass
    breaks_the_graph = False

    def __init__(self, r: random.Random) -> None:
        self.seed = r.randrange(1 << 30)
        self.r = random.Random(self.seed)

    def __str__(self) -> str:
        shown = {k: v for k, v in vars(self).items() if k not in ("seed", "r") and isinstance(v, str | int | bool)}
        return ", ".join(f"{k}={v}" for k, v in shown.items())

    def convert(self, model: nn.Module) -> nn.Module | None:
        """The model that the optimizer must refuse when it is made, or None."""
        del model

    def before(self, run: Any) -> None:
        """Before the faulty step."""

    def size(self, n: int) -> int:
        """Rows of the faulty batch."""
        return n

    def batch(self, args: Any, kwargs: Any, y: Any) -> tuple[Any, Any, Any]:
        """The faulty batch."""
        return args, kwargs, y

    def forwarded(self, run: Any, loss: Any) -> None:
        """Between forward and backward."""
        del run, loss

    def backward(self, run: Any, loss: Any) -> None:
        """The backward pass."""
        del run
        loss.backward()

    def backwarded(self, run: Any) -> None:
        """Between backward and step."""

    def disarm(self, run: Any) -> None:
        """Right after the step: what would disturb looking at it."""

    def after(self, run: Any) -> None:
        """Before the healthy steps that follow."""


class Values(Injury):
    """A number that is not finite in inputs, targets, weights or gradients; or a label or token out of range."""

    comparable = False
    about_numbers = True

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.where = r.choice(["input", "target", "weight", "gradient"])
        self.bad = r.choice(["nan", "inf", "-inf"])
        self.all = r.random() < 0.2
        self.needs_backward = self.where == "gradient"

    def _spoil(self, t: torch.Tensor) -> torch.Tensor:
        t = t.detach().clone()
        if not t.is_floating_point():
            self.about_numbers = False
            t.view(-1)[self.r.randrange(t.numel())] = 1000  # no such label or token
            return t
        if self.all:
            return t.fill_(float(self.bad))
        t.view(-1)[self.r.randrange(t.numel())] = float(self.bad)
        return t

    def before(self, run: Any) -> None:
        if self.where == "weight":
            p = self.r.choice(list(run.model.parameters()))
            with torch.no_grad():
                p.copy_(self._spoil(p))

    def batch(self, args: Any, kwargs: Any, y: Any) -> tuple[Any, Any, Any]:
        if self.where == "input":
            if kwargs and self.r.random() < 0.5:
                return args, {k: self._spoil(t) for k, t in kwargs.items()}, y
            return tuple(map(self._spoil, args)), kwargs, y
        return (args, kwargs, self._spoil(y)) if self.where == "target" else (args, kwargs, y)

    def backwarded(self, run: Any) -> None:
        if self.where == "gradient":
            found = [p for p in run.model.parameters() if p.grad is not None]
            if found:
                p = self.r.choice(found)
                p.grad = self._spoil(p.grad)


class Size(Injury):
    """A batch of no row, of one, or of another number."""

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.rows = r.choice([0, 1, 9])

    def size(self, n: int) -> int:
        return self.rows


class Shapes(Injury):
    """An input or a target of another shape."""

    comparable = False

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.what = r.choice(["input", "target"])
        self.how = r.choice(["row less", "column more", "axis more", "axis less", "scalar", "transposed"])

    def _bend(self, t: torch.Tensor) -> torch.Tensor:
        if self.how == "row less":
            return t[:-1]
        if self.how == "column more":
            return torch.cat([t, t[..., :1]], -1)
        if self.how == "axis more":
            return t[..., None]
        if self.how == "axis less":
            return t[0]
        return t.flatten()[0] if self.how == "scalar" else t.movedim(0, -1)

    def batch(self, args: Any, kwargs: Any, y: Any) -> tuple[Any, Any, Any]:
        if self.what == "input":
            return tuple(map(self._bend, args)), kwargs, y
        return args, kwargs, self._bend(y)


class Dtypes(Injury):
    """An input or a target of another dtype."""

    comparable = False

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.what = r.choice(["input", "target"])
        self.dtype = r.choice(["float16", "bfloat16", "float32", "float64", "int32", "int64", "bool", "complex64"])

    def batch(self, args: Any, kwargs: Any, y: Any) -> tuple[Any, Any, Any]:
        to = getattr(torch, self.dtype)
        if self.what == "input":
            return tuple(t.to(to) for t in args), kwargs, y
        return args, kwargs, y.to(to)


class Parameters(Injury):
    """Parameters of a dtype or a device that no metric is for."""

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.to = r.choice(["float16", "bfloat16", "complex64", "meta"])
        self.only_one = self.to != "meta" and r.random() < 0.3

    def convert(self, model: nn.Module) -> nn.Module | None:
        if self.to == "meta":
            return model.to("meta")
        dtype = getattr(torch, self.to)
        if self.only_one:
            p = self.r.choice(list(model.parameters()))
            p.data = p.data.to(dtype)
            return model
        return model.to(dtype)


class Freezing(Injury):
    """``requires_grad`` of some or all parameters flipped between steps."""

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.which = r.choice(["some", "one", "all off", "all on"])

    def before(self, run: Any) -> None:
        params = list(run.model.parameters())
        self.was = [p.requires_grad for p in params]
        if self.which.startswith("all"):
            for p in params:
                p.requires_grad_(self.which == "all on")
            return
        count = 1 if self.which == "one" else self.r.randint(1, len(params))
        for p in self.r.sample(params, count):
            p.requires_grad_(not p.requires_grad)

    def after(self, run: Any) -> None:
        for p, was in zip(run.model.parameters(), self.was, strict=True):
            p.requires_grad_(was)


class Throwing(Injury):
    """The forward of a module or of the criterion throws at its k-th call in the step."""

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.at = r.choice([1, 1, 2, 2, 2, 3, 3, 4, 6, 9])
        self.where = r.choice(["model", "module", "criterion"])
        self.error = r.choice([InjectedError, InjectedRuntimeError, KeyboardInterrupt])
        self.kind = self.error.__name__

    def before(self, run: Any) -> None:
        inner = [m for m in run.model.modules() if m is not run.model]
        if self.where == "criterion" and not run.draw.functional:
            self.module = run.criterion
        elif self.where == "module" and inner:
            self.module = self.r.choice(inner)
        else:
            self.module = run.model
        true, calls = self.module.forward, 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.at:
                raise self.error("the sensor is lost")
            return true(*args, **kwargs)

        self.module.forward = forward

    def disarm(self, run: Any) -> None:
        self.module.__dict__.pop("forward", None)


class Modes(Injury):
    """Training and evaluation mode flipped."""

    def before(self, run: Any) -> None:
        self.was = [m.training for m in run.model.modules()]
        run.model.train(not run.model.training or any(not was for was in self.was))
        if self.r.random() < 0.5:
            run.model.train(not run.model.training)

    def after(self, run: Any) -> None:
        for m, was in zip(run.model.modules(), self.was, strict=True):
            m.training = was


class Stray(Injury):
    """Another forward pass, without backward, before the step or in it."""

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.grad = r.random() < 0.7
        self.where = r.choice(["before", "between forward and backward", "between backward and step"])
        self.loss = r.random() < 0.5

    def _pass(self, run: Any) -> None:
        args, kwargs, y = run.batch(self.r.choice([1, 4]) if run.draw.case.name != "batch norm in training" else 4)
        with torch.set_grad_enabled(self.grad):
            self.kept = run.loss(args, kwargs, y) if self.loss else run.forward(args, kwargs)

    def before(self, run: Any) -> None:
        if self.where == "before":
            self._pass(run)

    def forwarded(self, run: Any, loss: Any) -> None:
        if self.where == "between forward and backward":
            self._pass(run)

    def backwarded(self, run: Any) -> None:
        if self.where == "between backward and step":
            self._pass(run)


class NoBackward(Injury):
    """A step without a backward pass."""

    needs_backward = True

    def backward(self, run: Any, loss: Any) -> None:
        pass


class TwiceBackward(Injury):
    """The backward pass twice: of two losses, of one loss kept, or of one loss that was freed."""

    comparable = False
    needs_backward = True
    breaks_the_graph = True

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.how = r.choice(["two losses", "one kept", "one freed"])

    def backward(self, run: Any, loss: Any) -> None:
        loss.backward(retain_graph=self.how == "one kept")
        if self.how == "two losses":
            run.loss(*run.batch(4)).backward()
        else:
            loss.backward()


class LostGradient(Injury):
    """One parameter has no gradient any more."""

    needs_backward = True
    comparable = False

    def backwarded(self, run: Any) -> None:
        found = [p for p in run.model.parameters() if p.grad is not None]
        if found:
            self.r.choice(found).grad = None


class Closed(Injury):
    """The optimizer was closed before the step."""

    def before(self, run: Any) -> None:
        run.opt.close()

    def after(self, run: Any) -> None:
        run.make_optimizer()


class Moved(Injury):
    """Weights changed in place, between steps or inside one."""

    comparable = False
    breaks_the_graph = True

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.where = r.choice(["before", "between forward and backward", "between backward and step"])
        self.how = r.choice(["a little", "much", "half"])

    def _move(self, run: Any) -> None:
        p = self.r.choice(list(run.model.parameters()))
        with torch.no_grad():
            if self.how == "half":
                p.mul_(0.5)
            else:
                p.add_(torch.randn_like(p), alpha=0.01 if self.how == "a little" else 3.0)
        run.note_weights()

    def before(self, run: Any) -> None:
        if self.where == "before":
            self._move(run)

    def forwarded(self, run: Any, loss: Any) -> None:
        if self.where == "between forward and backward":
            self._move(run)

    def backwarded(self, run: Any) -> None:
        if self.where == "between backward and step":
            self._move(run)


FAULTS: dict[str, Callable[[random.Random], Injury]] = {
    "none": Injury,
    "values": Values,
    "size": Size,
    "shapes": Shapes,
    "dtypes": Dtypes,
    "parameters": Parameters,
    "freezing": Freezing,
    "throwing": Throwing,
    "modes": Modes,
    "stray forward": Stray,
    "no backward": NoBackward,
    "twice backward": TwiceBackward,
    "lost gradient": LostGradient,
    "closed": Closed,
    "moved weights": Moved,
}
