"""Several criteria, one per head: terms with metrics of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback
from oracle import assert_close, dense, jacobian, loss_hessian
from pullback.curvature import Linearisation
from pullback.metric import Bernoulli, Gaussian, Heads, LossHessian, Sampled, resolve_all
from pullback.tape import Tape, replay


class TwoHeads(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.kind = nn.Linear(5, 4)
        self.size = nn.Linear(5, 2)
        self.form = form

    def forward(self, x):
        h = self.body(x)
        kind, size = self.kind(h), self.size(h)
        return {"dict": {"kind": kind, "size": size}, "tuple": (kind, size)}[self.form]


@pytest.mark.parametrize("form", ["dict", "tuple"])
@pytest.mark.parametrize("container", ["own", "module", "model"])
def test_every_head_has_its_metric(form, container):
    torch.manual_seed(0)
    model = TwoHeads(form).double()
    ce, mse = nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")
    keys = ("kind", "size") if form == "dict" else (0, 1)
    P = torch.tensor([1.0, 3.0], dtype=torch.float64)
    criteria, metrics = ({"kind": ce, "size": mse}, {"size": Gaussian(P), "kind": None})
    if form == "tuple":
        criteria, metrics = [ce, mse], (None, Gaussian(P))
    if container == "module":
        criteria = nn.ModuleDict(criteria) if form == "dict" else nn.ModuleList(criteria)
    x, y, t = torch.randn(6, 3).double(), torch.randint(0, 4, (6,)), torch.randn(6, 2).double()
    tape = Tape(model, criteria, metrics, "loop")
    out = model(x)
    loss = ce(out[keys[0]], y) + 0.1 * mse(out[keys[1]], t)
    loss.backward()
    assert {type(term.use.criterion) for term in tape.terms} == {nn.CrossEntropyLoss, nn.MSELoss}
    lin = Linearisation(tape.terms)
    U = dense(model, lin.blocks)
    expected = 0
    for key, criterion, target, part, scale in ((keys[0], ce, y, 1.0, 1), (keys[1], mse, t, 0.1, P.repeat(6))):
        z = out[key].detach()
        J = jacobian(model, (x,), {}, lambda o, key=key: o[key]).reshape(z.numel(), -1)
        expected = expected + part * J.T @ (loss_hessian(criterion, z, target) * scale) @ J
    assert_close(U.T @ U, expected)
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert_close(U.T @ lin.e0, g)
    assert_close(replay(model, tape.terms), loss.detach())
    assert isinstance(tape.metric, Heads)
    assert tape.metric.exact
    assert repr(tape.metric) == "Categorical() + Gaussian(precision of shape (2,))"
    tape.close()
    assert not ce._forward_hooks
    assert not mse._forward_pre_hooks


def test_one_head_may_be_a_sketch():
    model = TwoHeads("tuple")
    ce, bce = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()
    tape = Tape(model, [ce, bce], [Sampled(m=2), None], "loop")
    kind, size = model(torch.randn(5, 3))
    (ce(kind, torch.randint(0, 4, (5,))) + bce(size, torch.rand(5, 2))).backward()
    assert sorted((term.exact, term.r) for term in tape.terms) == [(False, 2), (True, 2)]
    assert not tape.metric.exact


def test_one_criterion_stays_as_it_was():
    criterion = nn.BCEWithLogitsLoss()
    ((found, metric),) = resolve_all(criterion, None)
    assert found is criterion
    assert isinstance(metric, Bernoulli)
    tape = Tape(nn.Linear(2, 1), criterion)
    assert isinstance(tape.metric, Bernoulli)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: resolve_all([]), pullback.MetricError, "No criterion was given"),
        (lambda: resolve_all([nn.MSELoss()] * 2), pullback.MetricError, "given twice"),
        (lambda: resolve_all([nn.MSELoss(), None]), TypeError, "Criterion 1 is None"),
        (lambda: resolve_all([nn.MSELoss(), "mse"]), TypeError, "must be an nn.Module"),
        (lambda: resolve_all("mse"), TypeError, "must be an nn.Module"),
        (lambda: resolve_all([nn.MSELoss()], Gaussian()), TypeError, "as many metrics in the same form"),
        (lambda: resolve_all([nn.MSELoss()], [None, None]), TypeError, "do not match criteria"),
        (lambda: resolve_all({"a": nn.MSELoss()}, {"b": None}), TypeError, r"\['b'\] do not match criteria \['a'\]"),
        (lambda: resolve_all([nn.L1Loss()], [None]), pullback.MetricError, "No metric is known for L1Loss"),
        (lambda: resolve_all([None], [LossHessian()]), TypeError, "must all be modules"),
    ],
)
def test_refusals(make, error, words):
    with pytest.raises(error, match=words):
        make()
