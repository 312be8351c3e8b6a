"""Any module at all: per-sample vector-Jacobian products of its own forward."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pullback.errors import CoverageError
from pullback.tape.call import Call, CallFactor, wide
from pullback.tape.functional import called, places_of
from pullback.tape.nest import rebuilt, tensors
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


@dataclass
class _Sliced:
    """The inputs of a call, to be fed one sample at a time.

    Attributes:
        tree: positional and keyword arguments.
        leaves: the tensors in it, detached.
        batched: which of them have the samples along their first axis.
        places: every place of the wanted parameters in the module.
    """

    tree: tuple[tuple[Any, ...], dict[str, Any]]
    leaves: list[Tensor]
    batched: list[bool]
    places: dict[str, str]

    @classmethod
    def of(cls, call: Call, N: int, places: dict[str, str]) -> _Sliced:
        """Read it off a call of N samples."""
        tree = (call.args, dict(call.kwargs))
        shared = _shared(call)
        leaves = tensors(tree)
        batched = [t.ndim > 0 and t.shape[0] == N and t is not shared for t in leaves]
        return cls(tree, [wide(t.detach()) for t in leaves], batched, places)

    def samples(self) -> list[Tensor]:
        """The tensors that have samples."""
        return [t for t, b in zip(self.leaves, self.batched, strict=True) if b]

    def call(self, module: nn.Module, params: dict[str, Tensor], sample: Sequence[Tensor]) -> list[Tensor]:
        """Output tensors for one sample, given by :meth:`samples` without their first axis."""
        following = iter(sample)
        values = [next(following)[None] if b else t for t, b in zip(self.leaves, self.batched, strict=True)]
        args, kwargs = rebuilt(self.tree, values)
        return tensors(called(module, self.places, params, args, kwargs))


def _shared(call: Call) -> Tensor | None:
    """An argument that is not per sample although as many rows may make it look so: a mask (T, T) at T = N."""
    if not isinstance(call.module, nn.MultiheadAttention):
        return None
    mask = call.kwargs.get("attn_mask", call.args[5] if len(call.args) > 5 else None)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _rows_of_call(module: nn.Module, call: CallFactor, params: dict[str, nn.Parameter], N: int) -> Tensor:
    """Rows (r, N, n) by vmap over samples, or one by one."""
    inputs = _Sliced.of(call.call, N, places_of(module, params))
    own = {name: p.detach() for name, p in params.items()}
    reached = [(k, part.transpose(0, 1)) for k, part in enumerate(call.parts) if part is not None]
    cotangents = [part for _, part in reached]  # (N, r, ...)

    def one(sample: list[Tensor], v: list[Tensor]) -> Tensor:
        """Rows (r, n) of one sample: inputs without the batch axis, cotangents (r, ...)."""

        def outputs(p: dict[str, Tensor]) -> list[Tensor]:
            found = inputs.call(module, p, sample)
            return [found[k][0] for k, _ in reached]

        pull = torch.func.vjp(outputs, own)[1]

        def rows(column: list[Tensor]) -> Tensor:
            (grads,) = pull(column)
            return torch.cat([grads[name].reshape(-1) for name in own])

        return torch.func.vmap(rows)(v)

    numbers = call.r * sum(p.numel() for p in own.values())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # vmap falling back to a loop inside
            chunk = max(1, CHUNK_NUMBERS // max(1, numbers))
            U = torch.func.vmap(one, chunk_size=chunk)(inputs.samples(), cotangents)
    except RuntimeError:
        U = None
    if U is None or U.shape[:2] != (N, call.r):
        # No batching rule, or a faulty one (nested vmap over prelu returns too many rows in torch 2.13).
        U = _one_by_one(module, inputs, own, reached, N)
    # In the order of the rows: every product would copy them otherwise.
    return U.transpose(0, 1).contiguous()


def _one_by_one(
    module: nn.Module,
    inputs: _Sliced,
    own: dict[str, Tensor],
    reached: list[tuple[int, Tensor]],
    N: int,
) -> Tensor:
    """The same rows with ordinary autograd, one sample at a time: (N, r, n)."""
    rows = []
    leaf = {name: p.clone().requires_grad_() for name, p in own.items()}
    for n in range(N):
        try:
            with torch.enable_grad():
                found = inputs.call(module, leaf, [t[n] for t in inputs.samples()])
            outs = [found[k] for k, _ in reached]
            grads = _columns(outs, list(leaf.values()), [part[n, :, None] for _, part in reached])
            rows.append(torch.cat([g.flatten(1) for g in grads], 1))
        except RuntimeError as error:
            raise CoverageError(
                f"{type(module).__name__} cannot be differentiated one sample at a time ({error}); "
                "freeze its parameters or give it a forward that treats samples alike."
            ) from error
    return torch.stack(rows)


def _columns(outs: list[Tensor], leaves: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    """Vector-Jacobian products for all columns (r, ...): in one batched pass, or one by one."""
    options = {"retain_graph": True, "allow_unused": True}
    r = cotangents[0].shape[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            grads = torch.autograd.grad(outs, leaves, cotangents, is_grads_batched=True, **options)
        if all(g is None or g.shape == (r, *p.shape) for g, p in zip(grads, leaves, strict=True)):
            return [p.new_zeros(r, *p.shape) if g is None else g for g, p in zip(grads, leaves, strict=True)]
    except RuntimeError:
        pass  # an operation without a batching rule
    parts = [torch.autograd.grad(outs, leaves, [c[a] for c in cotangents], **options) for a in range(r)]
    return [
        torch.stack([torch.zeros_like(p) if g is None else g for g in column])
        for p, column in zip(leaves, zip(*parts, strict=True), strict=True)
    ]
