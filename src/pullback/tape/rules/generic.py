"""Any module at all: per-sample vector-Jacobian products of its own forward."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from pullback.errors import CoverageError
from pullback.tape.call import CallFactor, tensors, wide
from pullback.tape.rules.base import CHUNK_NUMBERS, DenseRows


@torch.no_grad()  # parameters that are not wanted need no graph
def generic_rows(module: nn.Module, calls: Sequence[CallFactor], wanted: Sequence[str], N: int) -> DenseRows:
    r"""Rows :math:`B_n^\top s_{an}` by ``vmap(vjp)`` over samples, or sample by sample where vmap cannot go.

    Only the wanted parameters are differentiated; the module's children that have rows of their own are run
    again but get none here.

    Args:
        module: the module, called with a batch of N samples along the first axis of its tensor arguments.
        calls: its calls in one term.
        wanted: dotted names, relative to the module, of the parameters.
        N: samples.

    Raises:
        CoverageError: if the module's forward cannot be differentiated one sample at a time.
    """
    params = {name: _parameter(module, name) for name in wanted}
    total: Tensor | None = None
    for call in calls:
        U = _rows_of_call(module, call, params, N)
        total = U if total is None else total + U
    assert total is not None
    return DenseRows(list(params.values()), total, f"per-sample products of {type(module).__name__}")


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    p = module.get_parameter(name)
    assert isinstance(p, nn.Parameter)
    return p


def _rows_of_call(module: nn.Module, call: CallFactor, params: dict[str, nn.Parameter], N: int) -> Tensor:
    leaves, spec = pytree.tree_flatten((call.call.args, dict(call.call.kwargs)))
    batched = [isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] == N for t in leaves]
    own = {name: p.detach() for name, p in params.items()}
    index = [k for k, part in enumerate(call.parts) if part is not None]
    cotangents = [call.parts[k].transpose(0, 1) for k in index]  # type: ignore[union-attr]  # (N, r, ...)

    def one(values: list[Any], v: list[Tensor]) -> Tensor:
        """Rows (r, n) of one sample: inputs without the batch axis, cotangents (r, ...)."""
        filled = iter(values)
        inputs = [next(filled)[None] if b else _detached(t) for t, b in zip(leaves, batched, strict=True)]
        args, kwargs = pytree.tree_unflatten(inputs, spec)

        def outputs(p: dict[str, Tensor]) -> list[Tensor]:
            found = tensors(functional_call(module, p, args, kwargs))
            return [found[k][0] for k in index]

        pull = torch.func.vjp(outputs, own)[1]

        def rows(column: list[Tensor]) -> Tensor:
            (grads,) = pull(column)
            return torch.cat([grads[name].reshape(-1) for name in own])

        return torch.func.vmap(rows)(v)

    leaves = [wide(t) if isinstance(t, Tensor) else t for t in leaves]
    samples = [t.detach() for t, b in zip(leaves, batched, strict=True) if b]
    numbers = call.r * sum(p.numel() for p in own.values())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # vmap falling back to a loop inside
            U = torch.func.vmap(one, chunk_size=max(1, CHUNK_NUMBERS // max(1, numbers)))(samples, cotangents)
    except RuntimeError:
        U = None
    if U is None or U.shape[:2] != (N, call.r):
        # No batching rule, or a faulty one (nested vmap over prelu returns too many rows in torch 2.13).
        U = _one_by_one(module, leaves, batched, spec, own, index, cotangents, N)
    return U.transpose(0, 1)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _one_by_one(
    module: nn.Module,
    leaves: list[Any],
    batched: list[bool],
    spec: Any,
    own: dict[str, Tensor],
    index: list[int],
    cotangents: list[Tensor],
    N: int,
) -> Tensor:
    """The same rows with ordinary autograd, one sample at a time: (N, r, n)."""
    rows = []
    leaf = {name: p.clone().requires_grad_() for name, p in own.items()}
    for n in range(N):
        inputs = [t.detach()[n : n + 1] if b else _detached(t) for t, b in zip(leaves, batched, strict=True)]
        args, kwargs = pytree.tree_unflatten(inputs, spec)
        try:
            with torch.enable_grad():
                found = tensors(functional_call(module, leaf, args, kwargs))
                outs = [found[k] for k in index]
            for a in range(cotangents[0].shape[1]):
                # A parameter this sample does not touch has zero derivative; the gradient check sees the rest.
                grads = torch.autograd.grad(
                    outs,
                    list(leaf.values()),
                    [c[n, a][None] for c in cotangents],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                rows.append(torch.cat([g.reshape(-1) for g in grads]))
        except RuntimeError as error:
            raise CoverageError(
                f"{type(module).__name__} cannot be differentiated one sample at a time ({error}); "
                "freeze its parameters or give it a forward that treats samples alike."
            ) from error
    return torch.stack(rows).view(N, -1, rows[0].numel())
