"""Hooks that remember module calls, held so that nothing outlives its use.

Calls are written into the metadata of the autograd node of their output. Nodes live as long as the user's
graph, hence so do the calls; and since the node is taken inside the hook, an in-place operation that
follows (``ReLU(inplace=True)``, ``x += skip``) cannot rebind it.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from pullback.tape.call import Call, Entry, RootCall
from pullback.tape.nest import mapped, tensors

_serial = itertools.count()

#: what happens inside a module that no recorder is to hear, by thread: backward passes run in threads of their own
_inside = threading.local()


@contextmanager
def unheard(listener: object | None = None) -> Iterator[None]:
    """No hook of this package hears the calls inside but those of one owner: they are a module's private affair.

    Args:
        listener: a recorder that hears them all the same.
    """
    before = getattr(_inside, "ears", None)
    _inside.ears = (listener,)
    try:
        yield
    finally:
        _inside.ears = before


#: calls a function outside torch.compile; made when that is first loaded, for loading it takes a second
_untraced: list[Callable[..., Any]] = []


class Hook:
    """A hook that reaches its owner weakly, and is inert in a copy.

    ``copy.deepcopy(model)`` and pickling carry hooks along; a copy of this one does nothing.
    """

    def __init__(self, owner: object | None, method: str) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self._method = method

    def __call__(self, *args: Any) -> Any:
        """Call the method of the owner, if it is still there."""
        if torch.compiler.is_compiling():
            # A hook looks at autograd's graph: torch.compile is to break its own here, not to trace it.
            if not _untraced:
                _untraced.append(sys.modules["torch._dynamo"].disable(lambda function, *a: function(*a)))
            return _untraced[0](self._call, *args)
        ears = getattr(_inside, "ears", None)
        if ears is not None and ears[0] is None:  # most calls, where a module integrates
            return None
        return self._call(*args)

    def _call(self, *args: Any) -> Any:
        owner = None if self._owner is None else self._owner()
        ears = getattr(_inside, "ears", None)
        if owner is None or (ears is not None and ears[0] is not owner):
            return None
        return getattr(owner, self._method)(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None, self._method)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Hook, (None, self._method))


def notes(node: Node) -> dict[Any, Any]:
    """The dictionary that lives as long as an autograd node (a property, whatever its stub says)."""
    return cast("dict[Any, Any]", node.metadata)


def _apart(output: Any) -> tuple[Any, bool]:
    """Several outputs as aliases, and whether there were several.

    One may have been computed from another inside the module (an LSTM cell's h from its c). What reaches an
    alias was used outside, so that the outputs' factors do not count the way inside twice.
    """
    found = [t for t in tensors(output) if t.requires_grad and t.grad_fn is not None]
    if len(found) < 2:
        return output, False
    own = {id(t) for t in found}
    return mapped(lambda t: t.view_as(t) if id(t) in own else t, output), True


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm that normalises by the batch at hand."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


#: what is seen of the wires between modules: nothing, what the model returns, or all that enters or leaves a module
Wiring = Literal["none", "ends", "all"]


class Listener(Protocol):
    """Follows a model that is run again while nothing is recorded."""

    def begins(self) -> None:
        """The model is called."""

    def enters(self, module: nn.Module, given: Any) -> None:
        """A module is called, with a nest of tensors."""

    def leaves(self, module: nn.Module, returned: Any) -> None:
        """A module has returned a nest of tensors."""


class Recorder:
    """Remembers the calls of a model's modules while gradients are recorded.

    Args:
        model: the model; it is held weakly.
        freeze: whether sweeps hold the statistics of BatchNorm layers constant.
        wiring: what is remembered of the tensors between modules, for feedback.

    Attributes:
        listener: told of entries and exits while nothing is recorded.
        sweeping: True while factors are pulled back (and not in the user's own backward pass).
        frozen: names of the BatchNorm layers whose statistics were held constant.
    """

    def __init__(self, model: nn.Module, freeze: bool = False, wiring: Wiring = "none") -> None:
        self.key = f"pullback-{next(_serial)}"
        self.wiring = wiring
        self.listener: Listener | None = None
        self._open: list[Entry] = []
        self._turns: dict[int, int] = {}
        self._root = -1
        self.enabled = True
        self.sweeping = False
        self.frozen: dict[str, None] = {}
        self._freeze = freeze
        self.names: dict[int, str] = {id(m): name for name, m in model.named_modules()}
        self._rng: Tensor | None = None
        self._handles: list[Any] = []
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        hook = Hook(self, "_called")
        for module in model.modules():
            if module is not model and any(True for _ in module.parameters()):
                if wiring == "all":
                    # In front of hooks that compute weights from parameters (pruning), which move on entry.
                    entered = Hook(self, "_entered")
                    self.hold(module.register_forward_pre_hook(entered, prepend=True, with_kwargs=True))
                self.hold(module.register_forward_hook(hook, with_kwargs=True))
        self.hold(model.register_forward_pre_hook(Hook(self, "_root_enters")))
        self.hold(model.register_forward_hook(Hook(self, "_root_called"), with_kwargs=True))

    def hold(self, handle: Any) -> None:
        """Remove ``handle`` with the others."""
        self._handles.append(handle)

    def close(self) -> None:
        """Remove every hook."""
        self._finalizer()

    @property
    def roots(self) -> int:
        """How many calls of the model were recorded so far."""
        return self._root + 1

    @property
    def active(self) -> bool:
        """Whether calls are being remembered right now."""
        return self.enabled and torch.is_grad_enabled()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def name_of(self, module: nn.Module) -> str:
        """Name of a module in the model (its class where it has none)."""
        return self.names.get(id(module)) or type(module).__name__

    def _write(self, call: Call, output: Any) -> None:
        for index, leaf in enumerate(tensors(output)):
            # A leaf's node is the parameter's own accumulator, which outlives the graph: leave it alone.
            if leaf.requires_grad and leaf.grad_fn is not None:
                edge = get_gradient_edge(leaf)
                notes(edge.node).setdefault(self.key, []).append((call, index, edge.output_nr))

    @contextmanager
    def heard(self, listener: Listener) -> Iterator[None]:
        """Tell ``listener`` of every entry and exit inside."""
        self.listener = listener
        try:
            yield
        finally:
            self.listener = None

    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.listener is not None:
            self.listener.enters(module, (args, kwargs))
            return None
        if not self.active:
            return None
        turn = self._turns.get(id(module), 0)
        self._turns[id(module)] = turn + 1
        entry = Entry(module, self._root, turn)
        # Detached: a tensor that knew its node, which knows the entry, could never be collected.
        entry.given = [(t.detach(), t._version) for t in tensors((args, kwargs))]
        self._open.append(entry)
        numbers = itertools.count()

        def aliased(t: Tensor) -> Tensor:
            index = next(numbers)
            if not t.requires_grad or t.grad_fn is None:
                return t
            alias = t.view_as(t)
            notes(get_gradient_edge(alias).node).setdefault(self.key + ".in", (entry, index))
            return alias

        if not kwargs and all(isinstance(t, Tensor) for t in args):  # by far the most common
            return tuple(map(aliased, args)), kwargs
        return mapped(aliased, (args, kwargs))

    def _closes(self, call: Call, output: Any) -> None:
        """Join a call with its entry; entries that an exception left open are dropped."""
        while self._open:
            entry = self._open.pop()
            if entry.module is call.module:
                call.entry = entry
                break
        call.returned = [(t.detach(), t._version) for t in tensors(output)]

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.listener is not None:
            self.listener.leaves(module, output)
            return None
        if not self.active:
            return None
        output, changed = _apart(output)
        call = Call(module, args, kwargs, len(tensors(output)))
        waiting = module.__dict__.get("_gate")
        call.gate = None if waiting is None else waiting()
        if self.wiring == "all":
            self._closes(call, output)
        self._write(call, output)
        if self._freeze and uses_batch_statistics(module):
            self._hold_statistics(module, args, output)
        return output if changed else None

    def _hold_statistics(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """In sweeps, let the cotangent through a BatchNorm as if mean and variance were constants."""
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        if not output.requires_grad or output.grad_fn is None:
            return
        self.frozen[self.name_of(module)] = None
        x, recorder = args[0].detach(), weakref.ref(self)

        def constant(grads_in: tuple[Tensor | None, ...], grads_out: tuple[Tensor, ...]) -> Any:
            owner = recorder()
            if owner is None or not owner.sweeping or grads_in[0] is None:
                return None
            axes = [k for k in range(x.ndim) if k != 1]
            scale = (x.var(axes, correction=0, keepdim=True) + module.eps).rsqrt()
            if module.weight is not None:
                scale = scale * module.weight.detach().view(scale.shape)
            return ((grads_out[0] * scale).to(grads_in[0].dtype), *grads_in[1:])  # autocast may have widened it

        output.grad_fn.register_hook(constant)

    def _root_enters(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.listener is not None:
            self.listener.begins()
        elif self.active:
            self._rng = torch.get_rng_state()
            self._root += 1
            self._open, self._turns = [], {}

    def _root_called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.listener is not None:
            self.listener.leaves(module, output)
            return None
        if not self.active:
            return None
        output, changed = _apart(output)
        call = RootCall(module, args, kwargs, tensors(output))
        call.serial = self._root
        if self.wiring != "none":
            call.returned = [(t.detach(), t._version) for t in tensors(output)]
        if self._rng is not None and not torch.equal(self._rng, torch.get_rng_state()):
            call.rng = self._rng
        self._rng = None
        self._write(call, output)
        return output if changed else None
