"""Vector-Jacobian products of a field at one time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def columns(f: Tensor, leaves: Sequence[Any], S: Tensor) -> list[Tensor]:
    """Vector-Jacobian products of every column: one batched pass, or one by one where that cannot be.

    Args:
        f: with a graph.
        leaves: tensors that it depends on, or not, or edges of its graph.
        S: cotangents, (r, *f.shape).

    Returns:
        For every leaf (r, *its shape).
    """
    if not f.requires_grad:
        return [leaf.new_zeros(len(S), *leaf.shape) for leaf in leaves]
    found: Sequence[Sequence[Tensor | None]]
    if len(S) == 1:
        found = [grad(f, leaves, S[0], retain_graph=True)]
        return [full(g, leaf)[None] for g, leaf in zip(found[0], leaves, strict=True)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an operation without a batching rule
            batched = grad(f, leaves, S, retain_graph=True, is_grads_batched=True)
        return [
            leaf.new_zeros(len(S), *leaf.shape) if g is None else g for g, leaf in zip(batched, leaves, strict=True)
        ]
    except RuntimeError:
        found = [grad(f, leaves, s, retain_graph=True) for s in S]
    return [
        torch.stack([full(g, leaf) for g in own]) for leaf, own in zip(leaves, zip(*found, strict=True), strict=True)
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
