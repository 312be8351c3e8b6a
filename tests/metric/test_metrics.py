"""Output metrics against the loss's own Hessian, and sketches against what they sketch (oracle 6)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pullback
from cases import LOSSES
from oracle import assert_close, loss_hessian
from pullback.metric import Bernoulli, Categorical, Custom, Gaussian, Sampled, cell_weights, resolve


def gram(S: torch.Tensor) -> torch.Tensor:
    """Sum over columns and samples of s s^T, (numel, numel): rows of one sample never mix with another's."""
    r, N = S.shape[:2]
    rows = torch.zeros(r, N, *S.shape[1:], dtype=S.dtype)
    for n in range(N):
        rows[:, n, n] = S[:, n]
    flat = rows.reshape(r * N, -1)
    return flat.T @ flat


@pytest.mark.parametrize("loss", LOSSES, ids=lambda s: s.name)
@given(n=st.integers(1, 4), d=st.integers(2, 5), extra=st.sampled_from([(), (2,), (2, 1)]), seed=st.integers(0, 99))
def test_factor_is_a_root_of_the_hessian(loss, n, d, extra, seed):
    torch.manual_seed(seed)
    if extra and "pos_weight" in loss.name:
        extra = ()
    if loss.name.startswith("cross entropy ignore") or "smooth" in loss.name:
        n += 1  # the first row is ignored; an empty loss is another test
    z = loss.head(2 * torch.randn(n, d, *extra, dtype=torch.float64))
    criterion, y = loss.criterion(d).double(), loss.target(z)
    metric = resolve(criterion, None)
    weight = cell_weights(criterion, metric, z, y, n)
    S = metric.factor(z, weight, n, y)
    H = loss_hessian(criterion, z, y)
    if loss.name == "nll":  # linear in the log-probabilities: their curvature is in log_softmax
        raw = z.clone()
        H = loss_hessian(nn.CrossEntropyLoss(weight=criterion.weight), raw, y)
    assert_close(gram(S), H, 1e-10)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda s: s.name)
def test_coordinates_give_back_the_costate(loss):
    z = (2 * torch.randn(5, 4, dtype=torch.float64)).requires_grad_()
    head = loss.head(z)
    criterion, y = loss.criterion(4).double(), loss.target(head.detach())
    value = criterion(head, y).sum()
    (costate,) = torch.autograd.grad(value, head, retain_graph=True)
    metric = resolve(criterion, None)
    weight = cell_weights(criterion, metric, head.detach(), y, 5)
    S = metric.factor(head.detach(), weight, 5, y)
    e0 = metric.coordinates(head.detach(), weight, costate, 5, y)
    back = torch.einsum("anc,an->nc", S, e0)
    costate = costate * ((head - y).abs() < loss.inside if loss.inside < float("inf") else 1)
    if loss.name == "nll":  # the part along the constants falls away in log_softmax
        (back,) = torch.autograd.grad(head, z, back, retain_graph=True)
        (costate,) = torch.autograd.grad(value, z)
    assert_close(back, costate)


def test_categorical_has_one_column_less_than_classes():
    assert Categorical().factor(torch.randn(3, 7), torch.ones(3), 3).shape == (6, 3, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confidently_wrong_sample_does_not_swamp_the_residual(dtype):
    z = torch.tensor([[0.0, 200.0], [0.3, 0.1]], dtype=dtype)
    y = torch.tensor([0, 0])
    costate = (torch.softmax(z, 1) - nn.functional.one_hot(y, 2)).to(dtype)
    e0 = Categorical().coordinates(z, torch.ones(2, dtype=dtype), costate, 2)
    assert torch.isfinite(e0).all()
    assert float(e0.abs().max()) < torch.finfo(dtype).eps ** -0.5


@pytest.mark.parametrize(
    "inner", [Gaussian(), Categorical(), Bernoulli(), Custom(lambda z: torch.eye(3).expand(6, 3, 3))]
)
def test_sampled_is_unbiased_and_improves_as_one_over_root_m(inner):
    torch.manual_seed(1)
    z = torch.randn(6, 3, dtype=torch.float64)
    weight = torch.rand(inner.cells(z), dtype=torch.float64)
    true = gram(inner.factor(z, weight, 6))

    def error(m: int) -> float:
        misses = [
            float((gram(Sampled(inner, m, seed=k).factor(z, weight, 6)) - true).square().sum()) for k in range(30)
        ]
        return (sum(misses) / len(misses)) ** 0.5

    errors = [error(m) for m in (4, 64)]
    slope = torch.tensor(errors[0] / errors[1]).log2() / 4
    assert abs(float(slope) - 0.5) < 0.12
    many = gram(Sampled(inner, 20_000, seed=5).factor(z, weight, 6))
    assert float((many - true).abs().max()) < 0.05 * float(true.abs().max())


def test_sampled_leaves_the_global_stream_alone_and_resumes():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    metric, z, w = Sampled(Categorical(), 2), torch.randn(4, 3, generator=torch.Generator()), torch.ones(4)
    metric.factor(z, w, 4)
    state = metric.state()
    expected = metric.factor(z, w, 4)
    assert torch.equal(before, torch.get_rng_state())
    other = Sampled(Categorical(), 2, seed=9)
    other.load_state(state)
    assert torch.equal(other.factor(z, w, 4), expected)


class Unknown(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return super().forward(input, target) ** 2


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: resolve(nn.L1Loss(), None), pullback.MetricError, "No metric is known for L1Loss"),
        (lambda: resolve(nn.BCELoss(), None), pullback.MetricError, "BCEWithLogitsLoss on the logits"),
        (lambda: resolve(Unknown(), None), pullback.MetricError, "No metric is known for Unknown"),
        (lambda: resolve(None, None), pullback.MetricError, "must be stated"),
        (lambda: resolve(None, Sampled(m=2)), pullback.MetricError, "must be stated"),
        (lambda: resolve(nn.functional.mse_loss, None), TypeError, "mse_loss; for a functional loss"),
        (lambda: resolve(nn.MSELoss(), "gaussian"), TypeError, "metric must be a pullback metric"),
        (lambda: Gaussian(scale=-1.0), pullback.MetricError, "scale must be positive"),
        (lambda: Gaussian(reduction="avg"), pullback.MetricError, "'mean' or 'sum'"),
        (lambda: Sampled(m=0), pullback.MetricError, "m >= 1"),
        (lambda: Sampled(Sampled(m=1), 2), pullback.MetricError, "sketches twice"),
        (lambda: Sampled(m=2).inner, pullback.MetricError, "no metric to sketch"),
    ],
)
def test_refusals_say_what_and_the_remedy(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("criterion", "z", "y", "words"),
    [
        (nn.MSELoss(), torch.randn(3), torch.randn(3, 1), r"predictions \(3,\) and targets \(3, 1\)"),
        (nn.CrossEntropyLoss(), torch.randn(3, 4), torch.randint(0, 4, (3, 1)), r"class targets \(N, ...\)"),
        (nn.CrossEntropyLoss(), torch.randn(4), torch.tensor(1), r"\(N, C, ...\)"),
        (nn.NLLLoss(), torch.randn(3, 4), torch.zeros(3, dtype=torch.long), "log_softmax"),
    ],
)
def test_predictions_and_targets_must_fit(criterion, z, y, words):
    with pytest.raises(pullback.MetricError, match=words):
        cell_weights(criterion, resolve(criterion, None), z, y, len(z))


def test_custom_metric_is_checked():
    z, w = torch.randn(3, 2), torch.ones(3)
    with pytest.raises(pullback.MetricError, match=r"must return shape \(N, d, r\) = \(3, 2, r\), got \(3, 2\)"):
        Custom(lambda z: z).factor(z, w, 3)
    with pytest.raises(pullback.MetricError, match="do not flatten positions"):
        Custom(lambda z: z[:, :, None]).factor(z, w, 1)
    skew = torch.rand(3, 2)
    with pytest.raises(pullback.MetricError, match="weighs outputs differently"):
        Custom(lambda z: z[:, :, None]).factor(z, skew, 3)
