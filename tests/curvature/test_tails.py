"""Tails: their sums on and above the diagonal, against dense rows; every factor made at once."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from oracle import assert_close, linearise
from pullback.curvature import Block, Tails
from pullback.tape.rules import linear
from pullback.tape.rules.linear import LinearRows


@given(
    n=st.integers(1, 9), o=st.integers(1, 3), i=st.integers(1, 3), bias=st.booleans(), given_tail=st.booleans(),
    memory=st.booleans(), strips=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_a_gram_onto_a_tail(n, o, i, bias, given_tail, memory, strips, seed):
    torch.manual_seed(seed)
    x, s = torch.randn(n, 1, i, dtype=torch.float64), torch.randn(1, n, 1, o, dtype=torch.float64)
    rows = LinearRows(nn.Parameter(torch.zeros(o, i)), nn.Parameter(torch.zeros(o)) if bias else None, x, s)
    tail = torch.randn(n, n, dtype=torch.float64) if given_tail else None
    before = None if tail is None else tail.clone()
    scratch = torch.full((n, n), torch.nan, dtype=torch.float64) if memory else None
    out = torch.full((n, n), torch.nan, dtype=torch.float64)
    worth = linear._STRIPS
    linear._STRIPS = 0 if strips else worth
    try:
        found = rows.gram_onto(tail, out, scratch)
    finally:
        linear._STRIPS = worth
    U = rows.dense().reshape(n, -1)
    expected = U @ U.T if tail is None else before + U @ U.T
    assert found is out
    assert_close(found.triu(), expected.triu())
    assert before is None or torch.equal(tail, before)


def chain(stages: list[int], outputs: int = 1) -> list[list[Block]]:
    """Blocks of a chain of five layers, so many to a stage; one factor column per output."""
    torch.manual_seed(0)
    widths = [2, 4, 3, 4, 3, outputs]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    x = torch.randn(6, 2, dtype=torch.float64)
    blocks = iter(linearise(nn.Sequential(*layers).double(), nn.MSELoss(), [((x,), {}, torch.randn_like)]).blocks)
    return [[next(blocks) for _ in range(size)] for size in stages]


@pytest.mark.parametrize("stages", [[1, 1, 1, 1, 1], [2, 1, 2], [1, 2, 2], [5]], ids=str)
@pytest.mark.parametrize("split", [1, 2, 5])
@pytest.mark.parametrize("outputs", [1, 2])
def test_tails_hold_their_stage_and_all_behind_it(stages, split, outputs):
    blocks = chain(stages, outputs)
    tails = Tails(blocks, "dual")
    tails.split = min(split, len(stages))
    tails.form()
    for k in range(tails.split):
        U = torch.cat([block.dense() for own in blocks[k:] for block in own], 1)
        assert_close(tails._sums[k].triu(), (U @ U.T).triu())
    assert len(tails._sums) == tails.split


@pytest.mark.parametrize("space", ["dual", "primal", "auto"])
def test_factors_made_at_once_are_those_made_when_asked_for(space):
    blocks = chain([1, 1, 1, 1, 1])
    now, later = Tails(blocks, space), Tails(blocks, space)
    now.factorise(0.3)
    later.factorise(0.3)
    now.ready()
    assert all(outcome.endswith("cholesky") for outcome in now.spaces)
    assert all(outcome.endswith("ready") for outcome in later.spaces)
    v = torch.randn(now.R, dtype=torch.float64)
    for k, own in enumerate(blocks):
        U = torch.cat([block.dense() for stage in blocks[k:] for block in stage], 1)
        w = torch.linalg.solve(0.3 * torch.eye(now.R, dtype=v.dtype) + U @ U.T, v)
        (step,) = now.step(k, v)
        assert_close(step, -own[0].rmatvec(w))
        assert torch.equal(step, later.step(k, v)[0])
