"""Small models of sequences: attention, recurrence, bags of words; batch first and time first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """nn.MultiheadAttention, whose out_proj is never called as a module; time first or batch first."""

    def __init__(self, batch_first: bool = True, causal: bool = False, **options: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.causal = causal
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        h = x if self.attend.batch_first else x.transpose(0, 1)
        T = x.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool).triu(1) if self.causal else None
        y, shares = self.attend(h, h, h, key_padding_mask=mask, attn_mask=causal)
        y = y if self.attend.batch_first else y.transpose(0, 1)
        return self.out(y.mean(1)) + shares[:, 0, :2]


class Cross(nn.Module):
    """nn.MultiheadAttention of a sequence to parts of itself: of other length, of other width."""

    def __init__(
        self, first: bool = True, length: int = 2, shares: bool = False, again: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=first, **options)
        self.length, self.shares, self.again = length, shares, again
        self.keys, self.values = nn.Linear(4, options.get("kdim", 4)), nn.Linear(4, options.get("vdim", 4))
        self.out = nn.Linear(4, 2)
        with torch.no_grad():  # biases start at zero, which hides mistakes
            for p in self.attend.parameters():
                p.add_(0.3 * torch.randn_like(p))

    def forward(self, x: Tensor) -> Tensor:
        given = x, self.keys(x[:, : self.length]), self.values(x[:, : self.length])
        if not self.attend.batch_first:
            given = tuple(t.transpose(0, 1) for t in given)
        mask = torch.arange(2 * x.shape[1] * self.length, dtype=x.dtype).sin().view(2, x.shape[1], -1)
        mask = mask.repeat(len(x), 1, 1)  # for every head of every sample
        y, shares = self.attend(*given, attn_mask=mask, need_weights=self.shares, average_attn_weights=False)
        if self.again:
            y = y + self.attend(*given[:1] * 3, need_weights=False)[0]
        y = self.out((y if self.attend.batch_first else y.transpose(0, 1)).sum(1))
        return y if shares is None else y + shares[:, :, 0, 0]


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer; the last time step alone is read when time comes first."""

    def __init__(self, batch_first: bool = True, train: bool = True, **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=batch_first, **options)
        self.out = nn.Linear(4, 2)
        self.train(train)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if self.layer.self_attn.batch_first:
            return self.out(self.layer(x, src_key_padding_mask=mask).mean(1))
        return self.out(self.layer(x.transpose(0, 1))[-1])


class Recurrent(nn.Module):
    """A recurrent module, which returns a nest of tensors; all its outputs are used."""

    def __init__(self, kind: type[nn.RNNBase] = nn.GRU, start: bool = False, **options: Any) -> None:
        super().__init__()
        self.cell = kind(2, 3, **{"batch_first": True} | options)
        self.first = nn.Linear(2, 3) if start else None
        width = (1 + self.cell.bidirectional) * (self.cell.proj_size or 3)
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.cell.batch_first else x.transpose(0, 1)
        ways = self.cell.num_layers * (1 + self.cell.bidirectional)
        begin = None if self.first is None else self.first(x[:, 0]).expand(ways, -1, -1)
        states, last = self.cell(h, begin)
        states = states if self.cell.batch_first else states.transpose(0, 1)
        ends = sum(t.square().sum((0, 2)) for t in (last if isinstance(last, tuple) else (last,)))
        return self.out(states[:, -1] + 0.3 * states[:, 0]) + ends[:, None]


class Cells(nn.Module):
    """A recurrent cell called step by step."""

    def __init__(self, kind: type[nn.RNNCellBase], **options: Any) -> None:
        super().__init__()
        self.cell = kind(2, 3, **options)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.out(state[0] * state[1] if isinstance(state, tuple) else state)


class Bag(nn.Module):
    """Bags of words, as a table or flattened with offsets."""

    def __init__(self, flat: bool = False, **options: Any) -> None:
        super().__init__()
        self.flat = flat
        self.words = nn.EmbeddingBag(6, 3, **options)
        self.out = nn.Linear(3, 2)

    def forward(self, t: Tensor, *, share: Tensor | None = None) -> Tensor:
        if not self.flat:
            h = self.words(t, per_sample_weights=share)
        else:
            keep = torch.arange(t.shape[1]) < (t.sum(1) % (t.shape[1] + 1))[:, None]  # ragged, some empty
            sizes = keep.sum(1)
            last = int(self.words.include_last_offset)
            offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])[: len(t) + last]
            h = self.words(t[keep], offsets, None if share is None else share[keep])
        return self.out(torch.tanh(h))


class Offsets(nn.Module):
    """The model itself is given all words and where the samples begin."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(6, 3, mode="mean")
        self.out = nn.Linear(3, 2)

    def forward(self, words: Tensor, offsets: Tensor) -> Tensor:
        return self.out(torch.tanh(self.words(words, offsets)))
