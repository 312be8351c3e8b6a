r"""Hosts: optimizers whose curvature :math:`Q_{uu}` the policies of single samples answer with.

A host moves the weights by :math:`k = -Q_{uu}^{-1} g` in its own way, with whatever momentum, weight decay or averages
it keeps. A policy adds :math:`-Q_{uu}^{-1} v` for other vectors v, so it asks the host for that product and nothing
else. For torch's own (all diagonal; learning rate :math:`\eta`):

.. math:: Q_{uu} = \tfrac1\eta I \;\text{(SGD)}, \qquad
          \tfrac1\eta \bigl(\sqrt{E[g \cdot g]} + \epsilon\bigr) \;\text{(RMSprop, Adam; Adam's mean debiased)}

(Liu, Chen & Theodorou, arXiv 2510.14168, with the host's own gradient in place of Q_u in the averages).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pullback.curvature import Block
from pullback.tape import OuterRows

#: entries of a diagonal Q_uu^{-1}: a number, or a tensor in the shape of the parameter
Diagonal = float | Tensor

#: makes an optimizer (or a host) from parameters or groups
MakeHost = Callable[[list[Any]], Any]

NAMED: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
}


@runtime_checkable
class Host(Protocol):
    """What a policy needs of its host.

    In a step it is called in this order: :meth:`keep`, :meth:`prepare`, :meth:`advance`, then :meth:`diagonal` or
    :meth:`solve` any number of times, :meth:`shorten` if less than the whole step is taken, and :meth:`put_back` if
    the step fails.
    """

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Holds the parameter groups and the state, which are shared with the optimizer on top."""

    def prepare(self, blocks: Sequence[Block]) -> None:
        """Take notice of the rows of this step, before anything moves; may do nothing.

        Args:
            blocks: parameters and their rows of U.
        """

    def advance(self) -> None:
        """Move the weights by the host's own step on ``p.grad``."""

    def diagonal(self, params: Sequence[Tensor]) -> list[Diagonal] | None:
        """Q_uu^{-1} of a block, where it is diagonal; None where it is not.

        Args:
            params: parameters of the block.
        """

    def solve(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Q_uu^{-1} v, fresh tensors.

        Args:
            params: parameters of one block.
            tensors: v by parameter, shape (*any, *shape of the parameter).
        """

    def shorten(self, share: float) -> None:
        """Take notice that the step was shortened: what it hands on to the next ones is to be as well.

        Args:
            share: of the step, from 0 to 1.
        """

    def keep(self) -> object:
        """The state before a step, for :meth:`put_back`."""

    def put_back(self, kept: object) -> None:
        """Be as before the step, but for the weights.

        Args:
            kept: what :meth:`keep` returned.
        """


class TorchHost:
    """One of torch's optimizers as a host.

    Args:
        optimizer: a ``torch.optim.SGD``, ``RMSprop``, ``Adam`` or ``AdamW``.

    Raises:
        TypeError: if it is another one.
        ValueError: if it maximises.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        kinds = (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adam, torch.optim.AdamW)
        if not isinstance(optimizer, kinds):
            raise TypeError(
                f"The curvature of {type(optimizer).__name__} is not known; use torch's SGD, RMSprop, Adam or AdamW, "
                "or write a pullback.control.Host."
            )
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError("A host minimises, got maximize=True; change the sign of the loss.")
        self.optimizer: torch.optim.Optimizer = optimizer
        self._inverse: dict[int, Diagonal] = {}

    def prepare(self, blocks: Sequence[Block]) -> None:
        """Nothing: its averages are of the gradient. See :class:`Host`."""

    def advance(self) -> None:
        """See :class:`Host`."""
        self._inverse.clear()
        self.optimizer.step()

    def diagonal(self, params: Sequence[Tensor]) -> list[Diagonal]:
        """See :class:`Host`."""
        if not self._inverse:
            for group in self.optimizer.param_groups:
                self._invert(group)
        return [self._inverse[id(p)] for p in params]

    def solve(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`Host`."""
        return [t * d for t, d in zip(tensors, self.diagonal(params), strict=True)]

    def shorten(self, share: float) -> None:
        """Momentum is shortened. See :class:`Host`."""
        running = [own.get(key) for own in self.optimizer.state.values() for key in ("momentum_buffer", "exp_avg")]
        found = [t for t in running if isinstance(t, Tensor)]
        if found:
            torch._foreach_mul_(found, share)

    def keep(self) -> dict[Any, dict[str, Any]]:
        """See :class:`Host`."""
        state = self.optimizer.state
        return {
            p: {key: value.clone() if isinstance(value, Tensor) else value for key, value in own.items()}
            for p, own in state.items()
        }

    def put_back(self, kept: object) -> None:
        """See :class:`Host`."""
        assert isinstance(kept, dict)
        self.optimizer.state.clear()
        self.optimizer.state.update(kept)
        self._inverse.clear()

    def _invert(self, group: dict[str, Any]) -> None:
        """Q_uu^{-1} of a group, from the averages as :meth:`advance` has left them."""
        lr = float(group["lr"])
        if isinstance(self.optimizer, torch.optim.SGD):
            self._inverse.update((id(p), lr) for p in group["params"])
            return
        params = [p for p in group["params"] if self.optimizer.state.get(p)]
        if not params:
            return
        roots = torch._foreach_sqrt([self._square(p, group) for p in params])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_reciprocal_(roots)
        torch._foreach_mul_(roots, lr)
        self._inverse.update(zip(map(id, params), roots, strict=True))

    def _square(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """E[g . g] as the optimizer divides by it, shape of p."""
        state = self.optimizer.state[p]
        if isinstance(self.optimizer, torch.optim.RMSprop):
            mean: Tensor = state["square_avg"]
            return torch.addcmul(mean, state["grad_avg"], state["grad_avg"], value=-1) if group["centered"] else mean
        largest: Tensor = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        return largest.div(1 - float(group["betas"][1]) ** float(state["step"]))


class Raised:
    r"""A host's curvature with :math:`\epsilon` added on its diagonal, for what a policy adds.

    The host's own step stays as it is.

    Args:
        host: the host; if its curvature is not diagonal, epsilon must be 0.
        eps: the Tikhonov term, at least 0.
    """

    def __init__(self, host: Host, eps: float = 0.0) -> None:
        self.host = host
        self.eps = eps

    def diagonal(self, params: Sequence[Tensor]) -> list[Diagonal] | None:
        r""":math:`(Q_{uu} + \epsilon)^{-1}`, or None where that is not diagonal.

        Args:
            params: parameters of a block.

        Raises:
            ValueError: if the host's curvature is not diagonal and epsilon is not 0.
        """
        inverse = self.host.diagonal(params)
        if self.eps == 0:
            return inverse
        if inverse is None:
            raise ValueError(f"eps is {self.eps}, but the host's curvature is not diagonal; give the host its damping.")
        return [d / (1 + self.eps * d) for d in inverse]

    def outer(self, rows: OuterRows) -> tuple[Tensor, Tensor] | None:
        """What the host says of rows that are outer products, if it can; see :class:`pullback.control.forms`."""
        own = getattr(self.host, "outer", None)
        return None if own is None or self.eps else own(rows)

    def solve(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        r""":math:`(Q_{uu} + \epsilon)^{-1} v`; see :meth:`Host.solve`."""
        if self.eps == 0:
            return self.host.solve(params, tensors)
        inverse = self.diagonal(params)
        assert inverse is not None
        return [t * d for t, d in zip(tensors, inverse, strict=True)]


def host_of(host: str | MakeHost, params: Iterable[Any], lr: float | None, options: dict[str, Any]) -> Host:
    """The host that was asked for.

    Args:
        host: ``"sgd"``, ``"rmsprop"``, ``"adam"``, or what makes an optimizer or a :class:`Host`.
        params: parameters or groups.
        lr: learning rate of a named host; None for its own default.
        options: further options of a named host.

    Raises:
        TypeError, ValueError: if it is not one of them, or a host that is made comes with options.
    """
    params = list(params)
    if isinstance(host, str):
        if host not in NAMED:
            raise ValueError(f"host must be one of {', '.join(NAMED)}, or make an optimizer; got {host!r}.")
        if lr is not None:
            options = {"lr": lr, **options}
        make: Callable[..., torch.optim.Optimizer] = NAMED[host]
        return TorchHost(make(params, **options))
    if not callable(host) or isinstance(host, torch.optim.Optimizer):
        raise TypeError(
            f"host must be a name or make an optimizer from parameters, got {type(host).__name__}; write "
            "host=lambda params: torch.optim.SGD(params, lr=0.1)."
        )
    if lr is not None or options:
        named = ", ".join([*(["lr"] if lr is not None else []), *options])
        raise ValueError(f"{named} belong to the optimizer that host makes; give them there.")
    made = host(params)
    if isinstance(made, torch.optim.Optimizer):
        return TorchHost(made)
    if isinstance(made, Host):
        return made
    raise TypeError(f"host made a {type(made).__name__}; it must make a torch optimizer or a pullback.control.Host.")
