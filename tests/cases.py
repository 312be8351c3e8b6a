"""The one list of cases: a new layer is one row.

Every case builds a float64 model with its inputs; oracles run over the whole list, with the losses of
``losses.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from losses import LOSSES, Loss, loss_by_name
from models import (
    Across,
    Again,
    Branches,
    Feeds,
    Flat,
    FunctionalTie,
    InPlaceSkip,
    Moving,
    Nest,
    Owner,
    Positions,
    Residual,
    Tied,
    Twice,
    TwoInputs,
    Wave,
    Woven,
)
from pullback.ode import ODEBlock
from pullback.problems.driven import ControlledField, Driven
from pullback.problems.irregular import ODERNN
from pullback.problems.odes import Observed, OwnClock
from sequences import Attention, Bag, Cells, Cross, Encoder, Offsets, Recurrent


def inputs(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randn(n, *shape, dtype=torch.float64),)


def tokens(length: int, words: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randint(0, words, (n, length)),)


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    side: Callable[[int], dict[str, Tensor]] = field(default=lambda n: {})
    folds: bool = True  # whether the batch can be repeated along the first axes of the inputs

    def build(self, seed: int = 0, n: int = 4) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
        torch.manual_seed(seed)
        model = self.model().double()
        return model, self.inputs(n), self.side(n)


def seq(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def ragged(n: int) -> tuple[Tensor, ...]:
    """All words, and offsets of bags with 1, 2, 3, 1, ... words."""
    sizes = torch.arange(n) % 3 + 1
    return torch.randint(0, 6, (int(sizes.sum()),)), sizes.cumsum(0) - sizes


def shares(n: int) -> dict[str, Tensor]:
    return {"share": torch.rand(n, 4, dtype=torch.float64)}


def hidden(length: int) -> Callable[[int], dict[str, Tensor]]:
    """A padding mask that hides some of the last steps."""
    return lambda n: {"mask": torch.arange(length) >= torch.randint(1, length + 1, (n, 1))}


def headed(*layers: Callable[[], nn.Module], shape: tuple[int, ...], train: bool = True) -> Callable[[], nn.Module]:
    """Layers and a head that fits whatever they return."""

    def make() -> nn.Module:
        first = seq(*(layer() for layer in layers))
        out = first.eval()(torch.zeros(1, *shape)).flatten(1).shape[1]
        model = seq(first.train(), nn.Tanh(), nn.Flatten(), nn.Linear(out, 2))
        with torch.no_grad():  # norms start at scale 1 and shift 0, which hides mistakes
            for p in model.parameters():
                if p.ndim == 1:
                    p.add_(torch.randn_like(p))
            for name, b in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    b.copy_(torch.rand_like(b) + 0.5)
        return model.train(train)

    return make


def conv(
    kind: type[nn.Module] = nn.Conv2d, shape: tuple[int, ...] = (2, 6, 5), **options: Any
) -> Callable[[], nn.Module]:
    return headed(lambda: kind(shape[0], 4, **options), shape=shape)


def lazy(make: Callable[[], nn.Module], *shape: int) -> Callable[[], nn.Module]:
    """A model whose lazy head learns its size from one sample."""

    def made() -> nn.Module:
        model = make()
        model(torch.zeros(1, *shape, dtype=torch.long if len(shape) == 1 else None))
        return model

    return made


CASES = [
    Case("mlp", lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), inputs(3)),
    Case("mlp without bias", lambda: seq(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)), inputs(3)),
    Case("in-place relu", lambda: seq(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), inputs(3)),
    Case("in-place skip", InPlaceSkip, inputs(4)),
    Case("residual", lambda: seq(Residual(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), nn.Linear(3, 2)), inputs(3)),
    Case("called twice", Twice, inputs(3)),
    Case("at two places", lambda: seq(*[nn.Linear(3, 3), nn.Tanh()] * 2, nn.Linear(3, 2)), inputs(3)),
    Case("own map at two places", lambda: (w := Wave()) and seq(w, nn.Linear(3, 3), w, nn.Linear(3, 2)), inputs(3)),
    Case("tied", Tied, tokens(3, 5)),
    Case("functional tie", FunctionalTie, inputs(3)),
    Case("bare parameters", Owner, inputs(3)),
    Case("branches", Branches, inputs(2), lambda n: {"side": torch.randn(n, 3, dtype=torch.float64)}),
    Case("skip from glue", Across, inputs(3)),
    Case("woven glue", Woven, inputs(3)),
    Case("linear on sequences", lambda: seq(nn.Linear(2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)),
         inputs(5, 2)),
    Case("folded time", Flat, inputs(3, 2)),
    Case("conv", conv(kernel_size=3), inputs(2, 6, 5)),
    Case("conv stride padding", conv(kernel_size=3, stride=2, padding=1), inputs(2, 6, 5)),
    Case("conv dilation", conv(kernel_size=2, dilation=2, bias=False), inputs(2, 6, 5)),
    Case("conv same", conv(kernel_size=(1, 3), padding="same"), inputs(2, 6, 5)),
    Case("conv circular", conv(kernel_size=3, padding=1, padding_mode="circular"), inputs(2, 6, 5)),
    Case("conv groups", conv(kernel_size=3, groups=2), inputs(2, 6, 5)),
    Case("conv depthwise", conv(kernel_size=2, groups=2, bias=False), inputs(2, 6, 5)),
    Case("conv same dilated", conv(kernel_size=(2, 3), padding="same", dilation=(2, 1)), inputs(2, 6, 5)),
    Case("conv valid", conv(kernel_size=3, padding="valid", stride=(2, 1)), inputs(2, 6, 5)),
    Case("conv reflect", conv(kernel_size=3, padding=(2, 1), padding_mode="reflect", groups=2), inputs(2, 6, 5)),
    Case("conv replicate same", conv(kernel_size=2, padding="same", padding_mode="replicate"), inputs(2, 6, 5)),
    Case("conv one window", conv(kernel_size=(6, 5), groups=2), inputs(2, 6, 5)),
    Case("conv 1d", conv(nn.Conv1d, (2, 7), kernel_size=3, stride=2, padding=1), inputs(2, 7)),
    Case("conv 1d circular", conv(nn.Conv1d, (2, 7), kernel_size=3, padding=2, padding_mode="circular", dilation=2,
                                  groups=2), inputs(2, 7)),
    Case("conv 3d", conv(nn.Conv3d, (2, 3, 4, 3), kernel_size=2, stride=(1, 2, 1), padding=(1, 0, 1)),
         inputs(2, 3, 4, 3)),
    Case("conv 3d groups", conv(nn.Conv3d, (2, 3, 4, 3), kernel_size=2, groups=2, padding="same",
                                padding_mode="replicate"), inputs(2, 3, 4, 3)),
    Case("conv transposed", conv(nn.ConvTranspose2d, (2, 3, 2), kernel_size=3, stride=2, padding=1,
                                 output_padding=1), inputs(2, 3, 2)),
    Case("conv transposed groups", conv(nn.ConvTranspose2d, (2, 3, 2), kernel_size=2, groups=2, dilation=2,
                                        bias=False), inputs(2, 3, 2)),
    Case("conv transposed wide", conv(nn.ConvTranspose1d, (2, 4), kernel_size=2, dilation=3, output_padding=2),
         inputs(2, 4)),
    Case("conv transposed one", conv(nn.ConvTranspose2d, (4, 1, 1), kernel_size=3, groups=2), inputs(4, 1, 1)),
    Case("conv transposed 3d", conv(nn.ConvTranspose3d, (2, 2, 1, 2), kernel_size=2, stride=(1, 2, 1)),
         inputs(2, 2, 1, 2)),
    Case("conv twice", lazy(lambda: Again(nn.Conv2d(2, 3, 2), lambda x: x, lambda x: x[..., 1:, ::2]), 2, 4, 5),
         inputs(2, 4, 5)),
    Case("conv transposed twice", lazy(lambda: Again(nn.ConvTranspose1d(2, 4, 3, groups=2), lambda x: x,
                                                     lambda x: x[..., :2]), 2, 3), inputs(2, 3)),
    Case("embedding", lambda: seq(nn.Embedding(6, 3), nn.Flatten(), nn.Tanh(), nn.Linear(12, 2)), tokens(4, 6)),
    Case("embedding one word", lambda: seq(nn.Embedding(6, 3), nn.Tanh(), nn.Linear(3, 2)), lambda n: (
        torch.randint(0, 6, (n,)),)),
    Case("embedding twice", lazy(lambda: Again(nn.Embedding(6, 3, padding_idx=2), lambda t: t, lambda t: t[:, :2]),
                                 4), tokens(4, 6)),
    Case("bag mean", lambda: Bag(mode="mean"), tokens(4, 6)),
    Case("bag padding", lambda: Bag(mode="mean", padding_idx=1), tokens(4, 6)),
    Case("bag sum weights", lambda: Bag(mode="sum", padding_idx=1), tokens(4, 6), shares),
    Case("bag flat", lambda: Bag(flat=True, mode="mean"), tokens(4, 6)),
    Case("bag flat weights", lambda: Bag(flat=True, mode="sum", include_last_offset=True), tokens(4, 6), shares),
    Case("bag max", lambda: Bag(mode="max"), tokens(4, 6)),
    Case("bag max padding", lambda: Bag(mode="max", padding_idx=1), tokens(4, 6)),
    Case("bag max twice", lazy(lambda: Again(nn.EmbeddingBag(6, 3, mode="max"), lambda t: t, lambda t: t[:, :2]), 4),
         tokens(4, 6)),
    Case("bag offsets", Offsets, ragged, folds=False),
    Case("bag twice", lazy(lambda: Again(nn.EmbeddingBag(6, 3), lambda t: t, lambda t: t[:, :2]), 4), tokens(4, 6)),
    Case("layer norm", lambda: seq(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)), inputs(3)),
    Case("layer norm 2d", lambda: seq(nn.LayerNorm((3, 2)), nn.Flatten(), nn.Linear(6, 2)), inputs(3, 2)),
    Case("prelu", lambda: seq(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)), inputs(3)),
    Case("prelu shared", lambda: seq(nn.Conv2d(2, 3, 2), nn.PReLU(), nn.Flatten(), nn.Linear(12, 2)),
         inputs(2, 3, 3)),
    Case("prelu channels", lambda: seq(nn.Conv2d(2, 3, 2), nn.PReLU(3), nn.Flatten(), nn.Linear(12, 2)),
         inputs(2, 3, 3)),
    Case("rms norm", headed(lambda: nn.Linear(2, 4), lambda: nn.RMSNorm(4), shape=(3, 2)), inputs(3, 2)),
    Case("rms norm 2d", headed(lambda: nn.RMSNorm((3, 2), eps=1e-3), shape=(3, 2)), inputs(3, 2)),
    Case("group norm", lambda: seq(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)), inputs(3)),
    Case("group norm images", headed(lambda: nn.GroupNorm(2, 4), shape=(4, 3, 2)), inputs(4, 3, 2)),
    Case("instance norm", headed(lambda: nn.InstanceNorm1d(3, affine=True), shape=(3, 4)), inputs(3, 4)),
    Case("instance norm eval", headed(lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
                                      shape=(2, 3, 2), train=False), inputs(2, 3, 2)),
    Case("batch norm", headed(lambda: nn.Linear(3, 4), lambda: nn.BatchNorm1d(4), shape=(3,), train=False),
         inputs(3)),
    Case("batch norm 2d", headed(lambda: nn.BatchNorm2d(2), shape=(2, 3, 2), train=False), inputs(2, 3, 2)),
    Case("bilinear weight norm", lambda: seq(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(),
                                             nn.Linear(4, 2)), inputs(3)),
    Case("positions", Positions, tokens(5, 7)),
    Case("attention", Attention, inputs(3, 4)),
    Case("attention masked", lambda: Attention(bias=False, add_bias_kv=True), inputs(3, 4), hidden(3)),
    Case("attention causal", lambda: Attention(causal=True), inputs(4, 4)),  # mask as large as the batch
    Case("attention time first", lambda: Attention(False), inputs(3, 4), hidden(3)),
    Case("attention time first square", lambda: Attention(False), inputs(4, 4)),
    Case("attention cross", Cross, inputs(3, 4)),
    Case("attention cross alike", lambda: Cross(length=3, shares=True, bias=False), inputs(3, 4)),
    Case("attention cross time first", lambda: Cross(False, shares=True, add_zero_attn=True, add_bias_kv=True),
         inputs(3, 4)),
    Case("attention widths", lambda: Cross(kdim=3, vdim=5), inputs(3, 4)),
    Case("attention widths time first", lambda: Cross(False, kdim=3, vdim=5, bias=False), inputs(3, 4)),
    Case("attention cross and self", lambda: Cross(again=True), inputs(3, 4)),
    Case("encoder", Encoder, inputs(3, 4), hidden(3)),
    Case("encoder eval", lambda: Encoder(train=False, norm_first=True), inputs(3, 4)),
    Case("encoder time first", lambda: Encoder(False), inputs(4, 4)),
    Case("recurrent", Recurrent, inputs(4, 2)),
    Case("recurrent start", lambda: Recurrent(start=True, bias=False), inputs(3, 2)),
    Case("recurrent deep", lambda: Recurrent(num_layers=2, bidirectional=True), inputs(3, 2)),
    Case("recurrent time first", lambda: Recurrent(nn.RNN, batch_first=False, nonlinearity="relu", start=True),
         inputs(3, 2)),
    Case("recurrent square", lambda: Recurrent(nn.RNN, batch_first=False, num_layers=4), inputs(4, 2)),
    Case("lstm", lambda: Recurrent(nn.LSTM, bidirectional=True), inputs(3, 2)),
    Case("rnn cell", lambda: Cells(nn.RNNCell), inputs(3, 2)),
    Case("gru cell", lambda: Cells(nn.GRUCell), inputs(3, 2)),
    Case("lstm cell", lambda: Cells(nn.LSTMCell, bias=False), inputs(3, 2)),
    Case("bilinear", TwoInputs, inputs(3)),
    Case("nest", Nest, inputs(3)),
    Case("outputs of outputs", Feeds, inputs(3)),
    Case("ode unrolled", lambda: seq(nn.Linear(3, 2), ODEBlock(Moving(), solver="rk4", step=0.5, adjoint=False),
                                     nn.Linear(2, 2)), inputs(3)),
    Case("ode controlled", lambda: Driven(
        nn.Linear(2, 3), ODEBlock(ControlledField(3, 2, 4, 1.5), solver="rk4", step=0.5, adjoint=False),
        nn.Linear(3, 2)), inputs(2, 3)),
    Case("ode between observations", lambda: (flow := ODEBlock(
        OwnClock(seq(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))), solver="rk4", step=0.5, adjoint=False))
        and Observed(ODERNN(nn.GRUCell(1, 2), flow), flow, nn.Linear(2, 2)), inputs(6)),
]  # fmt: skip

by_name = {case.name: case for case in CASES}

__all__ = ["CASES", "LOSSES", "Case", "Loss", "by_name", "inputs", "loss_by_name", "seq"]
