"""Evaluating the loss again at other weights: the captured inputs through the model, no trace left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pullback.errors import StepError
from pullback.tape.call import Region, RootCall, inside
from pullback.tape.nest import mapped, tensors
from pullback.tape.term import Term


def replayable(terms: Sequence[Term]) -> bool:
    """Whether every term can be evaluated without the user's help."""
    # A prediction may rest on several calls of the model, one fed by another: repeating the last would not do.
    return all(
        term.use.criterion is not None and term.use.path is not None and term.roots == [term.use.path.root]
        for term in terms
    )


def inputs_finite(terms: Sequence[Term]) -> bool:
    """Whether what the model and the losses were given is finite, so that a bad loss comes from the weights."""
    given = [t for term in terms for root in term.roots for t in tensors((root.args, root.kwargs))]
    given += [t for term in terms for t in tensors((term.use.args, term.use.kwargs))]
    return all(bool(torch.isfinite(t).all()) for t in given if t.is_floating_point())


def replay(model: nn.Module, terms: Sequence[Term]) -> Tensor:
    """Loss of the terms at the model's present weights, a scalar without a graph.

    Random draws inside the model repeat those of the captured call (the same dropout mask). The calls are made in
    the order of the captured ones, which need not be that of the backward passes: a passage moves weights on the way.

    Args:
        model: the model.
        terms: terms of a linearisation, all replayable.
    """
    total: Tensor | None = None
    outputs: dict[int, list[Tensor]] = {}
    with untouched(model):
        for term, root in sorted(((term, root_of(term)) for term in terms), key=lambda pair: pair[1].serial):
            path = term.use.path
            assert path is not None
            with torch.set_grad_enabled(root.grad):
                if id(root) not in outputs:
                    if root.rng is not None:
                        torch.set_rng_state(root.rng)
                    with root.context():
                        outputs[id(root)] = tensors(model(*root.args, **root.kwargs))
                with term.use.context():
                    value = term.use.evaluate(path.follow(outputs[id(root)])).detach()
            total = value if total is None else total + value
    assert total is not None
    return total


def root_of(term: Term) -> RootCall:
    """The call of the model that is repeated for a replayable term."""
    assert term.use.path is not None
    return term.use.path.root


def in_time(roots: Iterable[RootCall]) -> list[RootCall]:
    """Calls of the model, each once, in the order in which they were made."""
    return sorted({id(root): root for root in roots}.values(), key=lambda root: root.serial)


def rerun(model: nn.Module, terms: Sequence[Term]) -> None:
    """Call the model again as it was called for the terms, without a loss.

    Args:
        model: the model.
        terms: terms of a linearisation.
    """
    with untouched(model):
        for root in in_time(root for term in terms for root in term.roots):
            with torch.set_grad_enabled(root.grad), root.context():
                if root.rng is not None:
                    torch.set_rng_state(root.rng)
                model(*root.args, **root.kwargs)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Give back the random state and the model's buffers as they were."""
    rng = torch.get_rng_state()
    buffers = [(b, b.clone()) for b in model.buffers()] if model.training else []
    try:
        yield
    finally:
        torch.set_rng_state(rng)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


class ClosureReplay:
    """Evaluates a user's closure again, cheaply and without effect on gradients.

    The model's forward runs without a graph and its output becomes a leaf, so that a closure that calls
    ``backward`` goes no further than that.

    Args:
        model: the model.
        closure: returns the loss; may call ``backward``.
        rng: state of the CPU generator before the closure's first run; None to draw afresh.
        autocast: the autocast region of that run.
    """

    def __init__(
        self, model: nn.Module, closure: Callable[[], Any], rng: Tensor | None = None, autocast: Region | None = None
    ) -> None:
        self.model = model
        self.closure = closure
        self.rng = rng
        self.autocast = autocast

    def __call__(self) -> Tensor:
        """The loss at the model's present weights, detached."""
        params = list(self.model.parameters())
        grads = [p.grad for p in params]
        for p in params:
            p.grad = None
        modes: list[bool] = []

        def enter(module: nn.Module, args: Any) -> None:
            modes.append(torch.is_grad_enabled())
            torch.set_grad_enabled(False)

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            torch.set_grad_enabled(modes.pop())
            return mapped(lambda t: t.detach().requires_grad_(t.is_floating_point()), output)

        handles = [
            self.model.register_forward_pre_hook(enter),
            self.model.register_forward_hook(leave, always_call=True),
        ]
        try:
            with untouched(self.model), torch.enable_grad(), inside(self.autocast):
                if self.rng is not None:
                    torch.set_rng_state(self.rng)
                return as_loss(self.closure())
        finally:
            for handle in handles:
                handle.remove()
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad


def as_loss(value: Any) -> Tensor:
    """What a closure returned, as a detached scalar.

    Raises:
        StepError: if it returned no scalar tensor.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = "None" if value is None else f"a {type(value).__name__}"
        raise StepError(f"The closure returned {got}; it must return the loss as a scalar tensor.")
    return value.detach().reshape(())
