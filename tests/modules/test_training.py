"""Composites under the optimizers: steps of the same model written by hand, with masses, partition and manifolds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pullback
from closed import CLOSED
from curved import point
from oracle import assert_close
from pullback import Damping
from pullback.manifolds import Stiefel, constrain
from pullback.modules import CompositionError, feedback, hierarchy, parallel, residual, riemannian, series

MAKE = {"layerwise": pullback.LayerwiseMetric, "global": pullback.GaussNewton, **CLOSED}


class Written(nn.Module):
    """A model written by hand around layers."""

    def __init__(self, f, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.f = f

    def forward(self, x):
        return self.f(x, *self.layers)


def linear(a, b):
    return nn.Linear(a, b).double()


def bent(a, b):
    return nn.Sequential(linear(a, b), nn.Tanh())


def chain():
    a, b = linear(3, 4), linear(4, 2)
    return [a, b], series(a, nn.Tanh(), b), lambda x, a, b: b(a(x).tanh())


def branches():
    a, b, c = bent(3, 4), linear(3, 2), linear(6, 2)
    return (
        [a, b, c],
        series(parallel(a, b, join="concatenate"), c),
        lambda x, a, b, c: c(torch.cat([a(x), b(x)], 1)),
    )


def shares():
    a, b = bent(1, 2), bent(2, 2)
    return [a, b], parallel(a, b, split=[1, 2]), lambda x, a, b: a(x[:, :1]) + b(x[:, 1:])


def skips():
    a, b = bent(3, 3), linear(3, 2)
    return [a, b], series(residual(a, step=0.5), b), lambda x, a, b: b(x + 0.5 * a(x))


def loop():
    f, h = bent(3, 2), linear(2, 3)

    def run(x, f, h):
        y = f(x)
        for _ in range(2):
            y = f(x + h(y))
        return y

    return [f, h], feedback(f, h, rounds=2), run


def levels():
    a, b = linear(3, 1), bent(4, 1)

    def run(x, a, b):
        y = a(x)
        return torch.cat([y, b(torch.cat([x, y], 1))], 1)

    return [a, b], hierarchy(a, b), run


WIRINGS = [chain, branches, shares, skips, loop, levels]


def data(N=9):
    torch.manual_seed(5)
    return torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)


def train(opt, model, x, y, steps=3):
    for _ in range(steps):
        opt.zero_grad()
        opt.criterion(model(x), y).backward()
        opt.step()


@pytest.mark.parametrize("wiring", WIRINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", MAKE)
def test_steps_are_those_of_the_model_written_by_hand(wiring, kind):
    torch.manual_seed(0)
    layers, composite, f = wiring()
    # Composites wrap layers, they do not copy them.
    written = Written(f, *copy.deepcopy(layers))
    x, y = data()
    assert torch.equal(composite(x), written(x))
    models = (composite, written)
    opts = [MAKE[kind](m, nn.MSELoss(), sweep="loop") for m in models]
    for opt, model in zip(opts, models, strict=True):
        train(opt, model, x, y)
    assert opts[0].last.accepted
    for own, other in zip(layers, written.layers, strict=True):
        for p, q in zip(own.parameters(), other.parameters(), strict=True):
            assert_close(p.detach(), q.detach(), 1e-10)


@pytest.mark.parametrize("wiring", [chain, branches, loop], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["layerwise", "global", "plain feedback"])
def test_masses_and_partition_are_honoured(wiring, kind):
    torch.manual_seed(0)
    layers, composite, f = wiring()
    leaves = list(composite.leaves())
    for k, leaf in enumerate(leaves):
        leaf.mass = 0.5 + k
    composite.mass = 2.0
    written = Written(f, *copy.deepcopy(layers))
    of = {id(p): 2.0 * leaf.mass for leaf in leaves for p in leaf.parameters()}
    table = {f"layers.{k}.{name}": of[id(p)] for k, layer in enumerate(layers) for name, p in layer.named_parameters()}
    masses = composite.masses()
    assert sorted(masses.values()) == sorted(table.values())
    assert list(masses) == list(dict(composite.named_parameters()))
    options = {"damping": Damping(control="fixed", initial=0.3), "sweep": "loop"}
    if kind != "global":
        options["partition"] = composite.partition()
    x, y = data()
    opt = MAKE[kind](composite, nn.MSELoss(), mass=masses, **options)
    options.pop("partition", None)
    other = MAKE[kind](written, nn.MSELoss(), mass=table, **options)
    train(opt, composite, x, y, 2)
    train(other, written, x, y, 2)
    for own, layer in zip(layers, written.layers, strict=True):
        for p, q in zip(own.parameters(), layer.parameters(), strict=True):
            assert_close(p.detach(), q.detach(), 1e-10)


def test_coalitions_are_leaves_and_shared_ones_are_one():
    a, b, net = linear(2, 2), linear(2, 2), nn.Sequential(linear(2, 2), nn.Tanh(), linear(2, 2))
    once = riemannian(a)
    whole = series(once, riemannian(net), once, riemannian(b), nn.Tanh())
    assert whole.partition() == [
        ["parts.0.module.weight", "parts.0.module.bias"],
        [f"parts.1.module.{k}.{name}" for k in (0, 2) for name in ("weight", "bias")],
        ["parts.3.module.weight", "parts.3.module.bias"],
    ]
    assert whole.partition("body.")[2] == ["body.parts.3.module.weight", "body.parts.3.module.bias"]
    # Two leaves that share one parameter are one coalition: their rows are one block.
    c = linear(2, 2)
    c.weight = a.weight
    tied = series(riemannian(a), riemannian(c), riemannian(b))
    assert [len(group) for group in tied.partition()] == [3, 2]
    opt = pullback.LayerwiseMetric(tied, nn.MSELoss(), partition=tied.partition())
    x = torch.randn(6, 2, dtype=torch.float64)
    train(opt, tied, x, x, 1)
    assert len(opt.last.spaces) == 2
    b.weight.requires_grad_(False)
    assert whole.partition()[2] == ["parts.3.module.bias"]


@pytest.mark.parametrize("kind", MAKE)
def test_a_map_the_user_writes_is_trained(kind):
    """Two coupled pendulums, one Euler step, masses and coupling recovered from their motion."""

    def swing(x, pull, couple):
        angle, speed = x[:, :2], x[:, 2:]
        force = -pull * angle.sin() + couple * (angle.flip(1) - angle)
        return torch.cat([angle + 0.1 * speed, speed + 0.1 * force], 1)

    def model(pull, couple):
        return riemannian(swing, {"pull": torch.tensor(pull).double(), "couple": torch.tensor(couple).double()})

    true, fitted = model([2.0, 3.0], 0.7), model([1.0, 1.0], 0.0)
    whole = series(*[fitted] * 4)
    torch.manual_seed(0)
    x = torch.randn(12, 4, dtype=torch.float64)
    y = series(*[true] * 4)(x).detach()
    opt = MAKE[kind](whole, nn.MSELoss())
    train(opt, whole, x, y, 25)
    assert_close(fitted.module.pull.detach(), true.module.pull.detach(), 1e-6)
    assert_close(fitted.module.couple.detach(), true.module.couple.detach(), 1e-6)


def test_manifolds_inside_composites():
    torch.manual_seed(0)
    inner = linear(3, 3)
    whole = series(residual(series(inner, nn.Tanh())), linear(3, 2))
    constrain(whole, "parts.0.parts.0.parts.0.module.weight", Stiefel(), project=True)
    x, y = data()
    opt = pullback.FeedbackGaussNewton(whole, nn.MSELoss(), mass=whole.masses(), partition=whole.partition())
    train(opt, whole, x, y, 10)
    W = inner.weight.detach()
    assert_close(W.T @ W, torch.eye(3, dtype=W.dtype), 1e-12)


def test_update_adds_or_retracts():
    inner = linear(4, 2)
    module = series(inner, linear(2, 2))
    constrain(inner, "weight", Stiefel(), project=True)
    w, b = inner.weight.detach().clone(), inner.bias.detach().clone()
    d = Stiefel().project(w, torch.randn(2, 4, dtype=torch.float64))
    ones = torch.ones(2, dtype=torch.float64)
    module.update({"parts.0.module.weight": d, "parts.0.module.bias": ones})
    assert_close(inner.weight.detach(), Stiefel().retract(w, d), 1e-15)
    assert torch.equal(inner.bias.detach(), b + ones)
    before = [p.detach().clone() for p in module.parameters()]
    bias, weight = "parts.0.module.bias", "parts.0.module.weight"
    for step, says in (
        ({"bias": ones}, r"'bias' has shape \(2,\), the module has no such parameter"),
        ({bias: ones[[0, 0, 0]]}, r"has shape \(3,\), the module has \(2,\)"),
        ({bias: ones, weight: point(Stiefel(), (2, 4))}, "leaves the tangent space"),
        ({weight: 0 * d, bias: ones * torch.nan}, "is not finite"),
    ):
        with pytest.raises(CompositionError, match=says):
            module.update(step)
        assert all(torch.equal(a, p) for a, p in zip(before, module.parameters(), strict=True))
