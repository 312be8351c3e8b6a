"""Rates and factors of a certificate beside dense Hessians, dense metrics and dense Jacobians of the step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from certification.conftest import Make
from pullback.certification import rates
from pullback.certification.rates import PulledRates, ends_at
from pullback.certification.settings import parse_spec_of
from pullback.certification.subject import make_subject
from pullback.certification.training import Place
from pullback.stability import Descent

f64 = torch.float64


def hessian(subject: object, theta: Tensor) -> Tensor:
    objective, data = subject.objective, subject.data  # type: ignore[attr-defined]
    rows = []
    for k in range(objective.size):
        e = torch.zeros(objective.size, dtype=f64)
        e[k] = 1e-5
        rows.append((objective.gradient(theta + e, data) - objective.gradient(theta - e, data)) / 2e-5)
    return torch.stack(rows)


@pytest.mark.parametrize("dense", [True, False])
def test_both_ends_and_the_factor_of_a_step(line: Make, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        monkeypatch.setattr(rates, "DENSE", 0)
    subject = make_subject(line(), 0, 0.05)
    values = torch.linalg.eigvalsh(hessian(subject, subject.start))
    end = ends_at(subject.objective, Place(0, subject.start, subject.data, None), subject.data, 0)
    near = 1e-7 if dense else 1e-3
    assert end.rate.value == pytest.approx(float(values[0]), abs=near)
    assert end.largest == pytest.approx(float(values[-1]), abs=near)
    assert end.rate.proved is dense
    assert end.rate.lower - 1e-7 <= float(values[0]) <= end.rate.upper + 1e-7

    learner = Descent(subject.objective, steps=1, h=0.4)
    eye = torch.eye(subject.objective.size, dtype=f64) * 1e-5
    step = [learner.step(subject.start + e, subject.data) - learner.step(subject.start - e, subject.data) for e in eye]
    norm = float(torch.linalg.matrix_norm(torch.stack(step) / 2e-5, 2))
    found = end.factor(0.4)
    assert found is not None
    assert found[0] == pytest.approx(norm, abs=near)
    assert found[1] >= norm - 1e-7


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("partition", ["layerwise", "global"])
def test_rates_in_a_pulled_back_metric(
    line: Make, dense: bool, partition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not dense:
        monkeypatch.setattr(rates, "DENSE", 0)
    subject = make_subject(line(), 0, 0.0)
    objective, mu = subject.objective, 0.3
    batch = (subject.data[0][:9], subject.data[1][:9])
    # MSE has the metric 2 / n of its outputs; layerwise keeps the diagonal blocks.
    z = objective.moved(subject.start)(batch[0])
    J = torch.stack(
        [
            torch.cat(
                [g.reshape(-1) for g in torch.autograd.grad(one, list(objective.model.parameters()), retain_graph=True)]
            )
            for one in z[:, 0]
        ]
    )
    G = 2 / 9 * J.T @ J
    if partition == "layerwise":
        kept = torch.zeros_like(G)
        for where in objective.modules.values():
            kept[where[:, None], where] = G[where[:, None], where]
        G = kept
    M = mu * torch.eye(objective.size, dtype=f64) + G
    L = torch.linalg.cholesky(M)
    half = torch.linalg.solve_triangular(L, hessian(subject, subject.start), upper=False)
    values = torch.linalg.eigvalsh(torch.linalg.solve_triangular(L, half.T, upper=False))
    end = PulledRates(objective, subject.data, partition, 0).at(Place(0, subject.start, batch, mu))
    assert end.rate.value == pytest.approx(float(values[0]), abs=1e-6 if dense else 1e-3)
    assert end.rate.upper >= float(values[0]) - 1e-6
    assert (end.largest is not None) is dense
    assert end.rate.proved is dense


def test_descent_is_read_with_its_options() -> None:
    spec = parse_spec_of("descent:lr=0.1,decay=0,steps=7")
    assert (spec.label, spec.steps) == ("descent:lr=0.1,decay=0", 7)  # type: ignore[union-attr]
    assert parse_spec_of("descent", 9).steps == 9  # type: ignore[union-attr]
