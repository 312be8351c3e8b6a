"""Constants, packed objectives and rows beside loops over samples and dense Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pullback
from oracle import assert_close, jacobian
from pullback.stability import (
    FixedMetric,
    Objective,
    StabilityError,
    data_share,
    gradient_bound,
    measure,
    output_lipschitz,
)
from pullback.stability.objective import check_data
from pullback.stability.rows import PulledRows

f64 = torch.float64


def small(criterion: nn.Module | None = None) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x = torch.randn(7, 3, dtype=f64)
    if criterion is None:
        return model, nn.CrossEntropyLoss(), (x, torch.randint(4, (7,)))
    return model, criterion, (x, torch.randn(7, 4, dtype=f64))


@pytest.mark.parametrize("criterion", [None, nn.MSELoss()])
def test_the_packed_objective_beside_backward(criterion: nn.Module | None) -> None:
    model, criterion, (x, y) = small(criterion)
    objective = Objective(model, criterion, decay=0.3)
    theta = objective.get()
    loss = criterion(model(x), y) + 0.15 * sum(p.square().sum() for p in model.parameters())
    loss.backward()
    assert objective.loss(theta, (x, y)) == pytest.approx(loss.item(), rel=1e-14)
    assert_close(objective.gradient(theta, (x, y)), objective.pack_gradient())
    rows = []
    for k in range(7):
        model.zero_grad()
        criterion(model(x[k : k + 1]), y[k : k + 1]).backward()
        rows.append(objective.pack_gradient())
    assert_close(objective.gradients(theta, (x, y)), torch.stack(rows))
    assert_close(objective.gradient_norms(theta, (x, y)), torch.stack(rows).norm(dim=1))
    assert_close(torch.stack(rows).mean(0) + 0.3 * theta, objective.gradient(theta, (x, y)))
    assert float(objective.losses(theta, (x, y)).mean()) == pytest.approx(criterion(model(x), y).item())
    assert gradient_bound(objective, [theta, 2 * theta], (x, y)) >= float(torch.stack(rows).norm(dim=1).max())
    assert torch.equal(torch.cat([*objective.modules.values()]), torch.arange(objective.size))
    objective.put(2 * theta)
    assert torch.equal(objective.get(), 2 * theta)


def test_no_optimizer_sees_the_objective() -> None:
    """Hooks of a tape on the model stay silent, and those of others stay."""
    model, criterion, (x, y) = small()
    model[0].register_forward_hook(lambda module, args, out: 2 * out)
    opt = pullback.LayerwiseMetric(model, criterion)
    objective = Objective(model, criterion)
    criterion(model(x), y).backward()
    before = len(opt._tape.terms)
    assert objective.loss(objective.get(), (x, y)) == pytest.approx(criterion(model(x), y).item())
    objective.gradient(objective.get(), (x, y))
    PulledRows(objective).at(objective.get(), (x, y))
    assert len(opt._tape.terms) == before == 1
    opt.step()


def test_lipschitz_and_share_beside_dense_jacobians() -> None:
    model, criterion, (x, y) = small()
    objective = Objective(model, criterion)
    theta = objective.get()
    D = jacobian(model, (x,), {})  # (7, 4, K)
    expected = max(float(torch.linalg.matrix_norm(D[k], 2)) for k in range(7))
    assert output_lipschitz(objective, theta, x, chunk=3) == pytest.approx(expected, rel=1e-12)
    p = torch.softmax(model(x).detach(), 1)
    shares = []
    for k in range(7):
        fisher = torch.diag(p[k]) - torch.outer(p[k], p[k])
        for where in objective.modules.values():
            M = D[k][:, where].T @ fisher @ D[k][:, where]
            shares.append(float(torch.linalg.eigvalsh(M)[-1]))
    assert data_share(objective, theta, (x, y)) == pytest.approx(max(shares), rel=1e-10)
    own = measure(objective, [theta], (x, y), rate=0.5, source="given", mu=0.1)
    assert pytest.approx(max(shares), rel=1e-10) == own.B2
    blocks = [
        sum(D[k][:, w].T @ (torch.diag(p[k]) - torch.outer(p[k], p[k])) @ D[k][:, w] for k in range(7)) / 7
        for w in objective.modules.values()
    ]
    largest = max(float(torch.linalg.eigvalsh(M)[-1]) for M in blocks)
    assert own.xi == pytest.approx(0.1 / (0.1 + largest), rel=1e-10)
    derived, stated = own.bounds(time=2.0)
    assert derived.constants["B2"] == own.B2
    assert not stated.derived
    fixed = measure(objective, [theta], (x, y), rate=0.5, source="given", metric=FixedMetric(2.0))
    assert (fixed.mu, fixed.xi, fixed.B2) == (2.0, 1.0, None)
    assert fixed.to_dict()["places"] == 1


def test_rows_leave_the_model_alone() -> None:
    model, criterion, (x, y) = small()
    criterion(model(x), y).backward()
    before, grads = [p.clone() for p in model.parameters()], [p.grad.clone() for p in model.parameters()]
    objective = Objective(model, criterion)
    PulledRows(objective).at(objective.get() + 1, (x, y))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))


def test_what_is_refused() -> None:
    model, criterion, (x, y) = small()
    with pytest.raises(StabilityError, match="reduction='sum'"):
        Objective(model, nn.MSELoss(reduction="sum"))
    with pytest.raises(StabilityError, match="decay is -1"):
        Objective(model, criterion, decay=-1.0)
    with pytest.raises(StabilityError, match="nothing to train"):
        Objective(nn.Tanh(), criterion)
    mixing = Objective(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double(), criterion)
    with pytest.raises(StabilityError, match="'1' is BatchNorm"):
        mixing.gradient_norms(mixing.get(), (x, y))
    with pytest.raises(StabilityError, match="mixes samples"):
        mixing.losses(mixing.get(), (x, y))
    objective = Objective(model, criterion)
    with pytest.raises(StabilityError, match="shape"):
        objective.unpack(torch.zeros(3))
    with pytest.raises(StabilityError, match="call backward"):
        objective.pack_gradient()
    with pytest.raises(StabilityError, match="n = 1"):
        measure(objective, [objective.get()], (x[:1], y[:1]), rate=1.0, source="given")
    with pytest.raises(StabilityError, match="inputs hold numbers"):
        check_data((x / 0, y))
    with pytest.raises(StabilityError, match="7 inputs and 3 targets"):
        check_data((x, y[:3]))
    with pytest.raises(StabilityError, match="gradient is not finite"):
        objective.gradient(objective.get() * float("nan"), (x, y))
    with pytest.raises(StabilityError, match="eigenvalue is -1"):
        measure(objective, [objective.get()], (x, y), rate=1.0, source="given", mu=-1.0)
    with pytest.raises(ValueError, match="not both"):
        measure(objective, [objective.get()], (x, y), rate=1.0, source="", mu=1.0, metric=FixedMetric())
