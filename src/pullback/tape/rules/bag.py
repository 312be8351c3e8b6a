r"""nn.EmbeddingBag (sum and mean): a linear layer on weighted counts of words.

.. math:: U_{(a,n)} = \sum_c h_{nc} \otimes s_{anc}, \quad h_{nc} = \sum_{t \in \text{bag}} w_t\, e_{\text{word}(t)}

with c the calls. The counts h are formed over the words that occur, never over the whole table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pullback.tape.call import Call, CallFactor
from pullback.tape.rules.outer import OuterRows, held, joined


class BagRows(OuterRows):
    """Rows of bags; s has shape (r, N, P, o), one position per call.

    Args:
        weight: the table.
        word: index of every entry of every bag, shape (T,).
        bag: number ``n * P + c`` of the bag it is in, shape (T,).
        share: its weight in the bag, shape (T,).
        s: factor.
    """

    rule = "embedding bag"
    input_first = True

    def __init__(self, weight: nn.Parameter, word: Tensor, bag: Tensor, share: Tensor, s: Tensor) -> None:
        super().__init__(weight, None, s)
        self.table = weight
        self.word = word
        self.bag = bag
        self.share = share

    @property
    def width(self) -> int:
        """Rows of the table."""
        return self.table.shape[0]

    def _counts(self, column: Tensor, columns: int) -> Tensor:
        """Weighted counts (N * P, columns) with entry t in column ``column[t]``."""
        out = self.share.new_zeros(self.N * self.P, columns)
        return out.index_put_((self.bag, column), self.share, accumulate=True)

    def inner(self, other: OuterRows, half: bool = False) -> Tensor:
        """See the base class."""
        assert isinstance(other, BagRows)
        both = [self.word] if other is self else [self.word, other.word]
        used, column = torch.unique(torch.cat(both), return_inverse=True)
        left = self._counts(column[: len(self.word)], len(used))
        right = left if other is self else other._counts(column[len(self.word) :], len(used))
        return (left @ right.T).view(self.N, self.P, other.N, other.P)

    def input_rows(self, start: int, stop: int | None) -> Tensor:
        """See the base class."""
        return self._counts(self.word, self.width).view(self.N, self.P, -1)[start:stop]

    def push(self, weight: Tensor) -> Tensor:
        """See the base class."""
        out = weight.new_zeros(self.N * self.P, weight.shape[1])
        out.index_add_(0, self.bag, weight[self.word] * self.share[:, None])
        return out.view(self.N, self.P, -1)

    def pull(self, c: Tensor) -> Tensor:
        """See the base class."""
        out = c.new_zeros(self.width, c.shape[2])
        rows = c.reshape(-1, c.shape[2])[self.bag] * self.share[:, None]
        return out.index_add_(0, self.word, rows).reshape(-1)

    def _form(self, start: int, stop: int | None, o0: int, o1: int, bias: bool = True) -> Tensor:
        del bias  # a table has none
        x = self.input_rows(start, stop)
        return (x.transpose(1, 2) @ self.s[:, start:stop, :, o0:o1]).flatten(2)

    def to(self, dtype: torch.dtype) -> BagRows:
        """See the base class."""
        return BagRows(self.table, self.word, self.bag, self.share.to(dtype), self.s.to(dtype))


def bags(call: Call) -> int | None:
    """Number of bags in a call: their offsets, or the first axis of a table of words."""
    given = _arguments(call)
    if given["offsets"] is None:
        return call.batch()
    assert isinstance(call.module, nn.EmbeddingBag)
    return given["offsets"].shape[0] - int(call.module.include_last_offset)


def _arguments(call: Call) -> dict[str, Tensor | None]:
    names = ("input", "offsets", "per_sample_weights")
    given: dict[str, Tensor | None] = dict.fromkeys(names)
    given.update(zip(names, call.args, strict=False))
    given.update(call.kwargs)
    return given


def _entries(module: nn.EmbeddingBag, call: CallFactor, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Word, sample and share of every entry of a call."""
    given = _arguments(call.call)
    words, offsets, weights = given["input"], given["offsets"], given["per_sample_weights"]
    assert words is not None
    if offsets is None:
        sample = torch.arange(N, device=words.device).repeat_interleave(words.shape[1])
    else:
        starts = offsets[:N].long().contiguous()
        # Word t is in the last bag that starts at or before it; empty bags start where the next one does.
        sample = torch.searchsorted(starts, torch.arange(words.shape[0], device=words.device), right=True) - 1
    words = words.reshape(-1).long()
    dtype = call.factor().dtype
    share = torch.ones_like(words, dtype=dtype) if weights is None else weights.detach().reshape(-1).to(dtype)
    if module.padding_idx is not None:
        share = share * (words != module.padding_idx)
    if module.mode == "mean":
        size = share.new_zeros(N).index_add_(0, sample, share)
        share = share / size.clamp_min(1)[sample]
    return words, sample, share


def bag_rows(module: nn.EmbeddingBag, calls: Sequence[CallFactor], wanted: frozenset[str], N: int) -> BagRows:
    """Rows of an embedding bag in sum or mean mode; several calls are positions.

    Args:
        module: the layer.
        calls: its calls in one term, each with N bags, as a table of words or with offsets.
        wanted: names of its parameters that take part.
        N: samples.
    """
    del wanted
    entries = [_entries(module, call, N) for call in calls]
    word, share = (joined([e[k] for e in entries], 0) for k in (0, 2))
    bag = joined([e[1] * len(calls) + c for c, e in enumerate(entries)], 0)
    s = torch.stack([call.factor() for call in calls], 2)
    weight = held(module, "weight")
    assert weight is not None
    return BagRows(weight, word, bag, share, s)
