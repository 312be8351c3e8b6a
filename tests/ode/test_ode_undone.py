"""Steps without trials that make an ODE unsolvable: taken back, said, and gone on from."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from edges import Bounded, Cubic, Rooted
from fields import build
from torch import nn

import pullback
from models import Moving
from pullback.errors import SolverError
from pullback.ode import ODEBlock


def blowing(n=16, seed=0):
    """Targets far out, which a long step overshoots into a pole."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), ODEBlock(Cubic(), rtol=1e-3, atol=1e-4), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[1].func.s.weight.fill_(0.02)
    x = torch.randn(n, 3).double()
    return model, x, (x[:, :1] + x[:, 1:2].square())


def timed(n=16, seed=0, penalty=2.0, shortest=0.05):
    """A penalty that drives t1 towards t0."""
    options = {"learn": "t1", "penalty": penalty, "shortest": shortest, "rtol": 1e-3, "atol": 1e-4}
    return build("chain", n=n, seed=seed, **options)


def rooted(n=16, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), ODEBlock(Rooted(), rtol=1e-3, atol=1e-4), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[1].func.w.weight.fill_(0.1)
    x = torch.randn(n, 3).double()
    return model, x, torch.tanh(x[:, :1])


def bounded(n=16, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), ODEBlock(Bounded(), rtol=1e-3, atol=1e-4), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[1].func.w.weight.fill_(0.5)
    x = torch.randn(n, 3).double()
    return model, x, torch.tanh(x[:, :1])


def parallel():
    torch.manual_seed(0)
    _, x, y = bounded()
    model = Parallel().double()
    with torch.no_grad():
        model.block.func.w.weight.fill_(0.5)
    return model, x, y


def late():
    torch.manual_seed(0)
    _, x, y = bounded()
    model = Late().double()
    with torch.no_grad():
        model.b.func.w.weight.fill_(0.5)
    return model, x, y


class Parallel(nn.Module):
    """Two layers side by side, whose stage plays, in front of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)
        self.block, self.last = ODEBlock(Bounded(), rtol=1e-3, atol=1e-4), nn.Linear(2, 1)

    def forward(self, x):
        return self.last(self.block(torch.tanh(self.left(x)) + torch.relu(self.right(x))))


class Late(nn.Module):
    """Two blocks, the second of which is the one that fails."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(3, 2), ODEBlock(Moving()), ODEBlock(Bounded())
        self.last = nn.Linear(2, 1)

    def forward(self, x):
        return self.last(self.b(self.a(self.first(x))))


def made(name, model):
    """An optimizer whose steps are too long for the problem."""
    criterion = nn.MSELoss()
    if name == "game":
        game = pullback.Game(stages=[["left", "right"]], structure="cooperative")
        return criterion, pullback.KroneckerGame(model, criterion, game=game, lr=3.0)
    if name == "kronecker":
        return criterion, pullback.Kronecker(model, criterion, lr=3.0)
    if name == "whole":
        return criterion, pullback.Kronecker(model, criterion, trust=None, momentum=0.0, form="ekfac")
    if name == "gauss-newton":
        fixed = pullback.Damping(control="fixed", initial=0.1)
        return criterion, pullback.GaussNewton(
            model, criterion, damping=fixed, momentum=pullback.Momentum(kind="spring")
        )
    if name == "layerwise":
        fixed = pullback.Damping(control="slope", initial=0.1)
        return criterion, pullback.LayerwiseMetric(model, criterion, damping=fixed)
    hosts = {"sgd": {"host": "sgd", "momentum": 0.9}, "adam": {"host": "adam"}, "on kronecker": {"host": "kronecker"}}
    alone, name = name.endswith(" alone"), name.removesuffix(" alone")
    bound = 0.1 if alone else None  # which would make the steps shorter by itself
    rates = {"sgd": 0.03, "adam": 0.3, "on kronecker": 3.0}
    return criterion, pullback.OCNOpt(model, criterion, **hosts[name], lr=rates[name], feedback=not alone, bound=bound)


def momenta(opt):
    """Whatever is carried from step to step beside the weights, as numbers."""
    if isinstance(opt, pullback.optim.PullbackOptimizer):
        return [s["step"].clone() for s in opt.state.values() if "step" in s]
    inner = opt if isinstance(opt, pullback.Kronecker) else getattr(opt.host, "optimizer", None)
    if isinstance(inner, pullback.Kronecker):
        agreement = inner._stride.agreement
        own = [] if agreement is None else [torch.tensor([agreement.q, agreement.last]).double()]
        return own + [b.velocity.clone() for b in inner.blocks if b.velocity is not None]
    return [v.clone() for s in inner.state.values() for v in s.values() if isinstance(v, torch.Tensor)]


def snapshot(model, opt):
    return [p.detach().clone() for p in model.parameters()], momenta(opt)


def same(one, other):
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(one, other, strict=True))


def train(model, opt, criterion, x, y, steps):
    """A plain loop with try and except; losses, and the errors of steps that were undone."""
    losses, errors = [], []
    before = None
    for _ in range(steps):
        try:
            opt.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            before = snapshot(model, opt)
            opt.step()
            losses.append(loss.item())
        except SolverError as error:
            if not opt.undo(error):
                raise
            assert before is None or same(snapshot(model, opt), before)  # bit for bit
            errors.append(error)
    return losses, errors


OPTIMIZERS = [
    "gauss-newton",
    "layerwise",
    "kronecker",
    "whole",
    "sgd",
    "adam",
    "on kronecker",
    "sgd alone",
    "adam alone",
    "on kronecker alone",
]
CASES = [
    *[(bounded, name, "not finite at t = 0") for name in OPTIMIZERS],
    *[(blowing, name, "t = ") for name in ("kronecker", "sgd alone")],
    *[(timed, name, "t1 = ") for name in ("kronecker", "sgd alone")],
    (parallel, "game", "not finite at t = 0"),
    (late, "kronecker", "not finite at t = 0"),
]


def faster(opt, factor):
    for group in opt.param_groups:
        group["lr"] *= factor


@pytest.mark.parametrize(("problem", "name", "words"), CASES)
def test_a_learning_rate_that_rises_too_far_for_a_step(problem, name, words):
    model, x, y = problem()
    criterion, opt = made(name, model)
    faster(opt, 0.1)
    losses, errors = train(model, opt, criterion, x, y, 3)
    assert not errors
    faster(opt, 1e4)
    _, errors = train(model, opt, criterion, x, y, 2)
    faster(opt, 1e-4)
    feedback = isinstance(opt, pullback.OCNOpt) and opt.feedback  # runs the model in the step itself, and finds out
    assert len(errors) == 1 + feedback
    assert all(words in str(e) and "undone" in str(e) and e.undone and e.time == e.time for e in errors)
    assert opt._guard.share == 0.5 ** len(errors)
    rest, errors = train(model, opt, criterion, x, y, 25)
    assert not errors
    assert rest[-1] < losses[0]
    assert min(rest) < 0.95 * losses[-1]
    assert opt._guard.share == 1
    if problem is timed:
        assert 0.05 <= model[1].t1 < 1


@pytest.mark.parametrize("name", ["kronecker", "sgd alone", "adam alone", "on kronecker alone"])
def test_steps_that_are_always_too_long_become_shorter(name):
    model, x, y = rooted()
    criterion, opt = made(name, model)
    losses, errors = train(model, opt, criterion, x, y, 40)
    assert errors
    assert losses[-1] < 0.3 * losses[0]


def test_a_penalty_that_wants_a_time_beyond_its_bound():
    model, x, y = timed(penalty=20.0, shortest=0.7)
    criterion, opt = made("kronecker", model)
    losses, errors = train(model, opt, criterion, x, y, 20)
    assert errors
    assert all("t1 = " in str(e) for e in errors)
    assert 0.7 <= model[1].t1 < 0.71
    assert losses[-1] < losses[0]


def test_the_undone_step_is_in_the_record_and_the_next_is_half_as_long():
    found = []
    for share in (1.0, 0.5):
        model, opt, criterion, x, y, before = broken_by_a_step()
        with pytest.raises(SolverError):
            model(x)
        assert not opt.last.accepted
        assert opt.last.note.startswith("undone: The field")
        assert opt._guard.share == 0.5
        opt._guard.share = share
        opt.zero_grad()
        criterion(model(x), y).backward()
        opt.step()
        assert opt.last.accepted
        pairs = zip(model.parameters(), before[0], strict=True)
        found.append(torch.cat([(p - q).detach().flatten() for p, q in pairs]))
        assert [group["lr"] for group in opt.param_groups] == [1e4]
    assert torch.allclose(found[1], 0.5 * found[0], rtol=1e-12)


@pytest.mark.parametrize("name", ["kronecker", "adam alone"])
def test_with_a_closure_the_optimizer_does_it_itself(name):
    model, x, y = rooted()
    criterion, opt = made(name, model)
    counts = []

    def closure():
        counts.append(1)
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    losses = [float(opt.step(closure).detach()) for _ in range(40)]
    assert opt._guard.share < 1 or len(counts) > 40
    assert losses[-1] < 0.3 * losses[0]


def test_a_closure_that_fails_anyway_raises():
    model, opt, criterion, x, y, before = broken_by_a_step()
    given = [x, x * torch.nan]

    def closure():
        return criterion(model(given.pop(0)), y)

    with pytest.raises(SolverError, match="not finite") as caught:
        opt.step(closure)  # undone, and again on data that no weights can help
    assert not given
    assert not caught.value.undone
    assert same(snapshot(model, opt), before)


def broken_by_a_step():
    """A model whose next pass in training fails, and what was before its last step."""
    model, x, y = bounded()
    criterion, opt = made("whole", model)
    faster(opt, 1e-2)
    train(model, opt, criterion, x, y, 1)
    faster(opt, 1e6)
    opt.zero_grad()
    criterion(model(x), y).backward()
    before = snapshot(model, opt)
    opt.step()
    return model, opt, criterion, x, y, before


def test_evaluations_undo_nothing():
    model, opt, _, x, _, before = broken_by_a_step()
    moved = snapshot(model, opt)
    assert not same(moved, before)
    for grad, mode in ((False, True), (False, False), (True, False)):
        model.train(mode)
        with torch.set_grad_enabled(grad), pytest.raises(SolverError) as caught:
            model(x)
        assert not caught.value.undone
        assert same(snapshot(model, opt), moved)
    model.train()
    with pytest.raises(SolverError, match="undone"):
        model(x)
    assert same(snapshot(model, opt), before)
    model(x)


def test_an_evaluation_may_be_made_to_count():
    model, opt, _, x, _, before = broken_by_a_step()
    with torch.no_grad(), pytest.raises(SolverError) as caught:
        model(x)
    assert opt.undo(caught.value)
    assert opt.undo(caught.value)  # it is, already
    assert same(snapshot(model, opt), before)


@pytest.mark.parametrize("name", ["gauss-newton", "kronecker"])
def test_a_backward_pass_that_fails_undoes_the_step(name):
    """A field that contracts so strongly that its way back is lost, though its way there is found."""
    torch.manual_seed(0)
    block = ODEBlock(Contracting(), solver="rk4", step=0.1)
    model = nn.Sequential(nn.Linear(3, 2), block, nn.Linear(2, 1)).double()
    x = torch.randn(16, 3).double()
    y = torch.tanh(x[:, :1])
    criterion, opt = made(name, model)
    train(model, opt, criterion, x, y, 2)
    before = snapshot(model, opt)
    opt.zero_grad()
    criterion(model(x), y).backward()
    opt.step()
    with torch.no_grad():
        opt._guard._versions = None  # what follows is ours, not another's
        block.func.rate.weight.fill_(30.0)
    opt._guard._versions = [p._version for p in opt._params()]
    loss = criterion(model(x), y)  # finite: the way there is no trouble
    with pytest.raises(SolverError, match="undone") as caught:
        loss.backward()
    assert caught.value.undone
    assert same(snapshot(model, opt), before)
    _, errors = train(model, opt, criterion, x, y, 2)
    assert not errors


class Contracting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Linear(1, 1, bias=False)

    def forward(self, t, x):
        return -self.rate(x.new_ones(len(x), 1)) * x


def test_data_are_to_blame_for_what_is_in_the_data():
    model, x, y = rooted()
    criterion, opt = made("kronecker", model)
    train(model, opt, criterion, x, y, 1)
    moved = snapshot(model, opt)
    with pytest.raises(SolverError) as caught:
        model(x * torch.nan)
    assert not caught.value.undone
    assert same(snapshot(model, opt), moved)
    model(x)


def test_weights_that_others_changed_stay():
    model, opt, _, x, _, _ = broken_by_a_step()
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()})
    moved = snapshot(model, opt)
    with pytest.raises(SolverError) as caught:
        model(x)
    assert not caught.value.undone
    assert same(snapshot(model, opt), moved)
    assert not opt.undo(caught.value)


def test_patience_ends():
    model, opt, _, x, _, before = broken_by_a_step()
    opt._guard.undone = 10
    with pytest.raises(SolverError, match="number 11 in succession") as caught:
        model(x)
    assert same(snapshot(model, opt), before)
    assert not opt.undo(caught.value)


def test_only_models_with_blocks_pay():
    plain = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    for cls in (pullback.Kronecker, pullback.OCNOpt, pullback.GaussNewton):
        assert cls(plain, nn.MSELoss())._guard is None
    model, x, y = rooted()
    assert pullback.GaussNewton(model, nn.MSELoss())._guard is not None
    criterion, opt = made("kronecker", model)
    train(model, opt, criterion, x, y, 1)
    copied = copy.deepcopy(model)
    hooks = len(model._forward_hooks)
    opt.close()
    assert len(model._forward_hooks) == hooks - 2
    dead = weakref.ref(opt)
    del opt
    gc.collect()
    assert dead() is None
    copied(x)  # the copy's hooks are inert
    with pytest.raises(SolverError):
        copied(x * torch.nan)


def test_a_resumed_optimizer_keeps_its_length():
    model, opt, criterion, x, y, _ = broken_by_a_step()
    with pytest.raises(SolverError):
        model(x)
    faster(opt, 1e-5)
    twin = copy.deepcopy(model)
    other = pullback.Kronecker(twin, criterion, trust=None, momentum=0.0, form="ekfac")
    other.load_state_dict(opt.state_dict())
    assert other._guard.share == opt._guard.share < 1
    for m, o in ((model, opt), (twin, other)):
        train(m, o, criterion, x, y, 3)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
