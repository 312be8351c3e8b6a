"""The Hessian of any loss against dense autograd, its root, its range, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_metrics import gram
from torch import nn

import pullback
from cases import LOSSES, by_name
from oracle import assert_close, dense, jacobian, loss_hessian
from pullback.metric import LossHessian, Sampled, cell_weights, resolve


class LogCosh(nn.Module):
    """A convex loss that joins the outputs of a sample."""

    def forward(self, z, y):
        return (z - y).cosh().log().sum(1).pow(2).mean()


class Banana(nn.Module):
    """A loss with negative curvature."""

    def forward(self, z, y):
        return ((z[:, 1] - z[:, 0] ** 2) ** 2 + (z[:, 0] - y[:, 0]) ** 2).mean()


class Pairwise(nn.Module):
    """A loss of pairs of samples."""

    def forward(self, z, y):
        return (z[:, None] - z).square().square().mean() + (z - y).square().sum()


def per_sample(z, y):
    return 0.5 * (z - y).square().sum(1).square()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda s: s.name)
@given(n=st.integers(1, 3), d=st.integers(2, 4), extra=st.sampled_from([(), (2,)]), seed=st.integers(0, 99))
def test_root_of_the_hessian_of_every_criterion(loss, n, d, extra, seed):
    torch.manual_seed(seed)
    if extra and "pos_weight" in loss.name:
        extra = ()
    if loss.name.startswith("cross entropy ignore") or "smooth" in loss.name:
        n += 1
    z = 2 * torch.randn(n, d, *extra, dtype=torch.float64)
    if loss.name == "nll":  # has no curvature in log-probabilities
        return
    criterion, y = loss.criterion(d).double(), loss.target(z)
    metric = resolve(criterion, LossHessian())
    weight = cell_weights(criterion, metric, z, y, n) * torch.rand_like(criterion(z, y))
    S = metric.factor(z, weight, n, y)
    H = loss_hessian(criterion, z, y, weight)
    assert_close(gram(S), H) if float(H.abs().max()) else assert_close(gram(S) + 1, H + 1)
    probe = (H @ torch.randn(z.numel(), dtype=z.dtype)).view_as(z)  # in the range
    e0 = metric.coordinates(z, weight, probe, n, y)
    back = torch.einsum("anc,an->nc", S.flatten(2), e0).view_as(z)
    assert_close(back + 1, probe + 1, 1e-8)


def test_rank_is_that_of_the_hessian():
    z, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    metric = resolve(nn.CrossEntropyLoss(), LossHessian())
    S = metric.factor(z, metric.default_weight(z, 4), 4, y)
    assert S.shape == (4, 4, 5)


@pytest.mark.parametrize("samples", [4, 2])
def test_losses_given_as_a_function(samples):
    """Scaled and reduced as stated; positions folded into the batch belong to their samples."""
    z, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    metric = LossHessian(per_sample, scale=3.0)
    S = metric.factor(z, metric.default_weight(z, samples), samples, y)

    class Mean(nn.Module):
        def forward(self, z, y):
            return 3 * per_sample(z, y).sum() / samples

    assert_close(gram(S.reshape(len(S), samples, -1)), loss_hessian(Mean(), z, y))
    many = Sampled(metric, 20_000).factor(z, metric.default_weight(z, samples), samples, y)
    H = loss_hessian(Mean(), z, y)
    assert float((gram(many) - H).abs().max()) < 0.05 * float(H.max())
    assert repr(metric) == "LossHessian(per_sample, scale=3)"


@pytest.mark.parametrize(
    ("criterion", "metric"), [(LogCosh(), LossHessian()), (LogCosh(), LossHessian(LogCosh())),
                              (nn.MSELoss(), LossHessian(lambda z, y: (z - y).square().mean(1)))],
)  # fmt: skip
@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_a_criterion_without_a_metric_of_its_own(criterion, metric, upstream):
    class Part(type(criterion)):
        def forward(self, z, y):
            return upstream * super().forward(z, y)

    model, args, kwargs = by_name["mlp"].build(n=5)
    z = model(*args).detach()
    y = torch.randn_like(z)
    tape = pullback.tape.Tape(model, criterion, metric, "loop")
    (upstream * criterion(model(*args), y)).backward()
    lin = pullback.curvature.Linearisation(tape.terms)
    tape.close()
    J = jacobian(model, args, kwargs).reshape(z.numel(), -1)
    U = dense(model, lin.blocks)
    assert_close(U.T @ U, J.T @ loss_hessian(Part(), z, y) @ J)
    assert_close(U.T @ lin.e0, torch.cat([p.grad.reshape(-1) for p in model.parameters()]), 1e-9)


def test_negative_curvature_is_refused_or_projected():
    z = torch.tensor([[1.0, 3.0], [0.5, -2.0], [0.0, 4.0]], dtype=torch.float64)
    y = torch.zeros_like(z)
    criterion = Banana()
    metric = resolve(criterion, LossHessian())
    weight = metric.default_weight(z, 3)
    with pytest.raises(pullback.MetricError, match=r"negative eigenvalues.*for 2 of 3 samples.*project=True"):
        metric.factor(z, weight, 3, y)
    metric = resolve(criterion, LossHessian(project=True))
    S = metric.factor(z, weight, 3, y)
    H = loss_hessian(criterion, z, y)
    values, vectors = torch.linalg.eigh(H)
    assert_close(gram(S), vectors @ values.clamp_min(0).diag() @ vectors.T)
    assert repr(metric) == "LossHessian(Banana, project=True, clamped=2)"


def test_projected_training_goes_down():
    torch.manual_seed(0)
    model, criterion, x = nn.Linear(3, 2), Banana(), torch.randn(20, 3)
    opt = pullback.GaussNewton(model, criterion, metric=LossHessian(project=True))
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = criterion(model(x), torch.ones(20, 2))
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0]


def test_numbers_that_are_not_finite_reach_the_step():
    model, criterion = nn.Linear(3, 2), LogCosh()
    opt = pullback.GaussNewton(model, criterion, metric=LossHessian())
    criterion(model(torch.full((4, 3), torch.nan)), torch.zeros(4, 2)).backward()
    with pytest.raises(pullback.StepError, match="The loss is nan"):
        opt.step()


def test_losses_without_curvature_keep_one_column():
    metric = LossHessian(lambda z, y: (z * y).sum(1))
    z = torch.randn(3, 2)
    S = metric.factor(z, metric.default_weight(z, 3), 3, z)
    assert S.shape == (1, 3, 2)
    assert not S.any()
    assert not metric.coordinates(z, metric.default_weight(z, 3), z, 3, z).any()


@pytest.mark.parametrize(
    ("run", "error", "words"),
    [
        (lambda z: resolve(Pairwise(), LossHessian()).factor(z, torch.ones(()), 3, z), None, "depends on the pred"),
        (lambda z: LossHessian().factor(z, torch.ones(()), 3, z), None, "needs a loss"),
        (lambda z: LossHessian(per_sample).factor(z, torch.ones(()), 3), None, "needs the target"),
        (lambda z: LossHessian(F.mse_loss).factor(z, torch.ones(()), 3, z), None, "one number per sample"),
        (lambda z: LossHessian(per_sample).factor(z, torch.ones(3, 2), 3, z), None, "one weight each"),
        (lambda z: resolve(None, LossHessian(per_sample)), None, "only a criterion module is seen with"),
        (lambda z: LossHessian(3), TypeError, "loss function or criterion"),
    ],
)
def test_refusals(run, error, words):
    with pytest.raises(error or pullback.MetricError, match=words):
        run(torch.randn(3, 2))
