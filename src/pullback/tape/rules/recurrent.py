"""RNN, GRU, LSTM and their cells: linear layers called at every time step.

Their forward is one operation to autograd, so the linear maps inside are not seen. It is therefore run
again here as written in torch's documentation, with the output of every linear map remembered, and the
module's factor is pulled back to those: time steps are positions, and the rows are those of linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.tape.call import Call, CallFactor, wide
from pullback.tape.nest import tensors
from pullback.tape.rules.base import Rows
from pullback.tape.rules.beside import BesideRows
from pullback.tape.rules.linear import LinearRows
from pullback.tape.rules.outer import held, joined

Recurrent = nn.RNNBase | nn.RNNCellBase
State = tuple[Tensor, ...]


def repeatable(module: nn.RNNBase) -> bool:
    """Whether a second run gives the same numbers (no dropout between layers)."""
    return module.dropout == 0 or not module.training or module.num_layers == 1


def sequences(call: Call) -> int | None:
    """Number of sequences in a call; None without a batch axis, or for packed ones."""
    x = call.args[0] if call.args else call.kwargs["input"]
    if isinstance(call.module, nn.RNNCellBase):
        return int(x.shape[0]) if x.ndim == 2 else None
    if not isinstance(x, Tensor) or x.ndim != 3:
        return None
    return int(x.shape[_time_first(call.module)])


def batch_axis(module: nn.Module, output: int) -> int:
    """Axis of the samples in an output: final states have theirs second whatever ``batch_first`` says."""
    return 0 if isinstance(module, nn.RNNCellBase) else 1 if output else _time_first(module)


def _time_first(module: nn.Module) -> int:
    return 0 if getattr(module, "batch_first", True) else 1


@dataclass
class _Run:
    """A forward pass that remembers the linear maps inside.

    Attributes:
        module: the module.
        x: inputs by name of the weight, one per time they were used, shape (N, P, i).
        y: outputs likewise, on the graph.
        bias: name of the bias that goes with a weight, if any.
    """

    module: Recurrent
    x: dict[str, list[Tensor]] = field(default_factory=dict)
    y: dict[str, list[Tensor]] = field(default_factory=dict)
    bias: dict[str, str | None] = field(default_factory=dict)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """The linear map with weight ``name`` on (N, i) or (N, T, i)."""
        weight, bias = held(self.module, name), held(self.module, name.replace("weight", "bias"))
        assert weight is not None
        y = F.linear(x, weight.detach(), None if bias is None else bias.detach())
        if not y.requires_grad:
            y.requires_grad_()
        self.x.setdefault(name, []).append(x.detach().reshape(x.shape[0], -1, x.shape[-1]))
        self.y.setdefault(name, []).append(y)
        self.bias[name] = None if bias is None else name.replace("weight", "bias")
        return y

    def step(self, kind: str, suffix: str, i: Tensor, state: State) -> State:
        """One time step from the mapped input (N, gates) and the state (h,) or (h, c)."""
        h = self.linear("weight_hh" + suffix, state[0])
        if kind == "GRU":
            (ir, iz, inew), (hr, hz, hnew) = i.chunk(3, 1), h.chunk(3, 1)
            z = torch.sigmoid(iz + hz)
            return ((1 - z) * torch.tanh(inew + torch.sigmoid(ir + hr) * hnew) + z * state[0],)
        if kind == "LSTM":
            enter, forget, new, out = (i + h).chunk(4, 1)
            c = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
            hidden = torch.sigmoid(out) * torch.tanh(c)
            if "weight_hr" + suffix in self.module._parameters:
                hidden = self.linear("weight_hr" + suffix, hidden)
            return hidden, c
        return (torch.tanh(i + h) if kind == "RNN_TANH" else torch.relu(i + h),)

    def sequence(self, x: Tensor, initial: State | None) -> list[Tensor]:
        """All layers and directions over (N, T, i); outputs as the module returns them."""
        m = self.module
        assert isinstance(m, nn.RNNBase)
        ways, N = 2 if m.bidirectional else 1, x.shape[0]
        if initial is None:
            lead = (m.num_layers * ways, N)
            initial = (x.new_zeros(*lead, m.proj_size or m.hidden_size),)
            initial += (x.new_zeros(*lead, m.hidden_size),) * (m.mode == "LSTM")
        last: list[State] = []
        for layer in range(m.num_layers):
            outputs = []
            for way in range(ways):
                suffix = f"_l{layer}" + "_reverse" * way
                gates = self.linear("weight_ih" + suffix, x)
                state = tuple(part[layer * ways + way] for part in initial)
                times = range(x.shape[1])
                hidden = {}
                for t in reversed(times) if way else times:
                    state = self.step(m.mode, suffix, gates[:, t], state)
                    hidden[t] = state[0]
                outputs.append(torch.stack([hidden[t] for t in times], 1))
                last.append(state)
            x = torch.cat(outputs, 2)
        return [x if m.batch_first else x.transpose(0, 1), *map(torch.stack, zip(*last, strict=True))]

    def cell(self, x: Tensor, initial: State | None) -> list[Tensor]:
        """One step of a cell from (N, i)."""
        m = self.module
        assert isinstance(m, nn.RNNCellBase)
        kind = {nn.GRUCell: "GRU", nn.LSTMCell: "LSTM"}.get(type(m)) or f"RNN_{m.nonlinearity}".upper()
        if initial is None:
            initial = (x.new_zeros(x.shape[0], m.hidden_size),) * (2 if kind == "LSTM" else 1)
        return list(self.step(kind, "", self.linear("weight_ih", x), initial))

    def forward(self, call: Call) -> list[Tensor]:
        """Run a call again; its outputs, on the graph."""
        given = dict(zip(("input", "hx"), call.args, strict=False)) | dict(call.kwargs)
        x = wide(given["input"].detach())
        initial = tuple(wide(t.detach()) for t in tensors(given.get("hx"))) or None
        if isinstance(self.module, nn.RNNCellBase):
            return self.cell(x, initial)
        return self.sequence(x if self.module.batch_first else x.transpose(0, 1), initial)


def _pulled(run: _Run, call: CallFactor) -> dict[str, Tensor]:
    """The factor at the outputs of every linear map of one call: (r, N, P, o) by name of the weight."""
    with torch.enable_grad():
        found = run.forward(call.call)
    reached = [(z, part) for z, part in zip(found, call.parts, strict=True) if part is not None]
    maps = [y for outputs in run.y.values() for y in outputs]
    columns = torch.autograd.grad(
        [z for z, _ in reached], maps, [part for _, part in reached],
        allow_unused=True, is_grads_batched=True,
    )  # fmt: skip
    following = iter(columns)
    out = {}
    for name, outputs in run.y.items():
        steps = []
        for y in outputs:
            s = next(following)
            s = y.new_zeros(call.r, *y.shape) if s is None else s
            steps.append(s.reshape(call.r, y.shape[0], -1, y.shape[-1]))
        out[name] = joined(steps, 2)
    return out


def recurrent_rows(module: Recurrent, calls: Sequence[CallFactor], wanted: frozenset[str], N: int) -> BesideRows:
    """Rows of a recurrent module: its linear maps side by side, time steps and calls as positions.

    Args:
        module: the layer.
        calls: its calls in one term.
        wanted: names of its parameters that take part.
        N: samples.
    """
    x: dict[str, list[Tensor]] = {}
    s: dict[str, list[Tensor]] = {}
    bias: dict[str, str | None] = {}
    for call in calls:
        run = _Run(module)
        for name, part in _pulled(run, call).items():
            x.setdefault(name, []).extend(run.x[name])
            s.setdefault(name, []).append(part)
            bias[name] = run.bias[name]
    parts: list[Rows] = []
    for name, inputs in x.items():
        weight = held(module, name) if name in wanted else None
        own = bias[name]
        shift = held(module, own) if own in wanted and own is not None else None
        if weight is not None or shift is not None:
            parts.append(LinearRows(weight, shift, joined(inputs, 1), joined(s[name], 2)))
    assert all(part.N == N for part in parts)
    return BesideRows(parts, f"recurrent ({type(module).__name__})")
