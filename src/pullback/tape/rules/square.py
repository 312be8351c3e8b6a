"""U U^T at little more than half the price: only the blocks on and above the diagonal are multiplied."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

#: Block rows; more of them multiply less but in thinner pieces (five eighths of the work at 4).
_BLOCKS = 4

#: Multiply-adds from which blocks are worth their calls, and from which they are worth a copy of their transposes too.
_WORTH, _WORTH_COPYING = 1 << 22, 1 << 25


def square(pieces: Iterable[Tensor], out: Tensor | None = None, half: bool = False) -> Tensor:
    r"""Sum of :math:`V V^\top` over matrices with the same rows.

    Args:
        pieces: matrices (m, k), k may differ; at least one.
        out: memory for the result, (m, m); a fresh tensor without.
        half: whether nobody reads below the diagonal; what was there may stay.
    """
    step, first = 0, True
    for V in pieces:
        m = V.shape[0]
        if first:
            worth = m * m * V.shape[1] >= (_WORTH if half else _WORTH_COPYING)
            step = -(-m // _BLOCKS) if worth else max(1, m)
            out = V.new_empty(m, m) if out is None else out
        assert out is not None
        for k in range(0, m, step):
            block = out[: k + step, k : k + step]
            if first:
                torch.mm(V[: k + step], V[k : k + step].T, out=block)
            else:
                block.addmm_(V[: k + step], V[k : k + step].T)
        first = False
    assert out is not None
    if not half:
        for k in range(step, out.shape[0], step):
            out[k : k + step, :k] = out[:k, k : k + step].T
    return out
