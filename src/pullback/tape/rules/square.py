"""U U^T at little more than half the price: only the blocks on and below the diagonal are multiplied."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

#: Block rows; more of them multiply less but in thinner pieces (five eighths of the work at 4).
_BLOCKS = 4

#: Multiply-adds from which blocks are worth their calls.
_WORTH = 1 << 26


def square(pieces: Iterable[Tensor], out: Tensor | None = None) -> Tensor:
    r"""Sum of :math:`V V^\top` over matrices with the same rows.

    Args:
        pieces: matrices (m, k), k may differ; at least one.
        out: memory for the result, (m, m); a fresh tensor without.
    """
    step = 0
    for V in pieces:
        m = V.shape[0]
        if step == 0:
            step = -(-m // _BLOCKS) if m * m * V.shape[1] >= _WORTH else max(1, m)
            out = V.new_empty(m, m) if out is None else out
            if step >= m:
                torch.mm(V, V.T, out=out)
                continue
            out.zero_()
        assert out is not None
        for k in range(0, m, step):
            out[k : k + step, : k + step].addmm_(V[k : k + step], V[: k + step].T)
    assert out is not None
    for k in range(step, out.shape[0], step):
        out[:k, k : k + step] = out[k : k + step, :k].T
    return out
