"""Any module at all: per-sample vector-Jacobian products of its own forward."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pullback.errors import CoverageError
from pullback.tape.call import Call, CallFactor, wide
from pullback.tape.functional import called, places_of
from pullback.tape.nest import rebuilt, tensors
from pullback.tape.rules.base import CHUNK_NUMBERS, DenseRows

#: Calls are mapped together up to so many numbers: above, a call is worth its own trouble.
TOGETHER = 1 << 20


@torch.no_grad()  # parameters that are not wanted need no graph
def generic_rows(module: nn.Module, calls: Sequence[CallFactor], wanted: Sequence[str], N: int) -> DenseRows:
    r"""Rows :math:`B_n^\top s_{an}` by ``vmap(vjp)`` over samples, or sample by sample where vmap cannot go.

    Only the wanted parameters are differentiated; the module's children that have rows of their own are run
    again but get none here. Calls that differ in the numbers of their tensors alone, as those of a field at all
    the steps of a solver, are mapped together, as more samples, and then summed.

    Args:
        module: the module, called with a batch of N samples along the first axis of its tensor arguments.
        calls: its calls in one term.
        wanted: dotted names, relative to the module, of the parameters.
        N: samples.

    Raises:
        CoverageError: if the module's forward cannot be differentiated one sample at a time.
    """
    params = {name: _parameter(module, name) for name in wanted}
    n = sum(p.numel() for p in params.values())
    total: Tensor | None = None
    for own in _alike(calls, N):
        group = max(1, TOGETHER // max(1, N * own[0].numbers(n)))
        for start in range(0, len(own), group):
            U = _rows_of_calls(module, own[start : start + group], params, N)
            total = U if total is None else total + U
    assert total is not None
    # In the order of the rows: every product would copy them otherwise.
    rows = total.transpose(0, 1).contiguous()
    return DenseRows(list(params.values()), rows, f"per-sample products of {type(module).__name__}")


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    p = module.get_parameter(name)
    assert isinstance(p, nn.Parameter)
    return p


class _Given:
    """What a call was given, and the factor at what it returned.

    Args:
        call: the call.
        N: samples.

    Attributes:
        tree: positional and keyword arguments.
        leaves: the tensors in it, detached.
        batched: which of them have the samples along their first axis.
        reached: which outputs the factor reaches.
        cotangents: the factor there, each (N, r, ...).
    """

    def __init__(self, call: CallFactor, N: int) -> None:
        self.tree = (call.call.args, dict(call.call.kwargs))
        leaves, shared = tensors(self.tree), _shared(call.call)
        self.batched = [t.ndim > 0 and t.shape[0] == N and t is not shared for t in leaves]
        self.leaves = [wide(t.detach()) for t in leaves]
        self.reached = [k for k, part in enumerate(call.parts) if part is not None]
        self.cotangents = [part.transpose(0, 1) for part in call.parts if part is not None]

    def numbers(self, n: int) -> int:
        """Numbers per sample beside the module's own: rows of n parameters, inputs, factors."""
        given = sum(t[0].numel() if b else t.numel() for t, b in zip(self.leaves, self.batched, strict=True))
        return given + sum(v[0].numel() for v in self.cotangents) + n * self.cotangents[0].shape[1]

    def form(self) -> Any:
        """All but the numbers in the tensors: what calls that are mapped together have in common."""
        factors = tuple(v.shape for v in self.cotangents)
        return _form(self.tree), tuple(self.batched), tuple(self.reached), factors


def _form(part: Any) -> Any:
    """A nest without the numbers in its tensors; containers of other kinds stand for themselves alone."""
    if isinstance(part, Tensor):
        return part.shape, part.dtype
    if type(part) in (tuple, list):
        return type(part), *map(_form, part)
    if type(part) is dict:
        return tuple((key, _form(value)) for key, value in part.items())
    return type(part), part


def _alike(calls: Sequence[CallFactor], N: int) -> list[list[_Given]]:
    """The calls, in lists of those that can be mapped together."""
    out: dict[Any, list[_Given]] = {}
    for call in calls:
        given = _Given(call, N)
        key: Any = id(given)
        if len(calls) > 1:
            with suppress(TypeError):  # an argument that cannot be compared
                form = given.form()
                hash(form)
                key = form
        out.setdefault(key, []).append(given)
    return list(out.values())


@dataclass
class _Sliced:
    """The inputs of calls of one form, to be fed one sample at a time, those of the first call first.

    Attributes:
        tree: positional and keyword arguments of one of them.
        leaves: the tensors in it; with the samples of all calls along the first axis unless they are shared.
        shared: which are the same for all samples of all calls.
        batched: which have an axis of samples in the module's eyes, too, of length one then.
        places: every place of the wanted parameters in the module.
    """

    tree: tuple[tuple[Any, ...], dict[str, Any]]
    leaves: list[Tensor]
    shared: list[bool]
    batched: list[bool]
    places: dict[str, str]

    @classmethod
    def of(cls, calls: Sequence[_Given], N: int, places: dict[str, str]) -> _Sliced:
        """Read it off calls of N samples."""
        batched, leaves, shared = calls[0].batched, list[Tensor](), list[bool]()
        for own, b in zip(zip(*(call.leaves for call in calls), strict=True), batched, strict=True):
            shared.append(not b and all(torch.equal(own[0], t) for t in own[1:]))
            if shared[-1]:
                leaves.append(own[0])
            elif b:
                leaves.append(torch.cat(own))
            else:  # one for every call, such as the time
                leaves.append(torch.stack(own).repeat_interleave(N, 0))
        return cls(calls[0].tree, leaves, shared, batched, places)

    def samples(self) -> list[Tensor]:
        """The tensors that are not shared."""
        return [t for t, s in zip(self.leaves, self.shared, strict=True) if not s]

    def call(self, module: nn.Module, params: dict[str, Tensor], sample: Sequence[Tensor]) -> list[Tensor]:
        """Output tensors for one sample, given by :meth:`samples` without their first axis."""
        following = iter(sample)
        own = [t if s else next(following) for t, s in zip(self.leaves, self.shared, strict=True)]
        values = [t[None] if b else t for t, b in zip(own, self.batched, strict=True)]
        args, kwargs = rebuilt(self.tree, values)
        return tensors(called(module, self.places, params, args, kwargs))


def _shared(call: Call) -> Tensor | None:
    """An argument that is not per sample although as many rows may make it look so: a mask (T, T) at T = N."""
    if not isinstance(call.module, nn.MultiheadAttention):
        return None
    mask = call.kwargs.get("attn_mask", call.args[5] if len(call.args) > 5 else None)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _rows_of_calls(module: nn.Module, calls: Sequence[_Given], params: dict[str, nn.Parameter], N: int) -> Tensor:
    """The sum of the rows (N, r, n) of calls of one form, by vmap over samples, or one by one."""
    inputs = _Sliced.of(calls, N, places_of(module, params))
    own = {name: p.detach() for name, p in params.items()}
    reached = calls[0].reached
    cotangents = [torch.cat(parts) for parts in zip(*(call.cotangents for call in calls), strict=True)]  # (N, r, ...)
    r = cotangents[0].shape[1]

    def one(sample: list[Tensor], v: list[Tensor]) -> Tensor:
        """Rows (r, n) of one sample: inputs without the batch axis, cotangents (r, ...)."""

        def outputs(p: dict[str, Tensor]) -> list[Tensor]:
            found = inputs.call(module, p, sample)
            return [found[k][0] for k in reached]

        pull = torch.func.vjp(outputs, own)[1]

        def rows(column: list[Tensor]) -> Tensor:
            (grads,) = pull(column)
            return torch.cat([grads[name].reshape(-1) for name in own])

        return torch.func.vmap(rows)(v)

    numbers = r * sum(p.numel() for p in own.values())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # vmap falling back to a loop inside
            chunk = max(1, CHUNK_NUMBERS // max(1, numbers))
            U = torch.func.vmap(one, chunk_size=chunk)(inputs.samples(), cotangents)
    except RuntimeError:
        U = None
    if U is not None and U.shape[:2] == (N * len(calls), r):
        return U if len(calls) == 1 else U.unflatten(0, (-1, N)).sum(0)
    # No batching rule, or a faulty one (nested vmap over prelu returns too many rows in torch 2.13).
    if len(calls) > 1:  # or the module reads what differs between calls as a number, and each for itself will do
        return torch.stack([_rows_of_calls(module, [call], params, N) for call in calls]).sum(0)
    return _one_by_one(module, inputs, own, list(zip(reached, cotangents, strict=True)), N)


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
