"""Vector-Jacobian products of a field at one time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from pullback.tape.memory import Sizes

#: So few columns are quicker one by one in any field, and any number in a field whose operations give so many numbers
#: (both measured on one thread, networks of 32 to 256 units and 8 to 16 channels).
FEW, LARGE = 2, 1 << 16


def batches(f: Tensor, r: int) -> bool:
    """Whether r columns are pulled back quicker in one batched pass than one by one.

    One by one every column pays for the calls again, batched products are the slower ones: that pays for small fields.

    Args:
        f: the field, with its graph.
        r: columns.
    """
    if r <= FEW or not f.requires_grad:
        return False
    return f.device.type != "cpu" or Sizes.of(get_gradient_edge(f), [], {}, 1).graph <= LARGE


def columns(f: Tensor, leaves: Sequence[Any], S: Tensor, batched: bool) -> list[Tensor]:
    """Vector-Jacobian products of every column: one batched pass where that is asked for and can be, or one by one.

    Args:
        f: with a graph.
        leaves: tensors that it depends on, or not, or edges of its graph.
        S: cotangents, (r, *f.shape).
        batched: see :func:`batches`.

    Returns:
        For every leaf (r, *its shape).
    """
    if not f.requires_grad:
        return [leaf.new_zeros(len(S), *leaf.shape) for leaf in leaves]
    if batched:
        with suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an operation without a batching rule
            found = grad(f, leaves, S, retain_graph=True, is_grads_batched=True)
            return [
                leaf.new_zeros(len(S), *leaf.shape) if g is None else g for g, leaf in zip(found, leaves, strict=True)
            ]
    each = [grad(f, leaves, s, retain_graph=True) for s in S]
    if len(S) == 1:
        return [full(g, leaf)[None] for g, leaf in zip(each[0], leaves, strict=True)]
    return [
        torch.stack([full(g, leaf) for g in own]) for leaf, own in zip(leaves, zip(*each, strict=True), strict=True)
    ]


def grad(f: Tensor, leaves: Sequence[Any], v: Tensor, **options: Any) -> tuple[Tensor | None, ...]:
    """One vector-Jacobian product, None for a leaf that f does not depend on."""
    return torch.autograd.grad(f, list(leaves), v, allow_unused=True, **options)


def full(g: Tensor | None, leaf: Any) -> Tensor:
    """A product, zeros for None."""
    return leaf.detach().new_zeros(leaf.shape) if g is None else g


def rms(t: Tensor) -> float:
    """Root mean square, 0 for nothing."""
    return float(t.square().mean().sqrt()) if t.numel() else 0.0
