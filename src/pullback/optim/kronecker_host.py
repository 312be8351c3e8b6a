r"""``Kronecker`` as a host: policies on the damped Kronecker metric.

.. math:: Q_{uu} = \tfrac{1}{\eta\nu} (\bar A_l + \sqrt\delta\,\bar a_l I) \otimes (\bar B_l + \sqrt\delta\,\bar b_l I)

with :math:`\nu` the length of this step: what :class:`~pullback.Kronecker` steps with, but for its momentum. The host
looks at the columns that are swept for the policies, at the steps at which it would look; it has no tape of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pullback.control.host import MakeHost
from pullback.curvature import Averaged, Block
from pullback.curvature.eigen import EigenBlock
from pullback.curvature.kronecker import KroneckerBlock, SmallBlock
from pullback.errors import StepError
from pullback.metric import Criteria, Metrics
from pullback.optim.kronecker import Kronecker
from pullback.tape import OuterRows, Term


class KroneckerHost:
    """A :class:`~pullback.Kronecker` that is handed its terms.

    Args:
        inner: the optimizer; its tape is taken off the model.

    Attributes:
        optimizer: ``inner``.
    """

    def __init__(self, inner: Kronecker) -> None:
        self.optimizer: Kronecker = inner
        inner._tape.close()
        inner._guard = None  # steps are guarded by who takes them
        self._terms: list[Term] = []
        self._loss = 0.0

    @classmethod
    def named(
        cls, model: nn.Module, criterion: Criteria, metric: Metrics, params: Any, lr: float | None, options: Any
    ) -> KroneckerHost:
        """The host called ``"kronecker"``.

        Args:
            model: as of the optimizer on top.
            criterion: the same.
            metric: the same.
            params: the same.
            lr: None for 1.
            options: further options.

        Raises:
            TypeError, ValueError: if an option is not one of Kronecker's.
        """
        if "columns" in options:
            raise ValueError("The columns of the host are those of the policies: rank=1, or rank=None for exact ones.")
        rate = 1.0 if lr is None else lr
        return cls(Kronecker(model, criterion, metric=metric, columns="exact", params=params, lr=rate, **options))

    @property
    def metric(self) -> Metrics:
        """The metric of every criterion, in the form in which those were given."""
        metrics = [own for _, own in self.optimizer.losses]
        criterion = self.optimizer.criterion
        if isinstance(criterion, dict):
            return dict(zip(criterion, metrics, strict=True))
        return metrics if isinstance(criterion, list | tuple) else metrics[0]

    @property
    def looks(self) -> bool:
        """Whether the metric is to be looked at in this step."""
        return not self.optimizer._idle()

    def note(self, terms: list[Term], loss: float) -> None:
        """What this step may look at.

        Args:
            terms: the terms of the step.
            loss: their loss.
        """
        self._terms, self._loss = terms if self.looks else [], loss

    def prepare(self, blocks: Sequence[Block]) -> None:
        """Nothing: :meth:`note` has the terms. See :class:`pullback.control.Host`."""

    def advance(self) -> None:
        """See :class:`pullback.control.Host`."""
        terms, self._terms = self._terms, []
        self.optimizer._advance(terms, self._loss, True, None)

    def shorten(self, share: float) -> None:
        """The running steps are shortened. See :class:`pullback.control.Host`."""
        running = [block.velocity for block in self.optimizer.blocks if block.velocity is not None]
        if running:
            torch._foreach_mul_(running, share)

    # -- products with the inverse ------------------------------------------------------------------------

    def diagonal(self, params: Sequence[Tensor]) -> None:
        """Not diagonal. See :class:`pullback.control.Host`."""

    def solve(self, params: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`pullback.control.Host`."""
        place = {id(p): k for k, p in enumerate(params)}
        out: dict[int, Tensor] = {}
        for block in self._blocks(params):
            own = [place[id(p)] for p in block.params]
            solved = solved_rows(block, [tensors[k] for k in own])
            out |= {k: t * self._scale(block.params[0]) for k, t in zip(own, solved, strict=True)}
        return [out[k] for k in range(len(params))]

    def outer(self, rows: OuterRows) -> tuple[Tensor, Tensor] | None:
        """Both sides of rows at one position, each times its side of Q_uu^{-1}; None where there are no sides.

        Args:
            rows: outer products of s (r, N, o) and x (N, i), extended by 1 where there is a bias.

        Returns:
            Shapes (r, N, o) and (N, i).
        """
        block = self.optimizer._averages._by_weight.get(id(rows.params[0]))
        if type(block) is not KroneckerBlock or block.params != tuple(rows.params) or block.shape[0] > 1:
            return None
        s, x = rows.s[:, :, 0], extended(rows)
        left = block.left.from_left(s.reshape(1, -1, s.shape[2]).mT)[0].T.view(s.shape)
        return left * self._scale(block.params[0]), block.right.from_right(x[None])[0]

    def _blocks(self, params: Sequence[Tensor]) -> list[Averaged]:
        known = self.optimizer._averages._by_weight
        blocks = list({id(known[id(p)]): known[id(p)] for p in params if id(p) in known}.values())
        if {id(p) for block in blocks for p in block.params} != {id(p) for p in params}:
            raise StepError(
                "A module's parameters have no Kronecker metric, or share one with another module's; use another host."
            )
        return blocks

    def _scale(self, p: Tensor) -> float:
        rates = {id(q): float(group["lr"]) for group in self.optimizer.param_groups for q in group["params"]}
        last = self.optimizer.last
        assert last is not None
        return rates[id(p)] * last.scale

    # -- all or nothing -------------------------------------------------------------------------------------

    def keep(self) -> dict[str, Any]:
        """See :class:`pullback.control.Host`. Between looks the averages stay, and need no copy."""
        inner = self.optimizer
        kept: dict[str, Any] = {"last": inner.last}
        if self.looks:
            return {**kept, "state": copy.deepcopy(inner._state())}
        velocity = {block: None if block.velocity is None else block.velocity.clone() for block in inner.blocks}
        return {
            **kept, "count": inner._count, "next": inner._next, "velocity": velocity, "stride": inner._stride.keep(),
        }  # fmt: skip

    def put_back(self, kept: object) -> None:
        """See :class:`pullback.control.Host`."""
        assert isinstance(kept, dict)
        inner = self.optimizer
        inner.last = kept["last"]
        if "state" in kept:
            inner._load(kept["state"])
            return
        inner._count, inner._next = kept["count"], kept["next"]
        inner._stride.put_back(kept["stride"])
        for block, velocity in kept["velocity"].items():
            block.velocity = velocity


def extended(rows: OuterRows) -> Tensor:
    """Inputs at one position, with a 1 behind them where there is a bias, (N, i)."""
    x = rows.input_rows(0, None)[:, 0]
    return x if rows.bias is None else torch.cat([x, x.new_ones(len(x), 1)], 1)


def solved_rows(block: Averaged, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The damped inverse of a block times many vectors at once.

    Args:
        block: the running metric of some parameters.
        tensors: by parameter, shape (*any, *shape of the parameter).

    Returns:
        In the shapes of ``tensors``.
    """
    lead = tensors[0].shape[: tensors[0].ndim - block.params[0].ndim]
    if not lead:
        return block.parted(block.solve(block.gathered(tensors)))
    flat = [t.reshape(-1, *p.shape) for t, p in zip(tensors, block.params, strict=True)]
    if isinstance(block, SmallBlock):
        vectors = torch.cat([t.flatten(1) for t in flat], 1)
        solved = block.side.from_left(vectors.T[None])[0].T
        parts = list(solved.split([p.numel() for p in block.params], 1))
    elif type(block) in (KroneckerBlock, EigenBlock):
        assert isinstance(block, KroneckerBlock)
        X = _sided(block, torch.cat([t.reshape(len(t), *block.shape[:2], -1) for t in flat], 3))
        parts = [X] if len(flat) == 1 else [X[..., : block.shape[2]], X[..., block.shape[2]]]
    else:
        rows = [block.parted(block.solve(block.gathered(own))) for own in zip(*flat, strict=True)]
        parts = [torch.stack(own) for own in zip(*rows, strict=True)]
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]


def _sided(block: KroneckerBlock, X: Tensor) -> Tensor:
    """Both sides of the inverse around X, shape (many, groups, left, right)."""
    if isinstance(block, EigenBlock):
        assert block.bases is not None
        assert block.inverse is not None
        P, Q = block.bases
        return P @ (P.mT @ X @ Q * block.inverse) @ Q.mT
    L, G, high, wide = X.shape
    X = block.left.from_left(X.permute(1, 2, 0, 3).reshape(G, high, L * wide)).view(G, high, L, wide)
    X = block.right.from_right(X.transpose(1, 2).reshape(G, L * high, wide)).view(G, L, high, wide)
    return X.transpose(0, 1)


def adapted(host: str | MakeHost) -> str | MakeHost:
    """The same, but a Kronecker that it makes becomes a host.

    Args:
        host: a name, or what makes an optimizer or host from parameters.
    """
    if isinstance(host, str) or not callable(host) or isinstance(host, torch.optim.Optimizer):
        return host
    make: MakeHost = host

    def made_of(params: list[Any]) -> Any:
        made = make(params)
        return KroneckerHost(made) if isinstance(made, Kronecker) else made

    return made_of
