"""Oracles of what is anticipated: second derivatives by automatic differentiation, and dense recursions."""

from __future__ import annotations

import pytest
import torch
from loops import Looped, looped
from torch import Tensor, nn
from torch.autograd.functional import jvp
from torch.func import functional_call, jacrev

import pullback
from oracle import assert_close, dense
from pullback.control import Course
from pullback.optim.closed_loop import LOOK
from pullback.problems import load_problem


class Skip(nn.Module):
    """A residual block between two layers: the skip crosses both cuts inside."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.last = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def states(self, x):
        """What crosses the cut in front of every layer: its own input, and the skip."""
        h = self.first(x)
        s = torch.sigmoid(h)
        t = torch.tanh(self.a(s))
        return [(x,), (h, s), (h, t), (torch.tanh(h + self.b(t)),)]

    def onwards(self, cut, state):
        """The prediction from what is across a cut."""
        if cut == 0:
            h = self.first(state[0])
            state, cut = (h, torch.sigmoid(h)), 1
        if cut == 1:
            state, cut = (state[0], torch.tanh(self.a(state[1]))), 2
        if cut == 2:
            state = (torch.tanh(state[0] + self.b(state[1])),)
        return self.last(state[0])

    def forward(self, x):
        return self.onwards(0, (x,))


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2)])

    def states(self, x):
        found = [(x,)]
        for layer in self.layers[:-1]:
            found.append((torch.tanh(layer(found[-1][0])),))
        return found

    def onwards(self, cut, state):
        (h,) = state
        for layer in self.layers[cut:]:
            h = layer(h) if layer is self.layers[-1] else torch.tanh(layer(h))
        return h

    def forward(self, x):
        return self.onwards(0, (x,))


class Call(nn.Module):
    """A method of a module, for ``functional_call``."""

    def __init__(self, net, method):
        super().__init__()
        self.net, self.method = net, method

    def forward(self, *args):
        return getattr(self.net, self.method)(*args)


def problem(kind, N=7):
    torch.manual_seed(0)
    model = kind().double()
    return model, torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)


def rows(z: Tensor) -> Tensor:
    """S^T z of the mean squared error, shape (R,)."""
    return (z * (2 / z.numel()) ** 0.5).T.reshape(-1)


def second_order(model, x, d: dict[str, Tensor]) -> list[Tensor]:
    """Half the second directional derivative along d at every cut, seen through the nominal rest; the end last."""
    nominal = {name: p.detach() for name, p in model.named_parameters()}

    def twice(f):
        def along(t):
            return f({name: p + t * d[name] for name, p in nominal.items()})

        return jacrev(jacrev(along))(torch.zeros((), dtype=x.dtype))

    def states(p):
        return functional_call(Call(model, "states"), {f"net.{k}": v for k, v in p.items()}, (x,))

    found = []
    here = states(nominal)
    for cut, state in enumerate(here):
        bent = twice(lambda p, cut=cut: states(p)[cut])
        z = jvp(lambda *s, cut=cut: model.onwards(cut, s), state, bent)[1]
        found.append(0.5 * rows(z))
    end = twice(lambda p: functional_call(model, p, (x,)))
    return [*found, 0.5 * rows(end)]


def named(found: Looped, packed):
    """Packed steps by parameter name."""
    by_id = found.flat(packed)
    return {name: by_id[id(p)] for name, p in found.model.named_parameters()}


@pytest.mark.parametrize("kind", [Chain, Skip])
def test_the_remainder_is_half_the_second_derivative_behind_the_cut(kind):
    model, x, y = problem(kind)
    found = looped(model, nn.MSELoss(), [((x,), {}, y)])
    assert not found.route.broken
    d = found.loop.joint()
    *seen, end = second_order(model, x, named(found, d))
    errors = []
    for h in (1e-2, 1e-3, 1e-4):
        with torch.no_grad():
            rho = found.loop.anticipate(d, h, found.loop.products(d))
        assert len(rho) == len(seen)
        errors.append([float((r - (end - own)).norm() / end.norm()) for r, own in zip(rho, seen, strict=True)])
        assert_close(rho[0], end, 10 * h)  # nothing is seen in front of the first module
    assert float((seen[2]).norm()) > 1e-3 * float(end.norm())
    for coarse, middle, fine in zip(*errors, strict=True):
        assert middle < 0.2 * coarse < 0.2
        assert fine < 0.2 * middle


@pytest.mark.parametrize("kind", [Chain, Skip])
def test_looking_leaves_the_weights_as_they_were(kind):
    model, x, y = problem(kind)
    found = looped(model, nn.MSELoss(), [((x,), {}, y)])
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        direction = found.loop.joint()
        found.loop.anticipate(direction, 0.1, found.loop.products(direction))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def linearly(self, passage, cut, moved):
    return torch.cat([self.linear(t, moved) for t in range(len(self.terms))])


@pytest.mark.parametrize("space", ["dual", "primal", "auto"])
@pytest.mark.parametrize(
    ("rates", "alpha"),
    [((1.0,) * 4, 1.0), ((1.0,) * 4, 0.5), ((0.3,) * 4, 0.5), ((0.5, 0.5, 0.5, 1.0), 1.0), ((0.0, 0.0, 1.0, 1.0), 1.0)],
)
def test_steps_along_the_arc_are_the_dense_recursion(space, rates, alpha, monkeypatch):
    """alpha e_0 + e_l + alpha^2 rho_l, each stage with its own tail."""
    model, x, y = problem(Chain)
    found = looped(model, nn.MSELoss(), [((x,), {}, y)], space=space)
    monkeypatch.setattr(Course, "deviation", linearly)
    loop, mu = found.loop, found.loop.tails._mu
    loop.__init__(  # type: ignore[misc]
        loop.course, loop.tails, loop.e0, loop.rest, scales=None, rates=rates, roots=loop.roots, run=loop._run
    )
    rho = [torch.randn_like(loop.e0) for _ in rates]
    with torch.no_grad():
        steps = loop.sweep(rho, alpha).steps
    U = [torch.cat([block.dense() for block in own], 1) for own in loop.course.stages]
    e, most = torch.zeros_like(loop.e0), 0.0
    for k, own in enumerate(steps):
        T = sum(u @ u.T for u in U[k:]) + mu * torch.eye(len(e), dtype=e.dtype)
        share = min(1.0, rates[k] / most) if most else 1.0
        v = alpha * rates[k] * loop.e0 + share * e + alpha**2 * rates[k] / max(rates) * rho[k]
        true = -U[k].T @ torch.linalg.solve(T, v)
        assert_close(torch.cat(own), true, 1e-9)
        e, most = e + U[k] @ true, max(most, rates[k])


def test_rates_of_stages_scale_the_gauss_newton_step(monkeypatch):
    """A stage no faster than those before, which have one rate: its rate times Gauss-Newton's step."""
    model, x, y = problem(Chain)
    found = looped(model, nn.MSELoss(), [((x,), {}, y)])
    monkeypatch.setattr(Course, "deviation", linearly)
    joint = found.loop.joint()
    rates = (0.4, 0.4, 0.4, 0.1)
    loop = found.loop
    loop.__init__(  # type: ignore[misc]
        loop.course, loop.tails, loop.e0, loop.rest, scales=None, rates=rates, roots=loop.roots, run=loop._run
    )
    with torch.no_grad():
        steps = loop.sweep().steps
    for rate, own, d in zip(rates, steps, joint, strict=True):
        assert_close(torch.cat(own), rate * torch.cat(d), 1e-9)


@pytest.mark.parametrize("space", ["dual", "primal"])
@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_a_geodesic_step_is_gauss_newton_and_its_acceleration(space, lr):
    model, x, y = problem(Chain)
    criterion = nn.MSELoss()
    found = looped(model, criterion, [((x,), {}, y)])
    U, e0 = dense(model, found.lin.blocks), found.lin.e0
    found.tape.close()
    opt = pullback.GaussNewton(
        model, criterion, geodesic=True, solver=space, lr=lr, damping=pullback.Damping(control="fixed", initial=30.0)
    )
    model.zero_grad()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    criterion(model(x), y).backward()
    opt.step()
    assert opt.last.note == "acceleration"
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    M = U.T @ U + opt.last.mu * torch.eye(U.shape[1], dtype=U.dtype)
    d = lr * torch.linalg.solve(M, -U.T @ e0)
    with torch.no_grad():
        z = model_at(model, before, x)
        bent = (rows(model_at(model, before + LOOK * d, x) - z) - LOOK * U @ d) / LOOK**2
    assert_close(after - before, d - torch.linalg.solve(M, U.T @ bent), 1e-8)


def model_at(model, vector, x):
    shapes = {name: p.shape for name, p in model.named_parameters()}
    parts = vector.split([shape.numel() for shape in shapes.values()])
    return functional_call(model, {k: v.view(s) for (k, s), v in zip(shapes.items(), parts, strict=True)}, (x,))


def losses(opt_of, iterations):
    problem = load_problem("function-2d:depth=6")
    torch.manual_seed(0)
    model = problem.make_model(0).double()
    opt = opt_of(model, problem.criterion)
    x, y = problem.train
    for _ in range(iterations):
        opt.zero_grad()
        loss = problem.criterion(model(x), y)
        loss.backward()
        opt.step()
    return loss.item()


def test_without_the_deviation_it_stalls(monkeypatch):
    """The ablation: modules that do not hear what those before them did overshoot together."""
    plain = losses(lambda m, c: pullback.FeedbackGaussNewton(m, c, anticipate=False, sweep="loop"), 40)

    def deaf(self, passage, cut, moved):
        return torch.zeros(sum(term.R for term in self.terms), dtype=torch.float64)

    monkeypatch.setattr(Course, "deviation", deaf)
    stalled = losses(lambda m, c: pullback.FeedbackGaussNewton(m, c, anticipate=False, sweep="loop"), 40)
    assert plain < 1e-2 < stalled
    assert plain < 1e-3 * stalled
