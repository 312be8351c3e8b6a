"""Do the oracles of Kronecker factors and of joint steps see? One place at a time is made wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback
from oracle import assert_close, linearise, loss_hessian
from pullback.curvature import Averages
from pullback.curvature.stage import Stage
from test_mutation import Mutation, then, times

F64 = torch.float64
DAMPING, DECAY, N = 0.1, 0.25, 6


def batch(model: nn.Module, criterion: nn.Module, seed: int) -> tuple[Any, Tensor, Tensor]:
    """Terms of a batch of a linear layer, its inputs with the 1 of the bias, and the Hessians of its samples, added."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 2, generator=generator, dtype=F64)
    y = torch.randint(0, 3, (N,), generator=generator)
    terms = linearise(model, criterion, [((x,), {}, y)]).terms
    H = loss_hessian(criterion, model(x).detach(), y).view(N, 3, N, 3)
    return terms, torch.cat([x, torch.ones(N, 1, dtype=F64)], 1), torch.einsum("nanb->ab", H)


def average() -> None:
    """Two looks at one linear layer, then a solve: averages from their definition, and explicit inverses."""
    torch.manual_seed(0)
    model, criterion = nn.Linear(2, 3).double(), nn.CrossEntropyLoss()
    averages = Averages("kfac", "expand", DAMPING, DECAY, 5)
    A, B = torch.zeros(3, 3, dtype=F64), torch.zeros(3, 3, dtype=F64)
    for seed, keep in ((1, 0.0), (2, DECAY)):
        terms, x, H = batch(model, criterion, seed)
        averages.follow(terms)
        A, B = keep * A + (1 - keep) * x.T @ x / N, keep * B + (1 - keep) * H
    (block,) = averages.blocks
    G = torch.randn(3, 3, dtype=F64)
    eye = torch.eye(3, dtype=F64)
    left, right = (F + DAMPING**0.5 * F.diagonal().mean() * eye for F in (B, A))
    D = block.solve(block.gathered([G[:, :2], G[:, 2]]))
    assert_close(
        torch.cat([t.reshape(3, -1) for t in block.parted(D)], 1), torch.linalg.inv(left) @ G @ right.inverse()
    )


class Sum(nn.Module):
    """Linear players on what they are given of one vector."""

    def __init__(self, players: int) -> None:
        super().__init__()
        self.players = nn.ModuleList(nn.Linear(2, 3) for _ in range(players))
        self.out = nn.Linear(3 * players, 3)

    def forward(self, x: Tensor) -> Tensor:
        given = x.split(2, 1)
        return self.out(torch.cat([player(t) for player, t in zip(self.players, given, strict=True)], 1).tanh())


def cooperation(players: int) -> Callable[[], None]:
    """The joint step of a stage is the dense one, blocks by torch.kron."""

    def check() -> None:
        torch.manual_seed(0)
        model = Sum(players).double()
        x = torch.randn(N, 2 * players, dtype=F64)
        terms = linearise(model, nn.CrossEntropyLoss(), [((x,), {}, torch.randint(0, 3, (N,)))]).terms
        averages = Averages("kfac", "expand", DAMPING, DECAY, 5)
        stage = Stage(tuple(map(str, range(players))), tuple(own.weight for own in model.players))
        averages.play([stage], [[range(players)]], 0.0, 1)
        averages.follow(terms)
        factors = [terms[0].factors[id(own)][0] for own in model.players]
        s = [factor.factor().reshape(-1, 3) for factor in factors]
        given = [torch.cat([factor.input(), torch.ones(N, 1, dtype=F64)], 1) for factor in factors]
        rows = []
        for u in range(players):
            row = []
            for v in range(players):
                B, A = s[u].T @ s[v], given[u].T @ given[v] / N
                if u == v:
                    B, A = (F + DAMPING**0.5 * F.diagonal().mean() * torch.eye(3, dtype=F64) for F in (B, A))
                row.append(torch.kron(B, A))
            rows.append(torch.cat(row, 1))
        G = torch.randn(9 * players, dtype=F64)
        assert_close(averages.blocks[0].solve(G), torch.linalg.solve(torch.cat(rows), G), 1e-9)

    return check


def without_bias(x: Tensor) -> Tensor:
    return torch.cat([x[..., :-1], torch.zeros_like(x[..., -1:])], -1)


def one_over_n_forgotten(true: Any) -> Any:
    def pair(sides: Any, shared: Any) -> Any:
        left, right = true(sides, shared)
        return left, right.scaled(float(N))

    return pair


def means_swapped(true: Any) -> Any:
    def invert(self: Any, damping: float) -> bool:
        ratio = float(self.right.mean() / self.left.mean())
        return self.left.invert(damping**0.5 * ratio) and self.right.invert(damping**0.5 / ratio)

    return invert


def others_negated(true: Any) -> Any:
    """A cached property; the inputs alone, for two signs would cancel."""

    def white(self: Any) -> Any:
        sign = -1.0 if self.what == "inputs" else 1.0
        return [[F if u == v else sign * F for v, F in enumerate(row)] for u, row in enumerate(true.func(self))]

    return property(white)


def no_cross_moments(true: Any) -> Any:
    def blocks(self: Any, side: Any, players: Any) -> Any:
        found = true(self, side, players)
        return [[F if u == v else 0 * F for v, F in enumerate(row)] for u, row in enumerate(found)]

    return blocks


KRONECKER, MATRIX, JOINT = "curvature.kronecker", "curvature.moments:MatrixMoment", "curvature.joint:Joint"

MUTATIONS = [
    Mutation("bias column dropped", "tape.rules.sides:Sides.given_vectors", then(without_bias), average),
    Mutation("1 / N forgotten", f"{KRONECKER}:_pair", one_over_n_forgotten, average),
    Mutation("factors exchanged", f"{KRONECKER}:samples", then(lambda pair: pair[::-1]), average),
    Mutation("gradient transposed", f"{KRONECKER}:KroneckerBlock.solve",
             lambda true: lambda self, G: true(self, G.mT), average),
    Mutation("decay ignored", f"{MATRIX}.follow", lambda true: lambda self, sample, keep: true(self, sample, 0.0),
             average),
    Mutation("first look decayed", f"{KRONECKER}:Averaged.follow", lambda true: lambda self, rows, decay, damping:
             (setattr(self, "seen", self.seen + 1), true(self, rows, decay, damping))[1], average),
    Mutation("each side damped by the mean of the other", f"{KRONECKER}:KroneckerBlock._invert", means_swapped,
             average),
    Mutation("root of the damping not taken", f"{MATRIX}.invert", lambda true: lambda self, root: true(self, root**2),
             average),
    Mutation("columns of the factor lost", "tape.rules.linear:LinearRows.kept", lambda true: lambda self:
             slice(0, self.N // 2), average),
    Mutation("sign of the coupling of two", f"{JOINT}.correlations", then(lambda found: (-found[0], found[1])),
             cooperation(2)),
    Mutation("sign of the cross terms of three", f"{JOINT}.white", others_negated, cooperation(3)),
    Mutation("cross moments dropped", "curvature.stage:StageBlock.blocks", no_cross_moments, cooperation(2)),
    Mutation("another's step taken", "curvature.coalition:Pair.solve",
             then(lambda found: (found[0][::-1], found[1])), cooperation(2)),
    Mutation("joint system scaled", "curvature.coalition:Iterated._apply", times(1.5), cooperation(3)),
    Mutation("damping of a player in units of another", "curvature.cooperation:_each",
             then(lambda mus: mus[::-1]), cooperation(2)),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_oracle_sees(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation.check()
    mutation.apply(monkeypatch)
    with pytest.raises((AssertionError, pullback.PullbackError)):
        mutation.check()
