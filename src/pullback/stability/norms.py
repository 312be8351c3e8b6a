r"""Norms of the gradients of single samples without the gradients, for chains of linear layers.

The gradient of sample i by a linear layer's weight is the outer product of costate and input, so that in a chain
:math:`|\nabla l_i|^2 = \sum_{layers} |\delta_i|^2 (|a_i|^2 + 1)`: one backward pass for all samples, where the
gradients themselves take n numbers per weight (Goodfellow 2015, arXiv:1510.01799).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import vmap

#: What acts on every number by itself and has no parameters.
_ELEMENTWISE = (
    nn.Identity, nn.Tanh, nn.Sigmoid, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus,
)  # fmt: skip


def is_chain(model: nn.Module, inputs: Tensor) -> bool:
    """Whether the model is a Sequential of linear layers, each used once, and elementwise functions, on rows.

    Args:
        model: the model; subclasses and hooks, which could do anything else, are no chain, nor is a frozen weight.
        inputs: what it is called with.
    """
    if type(model) is not nn.Sequential or inputs.ndim != 2 or not inputs.is_floating_point():
        return False
    parts = list(model)
    if any(part._forward_hooks or part._forward_pre_hooks for part in (model, *parts)):
        return False
    linear = [part for part in parts if type(part) is nn.Linear]
    if any(part not in linear and type(part) not in _ELEMENTWISE for part in parts):
        return False
    params = [p for part in linear for p in part.parameters()]
    return len({id(p) for p in params}) == len(params) and all(p.requires_grad for p in params)


def chain_norms(model: nn.Module, criterion: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The norms of the gradients of single samples, (n,), at the model's weights.

    Args:
        model: a chain, see :func:`is_chain`.
        criterion: a loss module that gives the loss of one sample for rows of one.
        inputs: (n, ...).
        targets: (n, ...).
    """

    def loss(z: Tensor, y: Tensor) -> Tensor:
        value: Tensor = criterion(z[None], y[None])
        return value

    with torch.enable_grad():
        z, shares, outer = _run(model, inputs)
        costates = torch.autograd.grad(vmap(loss)(z, targets).sum(), outer)
    return torch.stack([d.square().sum(1) * a for d, a in zip(costates, shares, strict=True)]).sum(0).sqrt()


def chain_grams(model: nn.Module, inputs: Tensor) -> Tensor:
    """``J J^T`` of the outputs in the weights for single samples, (n, c, c), by a backward pass for every output.

    Args:
        model: a chain, see :func:`is_chain`.
        inputs: (n, ...).
    """
    with torch.enable_grad():
        z, shares, outer = _run(model, inputs)
        rows = [torch.autograd.grad(z[:, k].sum(), outer, retain_graph=True) for k in range(z.shape[1])]
    layers = [torch.stack(costates, 1) for costates in zip(*rows, strict=True)]
    return torch.stack([a[:, None, None] * (D @ D.mT) for D, a in zip(layers, shares, strict=True)]).sum(0)


def _run(model: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Outputs (n, c); by linear layer ``|a|^2 + 1`` of its inputs (n,), 1 for the bias; its outputs (n, width)."""
    assert isinstance(model, nn.Sequential)
    z, shares, outer = inputs, [], []
    for part in model:
        before, z = z, part(z)
        if isinstance(part, nn.Linear):
            shares.append(before.detach().square().sum(1) + (1.0 if part.bias is not None else 0.0))
            outer.append(z)
    return z, shares, outer
