"""What is remembered of a module call, and the factors that were pulled back to it."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pullback.errors import CoverageError
from pullback.tape.nest import tensors

_clock = itertools.count()


def wide(t: Tensor) -> Tensor:
    """Half precision as float32, everything else as it is."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


#: device type and dtype of an autocast region
Region = tuple[str, torch.dtype]


def region_of(device: str) -> Region | None:
    """The autocast region we are in, None outside one."""
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def inside(region: Region | None) -> AbstractContextManager[Any]:
    """Enter such a region again."""
    # The weights move between replays: a cache of their casts would be stale.
    return nullcontext() if region is None else torch.autocast(region[0], dtype=region[1], cache_enabled=False)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Out of an autocast region, if in one."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class Entry:
    """The moment a module is entered.

    The tensors it was given reach it as aliases, so that the factor that arrives through this call alone can be
    told from what others who use the same tensor send back. Like a call it lives in the metadata of autograd
    nodes (of those aliases) and never refers to one.

    Attributes:
        module: the module.
        order: position in time among all entries and calls.
        root: serial number of the call of the model it belongs to.
        turn: how many times the module had been entered in that call of the model.
        given: the tensors it was given, detached, each with its version.
    """

    __slots__ = ("given", "module", "order", "root", "turn")

    def __init__(self, module: nn.Module, root: int, turn: int) -> None:
        self.module = module
        self.order = next(_clock)
        self.root = root
        self.turn = turn
        self.given: list[tuple[Tensor, int]] = []


class Gate(ABC):
    """Pulls the columns of a factor back through one call all at once.

    For modules whose backward pass is dear and does not take batches of cotangents (an ODE solved backwards in time).
    Such a module leaves a weak reference to it in its attribute ``_gate``, and the node of its output holds it. Like a
    call it must never refer to an autograd node.

    Attributes:
        closed: while True, the module's own backward pass is to return zeros: the sweep goes on from its input.
    """

    closed: bool = False

    @abstractmethod
    def arrive(self, S: Tensor, weights: Tensor | None) -> None:
        """Be told the columns at the output, so that what they share is done once for all who will ask.

        Args:
            S: shape (r, *shape of the output).
            weights: the costate of the user's own pass as a sum of them, sample by sample, (r, N); None if not known.
        """

    @abstractmethod
    def pull(self, S: Tensor) -> Tensor:
        """The factor at the first input tensor, (r, *its shape), from that at the output, (r, *its shape)."""


class Call:
    """One call of one module: what went in, and nothing that would keep the graph alive.

    It is stored in the metadata of the autograd node that produced the output and dies with it, so a
    forward pass without backward leaves nothing behind. It must never refer to that node: the cycle would
    run through C++ and could not be collected.

    Attributes:
        module: the module.
        args: its positional arguments.
        kwargs: its keyword arguments.
        order: position in time among all calls.
        outputs: number of tensors it returned.
        entry: when it began, if the recorder listens to entries.
        returned: what it returned, detached, with versions, likewise.
        gate: pulls columns from its output back to its input, if the module does that itself.
    """

    __slots__ = ("_versions", "args", "entry", "gate", "kwargs", "module", "order", "outputs", "returned")

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: int) -> None:
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.outputs = outputs
        self.order = next(_clock)
        self.entry: Entry | None = None
        self.returned: list[tuple[Tensor, int]] = []
        self.gate: Gate | None = None
        self._versions = [t._version for t in args if isinstance(t, Tensor)]

    def batch(self) -> int | None:
        """Length of the first axis of the first tensor argument; None without one."""
        for t in tensors((self.args, self.kwargs)):
            if t.ndim:
                return int(t.shape[0])
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first tensor argument without its first axis."""
        for t in self.args:
            if isinstance(t, Tensor):
                return tuple(t.shape[1:])
        return ()

    def check_inputs(self, name: str) -> None:
        """Refuse inputs that were overwritten after the call.

        Args:
            name: the module's name, for the message.

        Raises:
            CoverageError: if an in-place operation changed an input since.
        """
        now = [t._version for t in self.args if isinstance(t, Tensor)]
        if now != self._versions:
            raise CoverageError(
                f"The input of module '{name}' was changed in place after the call, so its rows are lost; "
                "write y = f(x) instead of f_(x) or x += ... there."
            )


class RootCall(Call):
    """A call of the whole model, which can be replayed.

    Attributes:
        rng: state of the CPU generator before the call, None if the call drew nothing.
        rows: length of the first axis of the first tensor it returned.
        grad: whether an input required grad (the replay then records a graph too).
        autocast: device type and dtype of the autocast region it ran in, None outside one.
        serial: number of this call among the calls of the model.
    """

    __slots__ = ("autocast", "grad", "rng", "rows", "serial")

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], returned: Sequence[Tensor]
    ) -> None:
        super().__init__(module, args, kwargs, len(returned))
        self.rows = next((int(t.shape[0]) for t in returned if t.ndim), None)
        self.rng: Tensor | None = None
        self.serial = -1
        found = tensors((args, kwargs))
        self.grad = any(t.requires_grad for t in found)
        self.autocast = region_of(found[0].device.type if found else "cpu")

    def context(self) -> AbstractContextManager[Any]:
        """The autocast region to run the call in again."""
        return inside(self.autocast)


@dataclass
class CallFactor:
    """A call with the factor at its outputs.

    Attributes:
        call: the call.
        r: factor columns.
        parts: the factor at each returned tensor, shape (r, batch, ...), None where it does not reach.
    """

    call: Call
    r: int
    parts: list[Tensor | None] = field(default_factory=list)

    def input(self) -> Tensor:
        """The first argument, detached."""
        x = self.call.args[0] if self.call.args else next(iter(self.call.kwargs.values()))
        assert isinstance(x, Tensor)
        return wide(x.detach())

    def factor(self) -> Tensor:
        """The factor at the only output, shape (r, batch, ...)."""
        (part,) = self.parts
        assert isinstance(part, torch.Tensor)
        return part
