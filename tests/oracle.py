"""The slow, obvious twins: dense Jacobians and Hessians by torch.func, float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from pullback.curvature import Block, Linearisation
from pullback.metric import OutputMetric, resolve
from pullback.tape import Tape


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def flat(tree: dict[str, Tensor], lead: int = 0) -> Tensor:
    return torch.cat([t.flatten(lead) for t in tree.values()], -1)


def called(model: nn.Module, p: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """functional_call, after which a module that stands at two places has its own parameters again."""
    kept = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        return functional_call(model, p, args, kwargs)
    finally:
        for module, own in kept:
            module._parameters.update(own)


def jacobian(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], head=lambda z: z) -> Tensor:
    """dz/dw, shape (*z.shape, n), parameters in the order of named_parameters."""

    def f(p: dict[str, Tensor]) -> Tensor:
        return head(called(model, p, args, kwargs))

    J = jacrev(f)(params_of(model))
    shape = f(params_of(model)).shape
    return flat(J, len(shape))


def loss_hessian(criterion: nn.Module, z: Tensor, y: Tensor, upstream: Tensor | None = None) -> Tensor:
    """Hessian of the criterion in the prediction, (numel, numel)."""

    def value(v: Tensor) -> Tensor:
        out = criterion(v, y)
        return (out if upstream is None else out * upstream).sum()

    return jacrev(jacrev(value))(z.detach()).reshape(z.numel(), z.numel())


def linearise(
    model: nn.Module,
    criterion: nn.Module,
    uses: Sequence[tuple[tuple[Any, ...], dict[str, Any], Any]],
    *,
    metric: OutputMetric | None = None,
    sweep: str = "loop",
    head=lambda z: z,
) -> Linearisation:
    """Tape the uses (args, kwargs, target or target-maker) with one backward pass each."""
    tape = Tape(model, criterion, resolve(criterion, metric), sweep)
    model.zero_grad()
    for args, kwargs, target in uses:
        z = head(model(*args, **kwargs))
        y = target(z.detach()) if callable(target) else target
        criterion(z, y).mean().backward()
    lin = Linearisation(tape.terms)
    tape.close()
    return lin


def columns(model: nn.Module, blocks: Sequence[Block]) -> Tensor:
    """Index of every packed number of the blocks in the order of named_parameters."""
    where, start = {}, 0
    for _, p in model.named_parameters():
        if p.requires_grad:
            where[id(p)] = torch.arange(start, start + p.numel())
            start += p.numel()
    return torch.cat([where[id(p)] for block in blocks for p in block.params])


def dense(model: nn.Module, blocks: Sequence[Block]) -> Tensor:
    """U of all blocks, (R, n), parameters in the order of named_parameters."""
    U = torch.cat([block.dense() for block in blocks], 1)
    out = U.new_zeros(U.shape[0], sum(p.numel() for p in model.parameters() if p.requires_grad))
    out[:, columns(model, blocks)] = U
    return out


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    """Largest difference, relative to the largest entry."""
    assert a.shape == b.shape, (a.shape, b.shape)
    miss, scale = float((a - b).abs().max()), float(b.abs().max())
    assert miss <= tolerance * max(scale, 1e-300), f"difference {miss:.2e} at scale {scale:.2e}"
