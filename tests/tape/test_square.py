"""U U^T from its upper blocks."""

from __future__ import annotations

import pytest
import torch

from oracle import assert_close
from pullback.tape.rules import square as module
from pullback.tape.rules.square import square


@pytest.mark.parametrize("m", [1, 3, 4, 5, 37, 128])
@pytest.mark.parametrize("pieces", [[5], [1, 8, 3]])
@pytest.mark.parametrize("worth", [0, 1 << 40])
def test_blocks_make_the_whole(monkeypatch, m, pieces, worth):
    monkeypatch.setattr(module, "_WORTH", worth)
    monkeypatch.setattr(module, "_WORTH_COPYING", worth)
    parts = [torch.randn(m, k, dtype=torch.float64) for k in pieces]
    V = torch.cat(parts, 1)
    K = square(iter(parts))
    assert_close(K, V @ V.T)
    assert_close(square(iter(parts), half=True).triu(), (V @ V.T).triu())
    assert_close(square([V.T]), V.T @ V)
