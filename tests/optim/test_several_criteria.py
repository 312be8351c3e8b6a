"""Several heads: a criterion and a metric each, dense twin of the sum, resume of every sketch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback
from oracle import assert_close, jacobian, loss_hessian
from pullback import Damping, Sampled


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return {"kind": self.kind(h), "size": self.size(h)}


def problem():
    torch.manual_seed(0)
    model = TwoHeads().double()
    x = torch.randn(6, 3, dtype=torch.float64)
    return model, x, torch.randint(0, 4, (6,)), torch.randn(6, 2, dtype=torch.float64)


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("form", [list, dict])
def test_step_is_the_dense_step_of_the_sum(form):
    model, x, kind, size = problem()
    entropy, square = nn.CrossEntropyLoss(), nn.MSELoss()
    criteria = [entropy, square] if form is list else {"kind": entropy, "size": square}
    opt = pullback.GaussNewton(model, criteria, damping=Damping(control="fixed", initial=0.3))
    before = weights(model)
    out = model(x)
    (entropy(out["kind"], kind) + 0.5 * square(out["size"], size)).backward()
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    H = torch.zeros(len(g), len(g), dtype=g.dtype)
    for name, criterion, y, share in (("kind", entropy, kind, 1.0), ("size", square, size, 0.5)):
        opt._tape.recorder.enabled = False
        J = jacobian(model, (x,), {}, lambda out, name=name: out[name])
        curvature = loss_hessian(criterion, out[name].detach(), y)
        opt._tape.recorder.enabled = True
        J = J.reshape(-1, len(g))
        H += share * J.T @ curvature @ J
    opt.step()
    d = -torch.linalg.solve(H + opt.last.mu * torch.eye(len(g), dtype=g.dtype), g)
    assert_close(weights(model) - before, d, 1e-9)
    assert str(opt.metric) == "Categorical() + Gaussian()"


def test_heads_train_with_trial_losses_and_resume_their_sketches():
    def make():
        model, x, kind, size = problem()
        criteria = {"kind": nn.CrossEntropyLoss(), "size": nn.MSELoss()}
        metrics = {"kind": Sampled(m=1), "size": Sampled(m=2, seed=3)}
        return model, criteria, pullback.LayerwiseMetric(model, criteria, metric=metrics, sweep="loop"), x, kind, size

    def step(model, criteria, opt, x, kind, size):
        opt.zero_grad()
        out = model(x)
        loss = criteria["kind"](out["kind"], kind) + criteria["size"](out["size"], size)
        loss.backward()
        opt.step()
        return loss.item()

    first = make()
    losses = [step(*first) for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]
    assert first[2].last.actual is not None
    second = make()
    second[0].load_state_dict(first[0].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    assert step(*first) == step(*second)
    assert torch.equal(weights(first[0]), weights(second[0]))


def test_a_head_without_its_criterion_is_refused():
    model, _, _, _ = problem()
    criterion = nn.MSELoss()
    with pytest.raises(pullback.MetricError, match="given twice"):
        pullback.GaussNewton(model, [criterion, criterion])
    with pytest.raises((TypeError, pullback.MetricError)):
        pullback.GaussNewton(model, [nn.MSELoss(), nn.CrossEntropyLoss()], metric=[pullback.Gaussian()])
