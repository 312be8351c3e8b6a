"""The metric of a stage against its dense twin: explicit averages, torch.kron, one solve; float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback
from oracle import assert_close
from pullback.curvature.averages import Averages
from pullback.curvature.stage import Stage, StageBlock
from pullback.tape import Tape

DAMPING = 0.1


class Inception(nn.Module):
    """Four branches on one tensor, put side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.c, self.d = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, (1, 3), padding=(0, 1))
        self.out = nn.Linear(9, 3)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        both = [self.a(x), self.b(x), self.c(x), self.d(torch.max_pool2d(x, 3, 1, 1))]
        return self.out(torch.cat(both, 1).tanh().mean((2, 3)))


class Residual(nn.Module):
    """A convolution of stride 2 and another beside a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Conv2d(3, 3, 3, padding=1)
        self.skip, self.out = nn.Conv2d(2, 3, 1, stride=2, bias=False), nn.Linear(3, 3)

    def forward(self, x):
        return self.out((self.second(self.first(x).tanh()) + self.skip(x)).tanh().mean((2, 3)))


class Heads(nn.Module):
    """Linear players with one common input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(4, 2, bias=False)
        self.out = nn.Linear(10, 3)

    def forward(self, x):
        return self.out(torch.cat([self.a(x).tanh(), self.b(x).relu(), self.c(x).sin()], 1))


CASES = {
    "inception": (Inception, "abcd", (2, 4, 4)),
    "residual": (Residual, ["second", "skip"], (2, 4, 4)),
    "in series": (Residual, ["first", "second", "skip"], (2, 4, 4)),
    "heads": (Heads, "abc", (4,)),
}


def terms_of(model, shape, count=1, N=6, seed=0):
    """Swept terms of a cross entropy with all columns; gradients are left in the model."""
    generator = torch.Generator().manual_seed(seed)
    criterion = nn.CrossEntropyLoss()
    tape = Tape(model, criterion)
    for _ in range(count):
        x = torch.randn(N, *shape, generator=generator, dtype=torch.float64)
        criterion(model(x), torch.randint(0, 3, (N,), generator=generator)).backward()
    terms = tape.terms
    tape.close()
    return terms


def stage_of(model, names):
    return Stage(tuple(names), tuple(model.get_submodule(name).weight for name in names))


def vectors(model, terms, names, shared):
    """Inputs (positions of all samples, i) and factors of every player, windows cut by unfold; and samples."""
    given, factors, count = {n: [] for n in names}, {n: [] for n in names}, 0
    for term in terms:
        for name in names:
            module = model.get_submodule(name)
            (call,) = term.factors[id(module)]
            x, s = call.input(), call.factor()
            if isinstance(module, nn.Conv2d):
                x = nn.functional.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)
                x, s = x.transpose(1, 2), s.flatten(3).transpose(2, 3)
            else:
                x, s = x[:, None], s[:, :, None]
            if module.bias is not None:
                x = torch.cat([x, torch.ones_like(x[..., :1])], 2)
            if shared == "reduce":
                x, s = x.mean(1, keepdim=True), s.sum(2, keepdim=True)
            given[name].append(x.flatten(0, 1))
            factors[name].append(s.flatten(0, 2))
        count += given[names[0]][-1].shape[0]
    join = {n: torch.cat(v) for n, v in given.items()}, {n: torch.cat(v) for n, v in factors.items()}
    return *join, count


def dense(x, s, count, group, gradients):
    """The joint step: kron of averages, damped as K-FAC does, in the layout (factor, input)."""
    blocks = []
    for u in group:
        row = []
        for v in group:
            A, B = x[u].T @ x[v] / count, s[u].T @ s[v]
            if u == v:
                A = A + DAMPING**0.5 * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype)
                B = B + DAMPING**0.5 * B.diagonal().mean() * torch.eye(len(B), dtype=B.dtype)
            row.append(torch.kron(B, A))
        blocks.append(torch.cat(row, 1))
    right = torch.cat([gradients[u].reshape(-1) for u in group])
    step = torch.linalg.solve(torch.cat(blocks), right)
    return dict(zip(group, step.split([gradients[u].numel() for u in group]), strict=True))


def played(model, terms, names, structure, shared="expand", cut=0.0):
    averages = Averages("kfac", shared, DAMPING, 0.95, 5)
    averages.play([stage_of(model, names)], [structure], cut, 1)
    averages.follow(terms)
    block = averages.blocks[0]
    assert isinstance(block, StageBlock)
    return averages, block


def split(block, names, D):
    """A step by player, shape (o, i with the bias)."""
    pieces = D.split([o * i for o, i in block.shapes])
    return {n: piece.view(shape) for n, piece, shape in zip(names, pieces, block.shapes, strict=True)}


@pytest.mark.parametrize("shared", ["expand", "reduce"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_joint_step_is_the_dense_one(case, count, shared):
    make, names, shape = CASES[case]
    names = list(names)
    torch.manual_seed(1)
    model = make().double()
    terms = terms_of(model, shape, count)
    m = len(names)
    structures = {"all": [range(m)], "pair": [(0, m - 1), *[(u,) for u in range(1, m - 1)]], "alone": [*zip(range(m))]}
    x, s, number = vectors(model, terms, names, shared)
    for structure in structures.values():
        _, block = played(model, terms, names, structure, shared)
        G = block.gathered([p.grad for p in block.params])
        gradients, found = split(block, names, G), split(block, names, block.solve(G))
        for group in structure:
            group = [names[u] for u in group]
            for name, expected in dense(x, s, number, group, gradients).items():
                assert_close(found[name].reshape(-1), expected, 1e-9)


@pytest.mark.parametrize("case", CASES)
def test_alone_is_layerwise_and_so_are_strangers(case):
    make, names, shape = CASES[case]
    names = list(names)
    torch.manual_seed(1)
    model = make().double()
    terms = terms_of(model, shape)
    layerwise = Averages("kfac", "expand", DAMPING, 0.95, 5)
    layerwise.follow(terms)
    own = {id(b.params[0]): b for b in layerwise.blocks}
    expected = {}
    for name in names:
        block = own[id(model.get_submodule(name).weight)]
        expected[name] = block.solve(block.gathered([p.grad for p in block.params]))[0]
    m = len(names)
    _, alone = played(model, terms, names, [*zip(range(m))])
    _, strangers = played(model, terms, names, [range(m)])
    for side, k in ((strangers.left, 0), (strangers.right, 1)):
        eye = torch.block_diag(*[torch.ones(shape[k], shape[k]) for shape in strangers.shapes])
        side.C *= eye
    assert strangers._invert(DAMPING)
    for block in (alone, strangers):
        G = block.gathered([p.grad for p in block.params])
        for name, step in split(block, names, block.solve(G)).items():
            assert_close(step, expected[name], 1e-9)


def test_gathered_and_parted_are_inverse():
    model = Inception().double()
    _, block = played(model, terms_of(model, (2, 4, 4)), list("abcd"), [range(4)])
    parts = block.parted(block.gathered(list(block.params)))
    assert all(torch.equal(a, b) for a, b in zip(parts, block.params, strict=True))


def test_linear_players_under_a_gaussian_metric_are_solved_exactly():
    """One sample: the Kronecker model of every block is the block, so the undamped joint metric is U^T U itself."""
    torch.manual_seed(0)
    model = Heads().double()
    x = torch.randn(1, 4, dtype=torch.float64)
    criterion = nn.MSELoss()
    tape = Tape(model, criterion)
    criterion(model(x), torch.randn(1, 3, dtype=torch.float64)).backward()
    terms = tape.terms
    tape.close()
    names = list("abc")
    _, block = played(model, terms, names, [range(3)])
    U = torch.cat([terms[0].plan.units[k].rows(terms[0].factors[id(terms[0].plan.units[k].module)], 1).dense()[:, 0]
                   for k in range(3)], 1)  # fmt: skip
    # Rows pack weight and bias one after the other, the block has the bias as a last column.
    eye = torch.eye(U.shape[1], dtype=torch.float64)
    packed = [list(row.split([p.numel() for p in block.params])) for row in eye]
    order = torch.stack(
        [block.gathered([q.view(p.shape) for q, p in zip(row, block.params, strict=True)]) for row in packed]
    )
    V = U @ order
    M = V.T @ V
    joint = torch.cat([
        torch.cat([torch.kron(b, a) for a, b in zip(*pair, strict=True)], 1)
        for pair in zip(block.blocks(block.right, range(3)), block.blocks(block.left, range(3)), strict=True)
    ])  # fmt: skip
    assert_close(joint, M)
    for u, (rows, columns) in enumerate(zip(block.blocks(block.right, [0, 1, 2]), block.shapes, strict=True)):
        start = sum(o * i for o, i in block.shapes[:u])
        own = slice(start, start + columns[0] * columns[1])
        A, B = rows[u], block.blocks(block.left, [u])[0][0]
        a, b = (F + DAMPING**0.5 * F.diagonal().mean() * torch.eye(len(F), dtype=F.dtype) for F in (A, B))
        M[own, own] = torch.kron(b, a)
    G = block.gathered([p.grad for p in block.params])
    assert_close(block.solve(G), torch.linalg.solve(M, G), 1e-9)


def test_samples_are_cut_alike():
    """Many positions: each player alone would read another part of the samples than the others."""
    torch.manual_seed(0)
    model = Inception().double()
    N = 96
    (term,) = terms_of(model, (2, 8, 8), N=N)
    rows = [unit.rows(term.factors[id(unit.module)], N) for unit in term.plan.units if unit.name in "abcd"]
    assert max(own.kept().step for own in rows) > 1
    _, block = played(model, [term], list("abcd"), [range(4)])
    step = min(own.kept().step for own in rows)
    assert step > 1
    x = rows[0].sides(slice(None, None, step)).given_vectors()
    assert x.shape[1] == -(-N // step)
    assert_close(block.right.C[0, :4, :4], torch.einsum("gnpi,gnpj->ij", x, x) / (x.shape[1] * x.shape[2]))
    whole = block.right.C[0]
    assert float(torch.linalg.eigvalsh(whole)[0]) > -1e-12


def test_different_numbers_of_positions_need_reduce():
    torch.manual_seed(0)
    model = Residual().double()
    terms = terms_of(model, (2, 4, 4))
    with pytest.raises(pullback.StepError, match=r"numbers of positions, {'second': 4, 'out': 1}.*shared='reduce'"):
        played(model, terms, ["second", "out"], [range(2)])
    _, block = played(model, terms, ["second", "out"], [range(2)], "reduce")
    x, s, count = vectors(model, terms, ["second", "out"], "reduce")
    G = block.gathered([p.grad for p in block.params])
    found = split(block, ["second", "out"], block.solve(G))
    expected = dense(x, s, count, ["second", "out"], split(block, ["second", "out"], G))
    for name, step in expected.items():
        assert_close(found[name].reshape(-1), step, 1e-9)


def test_who_cannot_be_told_apart_is_refused():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.out((self.a(x) + self.b(x)).tanh())

    model = Twins().double()
    terms = terms_of(model, (4,))
    for structure in ([range(2)], [(0,), (1,)]):
        with pytest.raises(pullback.StepError, match="'a' and 'b' cannot be told apart"):
            played(model, terms, ["a", "b"], structure)


def test_a_wide_player_and_one_without_rows_are_refused(monkeypatch):
    model = Heads().double()
    terms = terms_of(model, (4,))
    monkeypatch.setattr("pullback.curvature.stage.LARGEST", 4)
    with pytest.raises(pullback.StepError, match="'a' has sides of 3 and 5 entries; a player may have 4"):
        played(model, terms, list("ab"), [range(2)])
    stage = Stage(("a", "x"), (model.a.weight, nn.Parameter(torch.zeros(2, 2))))
    averages = Averages("kfac", "expand", DAMPING, 0.95, 5)
    averages.play([stage], [[(0, 1)]], 0.0, 1)
    with pytest.raises(pullback.StepError, match="'x' has no rows of its own"):
        averages.follow(terms)


def test_a_coalition_is_kept_between_set_ups_and_renewed():
    torch.manual_seed(0)
    model = Heads().double()
    stage = stage_of(model, "abc")
    averages = Averages("kfac", "expand", DAMPING, 0.95, 5)
    averages.play([stage], [[(0, 1), (2,)]], 0.0, 3)
    made = []
    for look in range(8):
        averages.follow(terms_of(model, (4,), seed=look))
        made.append(averages.blocks[0].made[0, 1])
    assert made == [0, 1, 2, 2, 2, 5, 5, 5]
    assert averages.blocks[0].made[(2,)] == 7
    averages.play([stage], [[(0, 1, 2)]], 0.0, 3)
    averages.follow(terms_of(model, (4,), seed=8))
    assert averages.blocks[0].made == {(2,): 7, (0, 1, 2): 8}  # what was three looks old is gone
    assert averages.blocks[0].describe() == "a+b+c"
