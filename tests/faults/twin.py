"""A healthy step against the dense twin: U^T U, and the step where it is a plain solve."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from closed import CLOSED
from oracle import assert_close, dense, jacobian, linearise, loss_hessian
from pullback.curvature import Block


def compare(run: Any) -> Callable[[Any], None] | None:
    """Remember the model as it is; the answer compares the step that was then taken on a batch.

    Args:
        run: a :class:`play.Run`.

    Returns:
        The comparison, or None where there is no dense twin (float32, random draws, a functional loss).
    """
    draw = run.draw
    random = any(m.training and (isinstance(m, nn.Dropout) or m._buffers) for m in run.model.modules())
    if draw.dtype != torch.float64 or random or draw.functional:
        return None
    twin, before = copy.deepcopy(run.model), _weights(run.model)

    def check(batch: Any) -> None:
        args, kwargs, y = batch
        head, criterion = draw.loss.head, copy.deepcopy(run.criterion)
        lin = linearise(twin, criterion, [(args, kwargs, y)], head=head)
        raw = twin(*args, **kwargs).detach()
        count = criterion(head(raw), y).numel()

        class Headed(nn.Module):
            def forward(self, z: Tensor, target: Tensor) -> Tensor:
                return criterion(head(z), target) / count

        J = jacobian(twin, args, kwargs).reshape(raw.numel(), -1)
        U = dense(twin, lin.blocks)
        H = J.T @ loss_hessian(Headed(), raw, y) @ J
        if float(H.abs().max()) < 1e-60:
            return  # a saturated loss: products of square roots have left the range of float64's precision
        assert_close(U.T @ U, H, 1e-9)
        options, last = draw.options, run.opt.last
        if draw.optimizer in CLOSED.values():
            return  # they have a twin of their own, tests/closed.py
        plain = not any(key in options for key in ("metric", "momentum")) and options["mass"] == "identity"
        if not plain or options["weight_decay"]:
            return
        g = torch.cat([p.grad.reshape(-1) for p in twin.parameters() if p.requires_grad])
        one = len(last.spaces) == 1
        owner = _owners(twin, lin.blocks, one)
        d = -torch.linalg.solve(H * (owner[:, None] == owner[None]) + last.mu * torch.eye(len(g), dtype=g.dtype), g)
        alpha = 1.0 if one else -(g @ d) / (d @ H @ d + last.mu * d @ d)
        moved = _weights(run.model) - before
        assert_close(moved, options["lr"] * alpha * d, 1e-4 if "cg" in str(last.spaces) else 1e-6)

    return check


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def _owners(model: nn.Module, blocks: Sequence[Block], joint: bool) -> Tensor:
    """Number of the group that every trained weight moves in."""
    of = {id(p): 0 if joint else k for k, block in enumerate(blocks) for p in block.params}
    return torch.cat([torch.full((p.numel(),), of[id(p)]) for p in model.parameters() if p.requires_grad])
