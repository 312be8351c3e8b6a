"""OCNOpt: its host without feedback, the dense twin with it, and what users expect of an optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pullback
from cases import CASES
from closed import train, weights
from control.loops import looped
from oracle import assert_close
from pullback import OCNOpt, Sampled, Trust
from pullback.control import Course, Host
from pullback.control.host import Raised, TorchHost
from pullback.curvature.block import blocks_of
from pullback.tape import Tape, Term
from samplewise import Dense, Meanwise, Riccati, network

HOSTS = {
    "sgd": (torch.optim.SGD, {"lr": 0.3}),
    "sgd momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-2, "alpha": 0.9}),
    "rmsprop centered": (torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.5, "weight_decay": 1e-2, "centered": True}),
    "adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 1e-2}),
    "adam amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
}
every = pytest.mark.parametrize("kind", HOSTS)


def classes(dtype=torch.float64, N=12, sizes=(3, 5, 4, 3), seed=0):
    model = network(list(sizes), seed).to(dtype)
    return model, nn.CrossEntropyLoss(), torch.randn(N, sizes[0], dtype=dtype), torch.randint(sizes[-1], (N,))


def made(kind, model, criterion, **options):
    make, given = HOSTS[kind]
    return OCNOpt(model, criterion, host=lambda params: make(params, **given), **options)


# -- the host -------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_feedback_it_is_its_host_bit_for_bit(kind, named, dtype):
    make, given = HOSTS[kind]
    model, criterion, x, y = classes(dtype)
    twin = copy.deepcopy(model)
    if named:
        name = {"adamw": "adam"}.get(kind, kind.split()[0])
        make = {"adamw": torch.optim.Adam}.get(kind, make)
        opt = OCNOpt(model, criterion, host=name, feedback=False, **given)
    else:
        opt = made(kind, model, criterion, feedback=False)
    host = make(twin.parameters(), **given)
    ours = train(opt, lambda: criterion(model(x), y), 7)
    theirs = train(host, lambda: criterion(twin(x), y), 7)
    assert ours == theirs
    assert torch.equal(weights(model), weights(twin))
    for a, b in zip(opt.state.values(), host.state.values(), strict=True):
        assert {k: v.tolist() if torch.is_tensor(v) else v for k, v in a.items()} == {
            k: v.tolist() if torch.is_tensor(v) else v for k, v in b.items()
        }


def test_the_identity_over_eta_is_gradient_descent():
    model, criterion, x, y = classes()
    opt = OCNOpt(model, criterion, lr=0.25, feedback=False)
    before = weights(model)
    criterion(model(x), y).backward()
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    opt.step()
    assert_close(weights(model), before - 0.25 * g, 1e-14)


@every
def test_the_curvature_is_the_one_the_host_steps_with(kind):
    """Q_uu^{-1} times the gradient (for Adam its debiased mean) is the step, without momentum or decay."""
    make, given = HOSTS[kind]
    given = {**given, "weight_decay": 0.0} | ({"momentum": 0.0} if "momentum" in given else {}) | (
        {"nesterov": False} if "nesterov" in given else {})  # fmt: skip
    model, criterion, x, y = classes()
    opt = OCNOpt(model, criterion, host=lambda params: make(params, **given), feedback=False)
    for step in range(1, 4):
        before = [p.detach().clone() for p in model.parameters()]
        train(opt, lambda: criterion(model(x), y), 1)
        for p, old in zip(model.parameters(), before, strict=True):
            (inverse,) = opt.host.diagonal([p])
            mean = opt.state[p]["exp_avg"] / (1 - 0.9**step) if "adam" in kind else p.grad
            assert_close(p.detach() - old, -inverse * mean, 1e-9)
            (same,) = opt.host.solve([p], [mean])
            assert_close(same, inverse * mean)


# -- the twin -------------------------------------------------------------------------------------------


def twin_of(model, criterion, x, y, S, curvature, positive=False):
    N = len(x)
    z = model(x)
    (lam,) = torch.autograd.grad(criterion(z, y), z)
    return Riccati(model, x, N * lam, S * N**0.5, curvature, positive)


def factor_of(model, x, y, metric):
    """The factor at the prediction, (N, c, r), as a tape with the same metric makes it."""
    tape = Tape(model, nn.CrossEntropyLoss(), metric, "loop")
    tape.losses[0][0](model(x), y).backward()
    S = tape.terms[0].factors[id(model[-1])][0].factor().permute(1, 2, 0)
    tape.close()
    return S


@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("kind", ["sgd", "sgd momentum", "rmsprop", "adam"])
@pytest.mark.parametrize("bound", [None, 1e-6])
def test_the_update_counts_on_the_mean_as_the_dense_twin_does(rank, kind, bound):
    make, given = HOSTS[kind]
    model, criterion, x, y = classes()
    metric = None if rank is None else Sampled(m=rank, seed=3)
    opt = OCNOpt(model, criterion, rank=rank, bound=bound, seed=3, sweep="loop",
                 host=lambda params: make(params, **given))  # fmt: skip
    shadow = copy.deepcopy(model)
    host = make(shadow.parameters(), **given)
    for _ in range(3):
        opt._tape.recorder.enabled = False
        shadow.load_state_dict(model.state_dict())
        S = factor_of(model, x, y, metric)
        host.zero_grad()
        loss = criterion(shadow(x), y)
        loss.backward()
        host.step()
        pairs = list(zip(model[::2], shadow[::2], strict=True))
        steps = [Riccati.flat(moved) - Riccati.flat(layer) for layer, moved in pairs]
        inner = TorchHost(host)
        matrices = {
            id(layer.weight): torch.cat([
                1 / torch.as_tensor(d, dtype=torch.float64).expand(p.shape).reshape(-1)
                for p, d in zip(layer.parameters(), inner.diagonal(list(moved.parameters())), strict=True)
            ]).diag()
            for layer, moved in pairs
        }  # fmt: skip
        chain = twin_of(model, criterion, x, y, S, Dense(matrices))
        P = S @ S.mT
        twin, share = Meanwise(chain, P, steps, Dense(matrices)), 1.0
        if bound is not None and twin.length > 2 * bound * loss.item():
            share = (2 * bound * loss.item() / twin.length) ** 0.5
            twin = Meanwise(chain, P, steps, Dense(matrices), share)
            inner.shorten(share)
        expected = torch.cat(twin.updated())
        opt._tape.recorder.enabled = True
        before = weights(model)
        train(opt, lambda: criterion(model(x), y), 1)
        assert_close(weights(model) - before, expected - before, 1e-9)
        assert opt.last.scale == pytest.approx(share, rel=1e-9)
        assert (opt.last.scale < 1) == (bound is not None)


@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "rmsprop"])
def test_the_update_is_that_of_the_dense_recursion(rank, positive, kind):
    make, given = HOSTS[kind]
    model, criterion, x, y = classes()
    S = factor_of(model, x, y, None if rank is None else Sampled(m=rank, seed=3))
    opt = OCNOpt(model, criterion, rank=rank, form="positive" if positive else "clamped", seed=3, sweep="loop",
                 host=lambda params: make(params, **given))  # fmt: skip
    opt.zero_grad()
    criterion(model(x), y).backward()
    matrices = {}
    for layer in model[::2]:
        g = torch.cat([p.grad.reshape(-1) for p in layer.parameters()])
        q = torch.ones_like(g) if kind == "sgd" else (0.1 * g**2).sqrt() + 1e-8
        matrices[id(layer.weight)] = torch.diag(q / given["lr"])
    opt._tape.recorder.enabled = False
    twin = twin_of(model, criterion, x, y, S, Dense(matrices), positive)
    expected = twin.updated()
    opt._tape.recorder.enabled = True
    before = weights(model)
    opt.step()
    assert_close(weights(model), torch.cat(expected), 1e-9)
    assert_close(weights(model) - before, torch.cat(expected) - before, 1e-9)
    assert opt.last.clamped == (0 if positive else sum(twin.clamped[1:]))


def test_a_host_of_any_curvature_can_be_plugged_in():
    """Full matrices, and only ``solve``."""
    model, criterion, x, y = classes()
    torch.manual_seed(5)
    matrices = {}
    for layer in model[::2]:
        A = torch.randn(n := sum(p.numel() for p in layer.parameters()), n, dtype=torch.float64)
        matrices[id(layer.weight)] = A @ A.T / n + 5 * torch.eye(n, dtype=torch.float64)

    class Full(Dense):
        def __init__(self, params):
            super().__init__(matrices)
            self.optimizer = torch.optim.SGD(params)
            self.seen = []

        def prepare(self, blocks):
            self.seen = [block.R for block in blocks]

        def advance(self):
            for layer in model[::2]:
                own = list(layer.parameters())
                for p, d in zip(own, self.solve(own, [p.grad for p in own]), strict=True):
                    p.sub_(d)

        def shorten(self, share):
            raise AssertionError

        def keep(self):
            return None

        def put_back(self, kept):
            assert kept is None

    S = factor_of(model, x, y, Sampled(m=2, seed=0))
    expected = twin_of(model, criterion, x, y, S, Dense(matrices)).updated()
    opt = OCNOpt(model, criterion, rank=2, host=Full, sweep="loop", form="clamped")
    assert isinstance(opt.host, Host)
    train(opt, lambda: criterion(model(x), y), 1)
    assert opt.host.seen == [24, 24, 24]
    assert_close(weights(model), torch.cat(expected), 1e-9)
    opt._curvature.eps = 0.1
    with pytest.raises(ValueError, match="curvature is not diagonal"):
        train(opt, lambda: criterion(model(x), y), 1)


@pytest.mark.parametrize("form", ["mean", "positive"])
def test_for_one_sample_it_is_exact_feedback(form):
    torch.manual_seed(0)
    model = network([3, 5, 4, 2])
    criterion, x, y = nn.MSELoss(), torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64)
    found = looped(model, criterion, [((x,), {}, y)], 1 / 0.4, relative=False)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        found.loop.sweep()
        expected = weights(model)
        torch._foreach_copy_(list(model.parameters()), before)
    found.tape.close()
    opt = OCNOpt(model, criterion, lr=0.4, rank=None, form=form, bound=None, sweep="loop")
    train(opt, lambda: criterion(model(x), y), 1)
    assert_close(weights(model), expected, 1e-10)


# -- any model -------------------------------------------------------------------------------------------


def stepped(case, lr, form, monkeypatch=None):
    """A step on a case; the weights' change by parameter, the gradient, and the stages."""
    model, args, kwargs = case.build()
    criterion = nn.MSELoss()
    opt = OCNOpt(model, criterion, lr=lr, rank=None, sweep="loop", form=form, bound=None)
    z = model(*args, **kwargs)
    torch.manual_seed(1)
    y = torch.randn_like(z)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    courses = []
    start = Course.__init__

    def seen(self, *given):
        start(self, *given)
        courses.append(self)

    def linear(self, passage, cut, moved):
        parts = {}
        for k in range(cut):
            parts[k] = [block.pack([p - before[id(p)] for p in block.params]) for block in self.stages[k]]
        return self.linear(0, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Course, "__init__", seen)
        if monkeypatch is not None:
            monkeypatch.setattr(Course, "deviation", linear)
        criterion(z, y).backward()
        opt.step()
    stages = [block for blocks in courses[0].stages for block in blocks]
    step = [block.pack([p.detach() - before[id(p)] for p in block.params]) for block in stages]
    return step, [block.dense() for block in stages], courses[0].terms[0]


def alone(Us, term, lr):
    """From dense rows, samples that count on themselves: W and gamma each stage answers with, first to last."""
    r, N = term.r, term.N
    e0 = term.e0.view(r, N)
    W = [[torch.eye(r, dtype=e0.dtype) for _ in range(N)]]
    gamma = [[torch.zeros(r, dtype=e0.dtype) for _ in range(N)]]
    for own in Us[:0:-1]:
        U = own.view(r, N, -1)
        W.append([])
        gamma.append([])
        for n in range(N):
            h = N * lr * U[:, n] @ U[:, n].T
            b = h @ e0[:, n]
            values, vectors = torch.linalg.eigh(W[-2][n])
            C = torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
            values, vectors = torch.linalg.eigh(torch.eye(r, dtype=h.dtype) - C @ h @ C.T)
            W[-1].append(C.T @ vectors @ torch.diag(values.clamp_min(0)) @ vectors.T @ C)
            gamma[-1].append(gamma[-2][n] + W[-2][n] @ (b - h @ gamma[-2][n]))
    return W[::-1], gamma[::-1]


def together(Us, term, lr):
    """The same of samples that count on the mean."""
    r, N = term.r, term.N
    W, gamma = [[torch.eye(r, dtype=term.e0.dtype) for _ in range(N)]], [torch.zeros_like(term.e0)]
    for own in Us[::-1]:
        U = own.view(r, N, -1)
        done = (own @ (-lr * own.T @ (term.e0 - gamma[-1]))).view(r, N)
        W.append([
            torch.linalg.inv(torch.linalg.inv(V) + N**0.5 * lr * U[:, n] @ U[:, n].T) for n, V in enumerate(W[-1])
        ])  # fmt: skip
        gamma.append(gamma[-1] - torch.stack([V @ done[:, n] for n, V in enumerate(W[-1])], 1).reshape(-1))
    return W[:0:-1], [[own.view(r, N)[:, n] for n in range(N)] for own in gamma[:0:-1]]


def linearly(Us, term, lr, values):
    """The answers, the deviation by products: the steps of the stages."""
    r, N = term.r, term.N
    e0 = term.e0.view(r, N)
    steps, e = [], torch.zeros_like(e0)
    for own, Ws, gs in zip(Us, *values(Us, term, lr), strict=True):
        U = own.view(r, N, -1)
        v = torch.stack([e0[:, n] + Ws[n] @ e[:, n] - gs[n] for n in range(N)], 1)
        steps.append(-lr * torch.einsum("anc,an->c", U, v))
        e = e + torch.einsum("anc,c->an", U, steps[-1])
    return steps


forms = pytest.mark.parametrize(("form", "values"), [("mean", together), ("clamped", alone)], ids=["mean", "clamped"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@forms
def test_for_every_layer_and_wiring_with_linear_deviations(case, form, values, monkeypatch):
    steps, Us, term = stepped(case, 0.05, form, monkeypatch)
    expected = linearly(Us, term, 0.05, values)
    assert_close(torch.cat(steps), torch.cat(expected), 1e-8)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@forms
def test_with_the_measured_ones_to_first_order(case, form, values):
    misses = []
    for lr in (3e-3, 3e-4):
        steps, Us, term = stepped(case, lr, form)
        expected = torch.cat(linearly(Us, term, lr, values))
        plain = torch.cat([-lr * own.T @ term.e0 for own in Us])
        if float((expected - plain).abs().max()) < 1e-14 * lr or len(Us) == 1:
            return  # a single stage
        misses.append(float((torch.cat(steps) - expected).norm() / (expected - plain).norm()))
    assert misses[1] < 1e-7 or misses[1] < 0.4 * misses[0], misses


def test_dropout_has_the_mask_of_the_first_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 20), nn.Dropout(0.5), nn.Tanh(), nn.Linear(20, 3)).double()
    criterion, x, y = nn.CrossEntropyLoss(), torch.randn(8, 3, dtype=torch.float64), torch.randint(3, (8,))
    opt = OCNOpt(model, criterion, lr=0.1)
    losses = train(opt, lambda: criterion(model(x), y), 60)
    assert losses[-1] < 0.7 * losses[0]
    assert opt.last.runs == 1


# -- all or nothing ---------------------------------------------------------------------------------------


def same(a, b):
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


def state(opt):
    return [v.clone() for own in opt.state.values() for v in own.values() if torch.is_tensor(v)]


@pytest.mark.parametrize("kind", ["sgd", "sgd momentum", "rmsprop", "adam"])
def test_what_is_not_finite_is_refused_and_nothing_has_moved(kind):
    model, criterion, x, y = classes(torch.float32)
    opt = made(kind, model, criterion)
    train(opt, lambda: criterion(model(x), y), 3)
    before, kept = weights(model), state(opt)
    bad = x.clone()
    bad[0, 0] = torch.nan
    for feedback in (True, False):
        opt.feedback = feedback
        with pytest.raises(pullback.StepError, match="not finite"):
            train(opt, lambda: criterion(model(bad), y), 1)
        assert torch.equal(before, weights(model))
        assert same(kept, state(opt))
    opt.feedback = True
    rate, opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"], 1e37
    with pytest.raises(pullback.StepError, match="layers answer to is not finite"):
        train(opt, lambda: criterion(model(x), y), 1)
    assert torch.equal(before, weights(model))
    assert same(kept, state(opt))
    opt.param_groups[0]["lr"] = rate
    train(opt, lambda: criterion(model(x), y), 3)
    assert not torch.equal(before, weights(model))


def test_a_run_that_goes_another_way_is_refused():
    model, criterion, x, y = classes()
    opt = OCNOpt(model, criterion, momentum=0.9, lr=0.1)
    noise = iter(range(10))
    before = weights(model)
    with pytest.raises(pullback.StepError, match="gave other numbers"):
        opt.step(lambda: criterion(model(x + next(noise)), y))
    assert torch.equal(before, weights(model))
    opt.step(lambda: criterion(model(x), y))
    before, kept, sizes = weights(model), state(opt), iter((12, 5))

    def shrinking():
        n = next(sizes)
        return criterion(model(x[:n]), y[:n])

    with pytest.raises(pullback.StepError, match="of shape"):
        opt.step(shrinking)
    assert torch.equal(before, weights(model))
    assert same(kept, state(opt))


def test_batch_statistics_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    _, criterion, x, y = classes()
    with pytest.raises(ValueError, match="batch_norm='frozen'"):
        OCNOpt(model, criterion, batch_norm="frozen")
    opt = OCNOpt(model, criterion)
    with pytest.raises(pullback.MixingError, match="mixes the samples"):
        train(opt, lambda: criterion(model(x), y), 1)
    model.eval()
    train(opt, lambda: criterion(model(x), y), 2)


# -- around the model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, None])
def test_a_batch_of_one(rank):
    model, criterion, x, y = classes(N=1)
    opt = OCNOpt(model, criterion, lr=0.1, rank=rank)
    losses = train(opt, lambda: criterion(model(x), y), 20)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("form", ["mean", "positive", "clamped"])
def test_accumulated_batches_are_one_batch(form):
    """All but that each part passes the model by itself: a stage answers to the parts to come by products with U."""
    whole, criterion, x, y = classes()
    parts, start = copy.deepcopy(whole), weights(whole)
    a, b = (OCNOpt(m, criterion, lr=0.25, rank=None, sweep="loop", form=form) for m in (whole, parts))
    for _ in range(3):
        train(a, lambda: criterion(whole(x), y), 1)
        b.zero_grad()
        for k in (slice(0, 4), slice(4, 12)):
            (criterion(parts(x[k]), y[k]) * (len(y[k]) / len(y))).backward()
        b.step()
    assert float((weights(parts) - weights(whole)).abs().max()) < 1e-3 * float((start - weights(whole)).abs().max())
    assert a.last.clamped == b.last.clamped


def test_a_sum_is_a_mean_at_a_smaller_rate():
    model, _, x, y = classes()
    twin = copy.deepcopy(model)
    mean, total = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    a, b = OCNOpt(model, mean, lr=0.6, rank=None), OCNOpt(twin, total, lr=0.05, rank=None)
    train(a, lambda: mean(model(x), y), 3)
    train(b, lambda: total(twin(x), y), 3)
    assert_close(weights(twin), weights(model), 1e-12)


def test_a_scaled_loss_is_unscaled():
    model, criterion, x, y = classes(torch.float32)
    twin = copy.deepcopy(model)
    a, b = (OCNOpt(m, criterion, lr=0.5, sweep="loop") for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for _ in range(3):
        train(a, lambda: criterion(model(x), y), 1)
        b.zero_grad()
        scaler.scale(criterion(twin(x), y)).backward()
        scaler.step(b)
        scaler.update()
    assert_close(weights(twin), weights(model), 1e-6)


def test_half_precision_on_the_way():
    model, criterion, x, y = classes(torch.float32)
    moved = []
    for enabled in (False, True):
        own = copy.deepcopy(model)
        opt = OCNOpt(own, criterion, lr=0.5, rank=None, sweep="loop")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = criterion(own(x), y)
        loss.backward()
        opt.step()
        moved.append(weights(own) - weights(model))
    assert_close(moved[1], moved[0], 0.05)


def test_a_closure_is_the_loop():
    model, criterion, x, y = classes()
    twin = copy.deepcopy(model)
    a, b = (OCNOpt(m, criterion, lr=0.5, sweep="loop") for m in (model, twin))
    for _ in range(4):
        train(a, lambda: criterion(model(x), y), 1)
        b.step(lambda: criterion(twin(x), y))
    assert torch.equal(weights(twin), weights(model))


@every
def test_resume_in_mid_run_is_bit_exact(kind):
    model, criterion, x, y = classes()
    opt = made(kind, model, criterion, sweep="loop")
    train(opt, lambda: criterion(model(x), y), 5)
    twin = copy.deepcopy(model)
    again = made(kind, twin, criterion, sweep="loop")
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    a = train(opt, lambda: criterion(model(x), y), 5)
    b = train(again, lambda: criterion(twin(x), y), 5)
    assert a == b
    assert torch.equal(weights(model), weights(twin))


def test_schedules_and_groups_reach_host_and_feedback():
    model, criterion, x, y = classes()
    opt = OCNOpt(model, criterion, host="rmsprop", momentum=0.5,
                 params=[{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 1e-2}],
                 lr=1.0)  # fmt: skip
    opt.add_param_group({"params": list(model[4].parameters()), "lr": 1e-3})
    assert [group["momentum"] for group in opt.param_groups] == [0.5] * 3
    before = [layer.weight.detach().clone() for layer in model[::2]]
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1.0 if k < 2 else 0.0)
    for _ in range(4):
        train(opt, lambda: criterion(model(x), y), 1)
        schedule.step()
        if schedule.last_epoch == 2:
            middle = weights(model)
    assert torch.equal(middle, weights(model))
    assert [bool(torch.equal(old, layer.weight)) for old, layer in zip(before, model[::2], strict=True)] == [
        True, False, False,
    ]  # fmt: skip


def test_a_large_tikhonov_term_leaves_the_host():
    model, criterion, x, y = classes()
    twin = copy.deepcopy(model)
    opt = OCNOpt(model, criterion, lr=0.5, eps=1e12)
    host = torch.optim.SGD(twin.parameters(), lr=0.5)
    train(opt, lambda: criterion(model(x), y), 3)
    train(host, lambda: criterion(twin(x), y), 3)
    assert_close(weights(model), weights(twin), 1e-9)
    p = model[0].weight
    inner = TorchHost(torch.optim.SGD([p], lr=0.5))
    assert Raised(inner, 3.0).diagonal([p]) == [1 / (1 / 0.5 + 3.0)]
    assert_close(Raised(inner, 3.0).solve([p], [p.detach()])[0], p.detach() / 5)


def test_it_trains_a_convolutional_net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip
    x = torch.randn(24, 1, 8, 8)
    y = (x[:, 0, :, :4].mean((1, 2)) > x[:, 0, :, 4:].mean((1, 2))).long()
    criterion = nn.CrossEntropyLoss()
    opt = OCNOpt(model, criterion, host="rmsprop", lr=1e-2)
    losses = train(opt, lambda: criterion(model(x), y), 100)
    assert losses[-1] < 0.5 * losses[0]
    assert opt.coverage["2.weight"].status == "sampled"


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.kind(h), self.size(h)


@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize("named", [False, True])
def test_several_criteria_are_their_weighted_sum(rank, named):
    """To first order, against the recursion with a block of W for every loss and sample."""
    torch.manual_seed(0)
    x, kind, size = torch.randn(6, 3).double(), torch.randint(3, (6,)), torch.randn(6, 2).double()
    misses = []
    for lr in (1e-2, 1e-3):
        torch.manual_seed(1)
        model = Heads().double()
        entropy, square = nn.CrossEntropyLoss(), nn.MSELoss()
        criteria = {"kind": entropy, "size": square} if named else [entropy, square]
        opt = OCNOpt(model, criteria, lr=lr, rank=rank, sweep="loop", bound=None)
        seen: list[Term] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(opt, "_advance", lambda terms, *rest, seen=seen: seen.extend(terms))
            z = model(x)
            (entropy(z[0], kind) + 0.5 * square(z[1], size)).backward()
            opt.step()
        body, *heads = blocks_of(seen)
        N, Us = 6, [head.rows[t].dense().view(seen[t].r, 6, -1) for t, head in enumerate(heads)]
        first = [body.rows[t].dense().view(seen[t].r, 6, -1) for t in range(2)]
        g = [torch.cat([p.grad.reshape(-1) for p in block.params]) for block in (body, *heads)]
        before = [block.pack([p.detach().clone() for p in block.params]) for block in (body, *heads)]
        W, gamma = [], []
        for U, own in zip(Us, g[1:], strict=True):
            W.append([torch.linalg.inv(torch.eye(len(U)) + N**0.5 * lr * U[:, n] @ U[:, n].T) for n in range(N)])
            gamma.append([W[-1][n] @ U[:, n] @ own * lr for n in range(N)])
        pairs = [(t, n) for t in range(2) for n in range(N)]
        m = -lr * (g[0] - sum(first[t][:, n].T @ gamma[t][n] for t, n in pairs))
        head_values = [list(own) for own in gamma]
        extra = torch.zeros_like(m)
        for t, n in pairs:
            U = first[t][:, n]
            V = torch.linalg.inv(torch.linalg.inv(W[t][n]) + N**0.5 * lr * U @ U.T)
            extra += lr * U.T @ (gamma[t][n] - V @ U @ m)
        moved = -lr * g[0] + extra
        steps = [moved]
        for t, U in enumerate(Us):
            answers = [W[t][n] @ first[t][:, n] @ moved - head_values[t][n] for n in range(N)]
            steps.append(-lr * (g[1 + t] + sum(U[:, n].T @ answers[n] for n in range(N))))
        with torch.no_grad():
            opt._advance(seen, 1.0, True, None)
        found = [block.pack([p.detach() for p in block.params]) for block in (body, *heads)]
        found = torch.cat([new - old for new, old in zip(found, before, strict=True)])
        plain = torch.cat([-lr * own for own in g])
        misses.append(float((found - torch.cat(steps)).norm() / (torch.cat(steps) - plain).norm()))
    assert misses[1] < 0.2 * misses[0] < 0.02, misses


def test_two_uses_of_one_call_are_refused():
    model, criterion, x, y = classes()
    opt = OCNOpt(model, criterion, form="positive")
    before = weights(model)
    z = model(x)
    (criterion(z, y) + criterion(2 * z, y)).backward()
    with pytest.raises(pullback.StepError, match="rest on the same call"):
        opt.step()
    assert torch.equal(before, weights(model))


def test_two_calls_of_the_model_in_one_loss():
    model, criterion, x, y = classes()
    twin = copy.deepcopy(model)
    a, b = (OCNOpt(m, criterion, lr=0.5, rank=None, sweep="loop") for m in (model, twin))
    train(a, lambda: criterion(model(x[:5]), y[:5]) + criterion(model(x[5:]), y[5:]), 1)
    b.zero_grad()
    criterion(twin(x[:5]), y[:5]).backward()
    criterion(twin(x[5:]), y[5:]).backward()
    b.step()
    assert_close(weights(twin), weights(model), 1e-12)


def test_a_retained_graph_may_be_gone_through_twice():
    model, criterion, x, y = classes()
    twin = copy.deepcopy(model)
    a, b = (OCNOpt(m, criterion, lr=0.5, rank=None, sweep="loop") for m in (model, twin))
    loss = criterion(model(x), y)
    loss.backward(retain_graph=True)
    a.zero_grad()
    loss.backward()
    a.step()
    criterion(twin(x), y).backward()
    b.step()
    assert torch.equal(weights(twin), weights(model))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"host": "lbfgs"}, ValueError, "host must be one of sgd, rmsprop, adam"),
        ({"host": 3}, TypeError, "make an optimizer from parameters"),
        ({"host": torch.optim.Adagrad}, TypeError, "curvature of Adagrad is not known"),
        ({"host": lambda p: 3}, TypeError, "host made a int"),
        ({"host": torch.optim.SGD, "lr": 0.1}, ValueError, "lr belong to the optimizer"),
        ({"maximize": True}, ValueError, "A host minimises"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"eps": -1.0}, ValueError, "eps must be finite"),
        ({"form": "negative"}, ValueError, "form must be 'mean', 'positive' or 'clamped'"),
        ({"bound": 0.0}, ValueError, "bound must be positive"),
    ],
)
def test_bad_options(options, error, words):
    model, criterion, _, _ = classes()
    with pytest.raises(error, match=words):
        OCNOpt(model, criterion, **options)


def test_what_it_is_not_made_for():
    model, criterion, _, _ = classes()
    with pytest.raises(TypeError, match="one criterion module, got list"):
        OCNOpt(model, [criterion, nn.MSELoss()], form="positive")
    with pytest.raises(TypeError, match="takes the model"):
        OCNOpt(model.parameters(), criterion)


def test_nothing_is_left_behind():
    model, criterion, x, y = classes()
    opt = OCNOpt(model, criterion)
    train(opt, lambda: criterion(model(x), y), 2)
    opt.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("host", ["sgd", "kronecker"])
def test_a_deep_net_without_signal_is_not_blown_up(host):
    """At torch's initialisation a deep ReLU net is flat, and a few steps later it is not: no weight may jump."""
    torch.manual_seed(0)
    x = torch.randn(128, 10)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    layers = [m for k in range(6) for m in (nn.Linear(10 if k == 0 else 16, 16), nn.ReLU())]
    model, criterion = nn.Sequential(*layers, nn.Linear(16, 4)), nn.CrossEntropyLoss()
    opt = OCNOpt(model, criterion, host=host, lr=3.0 if host == "sgd" else 1.0)
    blocks = [layer for layer in model if isinstance(layer, nn.Linear)]
    losses = []
    for _ in range(60):
        before = [torch.cat([p.detach().flatten() for p in layer.parameters()]) for layer in blocks]
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
        for layer, old in zip(blocks, before, strict=True):
            change = (torch.cat([p.detach().flatten() for p in layer.parameters()]) - old).norm()
            most = Trust().share(7) * float(old.norm().clamp_min((2 * len(layer.bias) / 3) ** 0.5))
            assert float(change) <= most * (1 + 1e-5)
    assert max(losses) < 2 * losses[0]
