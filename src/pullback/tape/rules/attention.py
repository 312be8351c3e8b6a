"""nn.MultiheadAttention: its four projections as the linear layers they are.

Its forward is a function of all its weights at once, so the projections are not seen, and ``out_proj`` is never called
as a module. The attention is therefore run again here from what the call was given, with what every projection took and
returned remembered, and the module's factor is pulled back to those: time steps are positions, and the rows are those
of linear layers (torch.nn.functional.multi_head_attention_forward has the order of the operations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.tape.call import Call, CallFactor, wide
from pullback.tape.rules.base import CHUNK_NUMBERS, DenseRows, Rows
from pullback.tape.rules.beside import BesideRows
from pullback.tape.rules.linear import LinearRows
from pullback.tape.rules.outer import held, joined
from pullback.tape.rules.stacked import StackedRows

#: Parameters of ``out_proj``, which the rule gives rows too.
PROJECTION = frozenset({"out_proj.weight", "out_proj.bias"})

_ARGUMENTS = (
    "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal",
)  # fmt: skip


def undropped(module: nn.MultiheadAttention) -> bool:
    """Whether a second run gives the same numbers (no dropout of attention weights)."""
    return module.dropout == 0 or not module.training


def attended(call: Call) -> int | None:
    """Number of sequences in a call; None without a batch axis."""
    query = _given(call)["query"]
    return int(query.shape[_time_first(call.module)]) if query.ndim == 3 and not query.is_nested else None


def attention_axis(module: nn.Module, output: int) -> int:
    """Axis of the samples in an output: attention weights have theirs first whatever ``batch_first`` says."""
    return 0 if output else _time_first(module)


def _time_first(module: nn.Module) -> int:
    return 0 if getattr(module, "batch_first", False) else 1


def _given(call: Call) -> dict[str, Any]:
    return dict(zip(_ARGUMENTS, call.args, strict=False)) | dict(call.kwargs)


def _alike(call: Call) -> bool:
    """Whether query, key and value are one tensor (or aliases of one)."""
    given = _given(call)
    places = {(t.data_ptr(), t.shape, t.stride()) for t in (given[name] for name in ("query", "key", "value"))}
    return len(places) == 1


@dataclass
class _Run:
    """A run of a call that remembers the projections inside.

    Attributes:
        module: the module.
        alike: whether query, key and value are projected by one map.
        x: inputs by name of the projection (``qkv`` or ``q``, ``k``, ``v``; ``out``), shape (N, P, i).
        y: outputs, on the graph, shape (N, P, o); those of ``bias_k`` and ``bias_v`` are the biases, sample by sample.
    """

    module: nn.MultiheadAttention
    alike: bool
    x: dict[str, Tensor] = field(default_factory=dict)
    y: dict[str, Tensor] = field(default_factory=dict)

    def linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A projection of (N, P, i)."""
        y = F.linear(x, weight.detach(), None if bias is None else bias.detach())
        self.x[name], self.y[name] = x.detach(), y if y.requires_grad else y.requires_grad_()
        return y

    def projected(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Queries, keys and values, each (N, P, E)."""
        m = self.module
        if self.alike:
            return self.linear("qkv", inputs[0], m.in_proj_weight, m.in_proj_bias).chunk(3, 2)
        packed = held(m, "in_proj_weight")
        weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight) if packed is None else packed.chunk(3)
        biases = (None,) * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
        return [self.linear(name, x, W, b) for name, x, W, b in zip("qkv", inputs, weights, biases, strict=True)]

    def extended(self, t: Tensor, name: str) -> Tensor:
        """Keys or values with what the module adds to them: a bias as one more time step, and zeros as another."""
        bias = held(self.module, name)
        if bias is not None:
            self.y[name] = bias.detach().expand(len(t), 1, -1).clone().requires_grad_()
            t = torch.cat([t, self.y[name]], 1)
        return F.pad(t, (0, 0, 0, 1)) if self.module.add_zero_attn else t

    def forward(self, call: Call) -> list[Tensor]:
        """The outputs of a call, on the graph."""
        m, given = self.module, _given(call)
        inputs = [wide(given[name].detach()) for name in ("query", "key", "value")]
        if not m.batch_first:
            inputs = [t.transpose(0, 1) for t in inputs]
        q, k, v = self.projected(inputs)
        steps = k.shape[1]
        k, v = self.extended(k, "bias_k"), self.extended(v, "bias_v")
        q, k, v = (t.unflatten(2, (m.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = (q * m.head_dim**-0.5) @ k.transpose(2, 3)  # (N, H, T, S)
        for mask in _masks(given, scores, steps):
            scores = scores + F.pad(mask, (0, scores.shape[3] - steps))
        # A query that may see nothing attends to nothing.
        blind = (scores == -torch.inf).all(3, keepdim=True)
        share = torch.softmax(scores.masked_fill(blind, 0.0), 3).masked_fill(blind, 0.0)
        context = (share @ v).transpose(1, 2).flatten(2)
        out = self.linear("out", context, m.out_proj.weight, m.out_proj.bias)
        weights = share.mean(1) if given.get("average_attn_weights", True) else share
        return [out if m.batch_first else out.transpose(0, 1), weights]


def _masks(given: dict[str, Any], scores: Tensor, steps: int) -> list[Tensor]:
    """What is added to the scores, shapes that broadcast to (N, H, T, steps)."""
    N, H, T, _ = scores.shape
    padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
    if given.get("is_causal", False) and padding is None and not given.get("need_weights", True):
        # torch then takes the hint for the mask.
        mask = torch.ones(T, steps, dtype=torch.bool, device=scores.device).triu(1)
    out = []
    if mask is not None:
        mask = _added(mask, scores)
        out.append(mask if mask.ndim == 2 else mask.view(N, H, T, steps))
    if padding is not None:
        out.append(_added(padding, scores).view(N, 1, 1, steps))
    return out


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as something to add: True hides."""
    mask = mask.detach()
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)


def _pulled(run: _Run, call: CallFactor) -> dict[str, Tensor]:
    """The factor at the output of every projection of one call, (r, N, P, o) by name."""
    with torch.enable_grad():
        found = run.forward(call.call)
    # Without need_weights there is one output.
    reached = [(z, part) for z, part in zip(found, call.parts, strict=False) if part is not None]
    outputs = [z for z, _ in reached]
    step = max(1, CHUNK_NUMBERS // max(1, found[1].numel() * run.module.num_heads))
    chunks = []
    for a in range(0, call.r, step):
        chunks.append(
            torch.autograd.grad(
                outputs, list(run.y.values()), [part[a : a + step] for _, part in reached],
                allow_unused=True, is_grads_batched=True, retain_graph=True,
            )
        )  # fmt: skip
    return {
        name: y.new_zeros(call.r, *y.shape) if parts[0] is None else joined([p for p in parts if p is not None], 0)
        for (name, y), parts in zip(run.y.items(), zip(*chunks, strict=True), strict=True)
    }


def attention_rows(
    module: nn.MultiheadAttention, calls: Sequence[CallFactor], wanted: frozenset[str], N: int
) -> BesideRows:
    """Rows of an attention: its projections side by side, time steps and calls as positions.

    Args:
        module: the layer.
        calls: its calls in one term.
        wanted: names of its parameters that take part, those of ``out_proj`` among them.
        N: samples.
    """
    alike = held(module, "in_proj_weight") is not None and all(_alike(call.call) for call in calls)
    inputs: dict[str, list[Tensor]] = {}
    factors: dict[str, list[Tensor]] = {}
    for call in calls:
        run = _Run(module, alike)
        for name, part in _pulled(run, call).items():
            factors.setdefault(name, []).append(part)
        for name, t in run.x.items():
            inputs.setdefault(name, []).append(t)
    x = {name: joined(t, 1) for name, t in inputs.items()}
    s = {name: joined(t, 2) for name, t in factors.items()}

    def own(name: str) -> nn.Parameter | None:
        return module.get_parameter(name) if name in wanted else None

    parts: list[Rows] = []
    weight, bias = own("in_proj_weight"), own("in_proj_bias")
    if alike and (weight is not None or bias is not None):
        parts.append(LinearRows(weight, bias, x["qkv"], s["qkv"]))
    elif weight is not None:
        parts.append(StackedRows.of(weight, bias, [(x[name], s[name]) for name in "qkv"]))
    else:
        separate = [(own(f"{name}_proj_weight"), name) for name in "qkv"]
        parts += [LinearRows(p, None, x[name], s[name]) for p, name in separate if p is not None]
        if bias is not None:  # one for all three
            parts.append(DenseRows([bias], torch.cat([s[name].sum(2) for name in "qkv"], 2), "attention"))
    for name in ("bias_k", "bias_v"):
        added = own(name)
        if added is not None:
            parts.append(DenseRows([added], s[name].sum(2), "attention"))
    weight, bias = own("out_proj.weight"), own("out_proj.bias")
    if weight is not None or bias is not None:
        parts.append(LinearRows(weight, bias, x["out"], s["out"]))
    assert all(part.N == N for part in parts)
    return BesideRows(parts, f"attention ({type(module).__name__})")
