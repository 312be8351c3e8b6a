"""Oracle 2: steps are the dense steps; gain 1 on a quadratic; bad steps undone bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pullback
from cases import CASES, by_name
from closed import CLOSED
from oracle import assert_close, dense, jacobian, linearise
from pullback import Damping

FIXED = {"control": "fixed", "initial": 0.3}


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def one_step(Opt, case, criterion, target, **options):
    model, args, kwargs = case.build()
    before = weights(model)
    opt = Opt(model, criterion, **options)
    opt.zero_grad()
    z = model(*args, **kwargs)
    criterion(z, target(z.detach())).backward()
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    opt.step()
    return opt, model, args, kwargs, g, weights(model) - before


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("partition", ["layerwise", "global"])
@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_step_is_the_dense_step(case, partition, loss):
    criterion = nn.MSELoss() if loss == "mse" else nn.CrossEntropyLoss()
    target = torch.sin if loss == "mse" else (lambda z: z.argmin(1))
    options = {"partition": partition, "damping": Damping(**FIXED)}
    opt, model, args, kwargs, g, moved = one_step(pullback.LayerwiseMetric, case, criterion, target, **options)
    twin, _, _ = case.build()
    lin = linearise(twin, criterion, [(args, kwargs, target)])
    U, mu, n = dense(twin, lin.blocks), opt.last.mu, g.shape[0]
    H = U.T @ U
    mask = torch.ones(n, n, dtype=torch.bool)
    if partition == "layerwise":
        own, start = torch.full((n,), -1), 0
        names = [name for name, _ in model.named_parameters()]
        for k, (_, p) in enumerate(model.named_parameters()):
            owner = next(j for j, b in enumerate(opt._treated) if any(p is q for q in b.params))
            own[start : start + p.numel()] = owner
            start += p.numel()
            assert names[k]
        mask = own[:, None] == own[None]
    d = -torch.linalg.solve(H * mask + mu * torch.eye(n, dtype=H.dtype), g)
    alpha = -(g @ d) / (d @ H @ d + mu * d @ d)
    assert opt.last.scale == pytest.approx(float(alpha) if len(opt.last.spaces) > 1 else 1.0, rel=1e-8)
    assert_close(moved, alpha * d, 1e-8)


@pytest.mark.parametrize("Opt", [pullback.LayerwiseMetric, pullback.GaussNewton, *CLOSED.values()])
@pytest.mark.parametrize("scale", ["MSELoss", "CustomGaussian"])
@given(initial=st.floats(1e-4, 1e4), n=st.integers(2, 9), seed=st.integers(0, 20))
def test_gain_is_one_on_a_quadratic_for_every_mu(Opt, scale, initial, n, seed):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(n, 3, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)
    criterion = nn.MSELoss()
    metric = None if scale == "MSELoss" else pullback.Custom(lambda z: torch.eye(2).expand(len(z), 2, 2))
    opt = Opt(model, criterion, metric=metric, damping=Damping(initial=initial))
    criterion(model(x), y).backward()
    opt.step()
    assert opt.last.gain == pytest.approx(1.0, abs=1e-7)


def test_clipped_gradient_takes_the_short_form_of_the_clipped_step():
    case = by_name["mlp"]
    model, args, _ = case.build()
    y = torch.randn(4, 2, dtype=torch.float64)
    opt = pullback.GaussNewton(model, nn.MSELoss(), damping=Damping(**FIXED))
    before = weights(model)
    opt.criterion(model(*args), y).backward()
    whole = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    nn.utils.clip_grad_norm_(model.parameters(), 0.1 * whole.norm().item())
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    J = jacobian(model, args, {}).reshape(8, -1)
    opt.step()
    H = J.T @ J * (2 / 8)
    expected = -torch.linalg.solve(H + opt.last.mu * torch.eye(len(g), dtype=g.dtype), g)
    assert_close(weights(model) - before, expected, 1e-9)


def test_a_penalty_in_the_loss_takes_the_general_form():
    model, args, _ = by_name["mlp"].build()
    y = torch.randn(4, 2, dtype=torch.float64)
    criterion = nn.MSELoss()
    opt = pullback.GaussNewton(model, criterion, damping=Damping(**FIXED))
    before = weights(model)
    loss = criterion(model(*args), y) + 0.1 * sum(p.square().sum() for p in model.parameters())
    loss.backward()
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    J = jacobian(model, args, {}).reshape(8, -1)
    opt.step()
    H = J.T @ J * (2 / 8)
    expected = -torch.linalg.solve(H + opt.last.mu * torch.eye(len(g), dtype=g.dtype), g)
    assert_close(weights(model) - before, expected, 1e-9)


def test_learning_rate_scales_the_step_also_per_group():
    moves = {}
    for lr in (1.0, 0.5):
        *_, moves[lr] = one_step(
            pullback.LayerwiseMetric, by_name["mlp"], nn.MSELoss(), torch.sin, lr=lr, damping=Damping(**FIXED)
        )
    assert_close(moves[0.5], 0.5 * moves[1.0], 1e-12)
    model, args, _ = by_name["mlp"].build()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 1.0}]
    opt = pullback.LayerwiseMetric(model, nn.MSELoss(), params=groups)
    before = [p.detach().clone() for p in model.parameters()]
    opt.criterion(model(*args), torch.zeros(4, 2, dtype=torch.float64)).backward()
    opt.step()
    after = list(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True))
    assert not torch.equal(before[2], after[2])


class Cliff(nn.Module):
    """A model on which every step fails: its output jumps as soon as the weights differ from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1)
        self.start = self.inner.weight.detach().clone()

    def forward(self, x):
        z = self.inner(x)  # feedback moves it on entry
        return z + (0.0 if torch.equal(self.inner.weight.detach(), self.start) else self.far)


@pytest.mark.parametrize("far", [1e3, float("inf"), float("nan")])
@pytest.mark.parametrize("Opt", [pullback.LayerwiseMetric, pullback.GaussNewton, *CLOSED.values()])
def test_bad_steps_are_undone_bit_for_bit(far, Opt):
    model = Cliff()
    model.far = far
    opt = Opt(model, nn.MSELoss(), damping=Damping(trials=3))
    before = [p.detach().clone() for p in model.parameters()]
    opt.criterion(model(torch.randn(5, 3)), torch.randn(5, 1)).backward()
    opt.step()
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
    assert not opt.last.accepted
    assert opt.last.trials == 3


@pytest.mark.parametrize("Opt", [pullback.GaussNewton, *CLOSED.values()])
def test_an_exception_in_the_trial_leaves_weights_as_they_were(Opt):
    class Fails(Cliff):
        def forward(self, x):
            z = self.inner(x)
            if not torch.equal(self.inner.weight.detach(), self.start):
                raise KeyError("sensor lost")
            return z

    model = Fails()
    opt = Opt(model, nn.MSELoss())
    before = [p.detach().clone() for p in model.parameters()]
    opt.criterion(model(torch.randn(5, 3)), torch.randn(5, 1)).backward()
    with pytest.raises(KeyError):
        opt.step()
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("Opt", [pullback.GaussNewton, *CLOSED.values()])
def test_float32_escalates_when_the_damping_is_small(Opt):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    criterion = nn.MSELoss()
    opt = Opt(model, criterion)
    x = torch.randn(40, 3)
    y = torch.tanh(x[:, :1])
    for _ in range(60):
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
    assert loss.item() < 1e-9
    assert torch.isfinite(weights(model)).all()


def test_gauss_newton_reaches_machine_precision():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    x = torch.randn(30, 3, dtype=torch.float64)
    y = torch.randn(30, 1, dtype=torch.float64)
    criterion = nn.MSELoss()
    opt = pullback.GaussNewton(model, criterion)
    for _ in range(200):
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
    assert loss.item() < 1e-25
    assert opt.last.accepted
