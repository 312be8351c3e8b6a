"""What users expect of a torch.optim.Optimizer: resume, schedulers, accumulation, fresh batches."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import pullback
from closed import CLOSED

OPTS = {"layerwise": pullback.LayerwiseMetric, "global": pullback.GaussNewton, **CLOSED}


def make(Opt=pullback.LayerwiseMetric, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    criterion = nn.CrossEntropyLoss()
    return model, criterion, Opt(model, criterion, sweep="loop", **options)


def batches(count, n=16):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, n, 3, generator=g)
    return [(b, (b[:, 0] > 0).long() + (b[:, 1] > 0.5).long()) for b in x]


def train(model, criterion, opt, data):
    losses = []
    for x, y in data:
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("Opt", OPTS)
@pytest.mark.parametrize("metric", [None, "sampled"])
@pytest.mark.parametrize("fresh", [True, False])
def test_resume_is_bit_exact(Opt, metric, fresh):
    Opt = OPTS[Opt]
    options = {"metric": pullback.Sampled(m=2)} if metric else {}
    data = batches(12) if fresh else batches(1) * 12
    model, criterion, opt = make(Opt, **options)
    train(model, criterion, opt, data[:6])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    expected = train(model, criterion, opt, data[6:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, criterion, opt = make(Opt, **({"metric": pullback.Sampled(m=2)} if metric else {}))
    again.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    assert train(again, criterion, opt, data[6:]) == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("Opt", OPTS)
def test_it_is_a_torch_optimizer_with_schedulers(Opt):
    model, criterion, opt = make(OPTS[Opt])
    assert isinstance(opt, torch.optim.Optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
    for x, y in batches(3):
        opt.zero_grad()
        criterion(model(x), y).backward()
        opt.step()
        schedule.step()
    assert opt.param_groups[0]["lr"] < 1.0
    assert opt.last.accepted


@pytest.mark.parametrize("control", ["fixed", "gain"])
def test_accumulated_micro_batches_are_the_whole_batch(control):
    (x, y), *_ = batches(1)
    moved = []
    for pieces in (1, 2, 4):
        model, criterion, opt = make(pullback.GaussNewton, damping=pullback.Damping(control=control))
        model.double()
        before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        opt.zero_grad()
        for part, target in zip(x.double().chunk(pieces), y.chunk(pieces), strict=True):
            (criterion(model(part), target) / pieces).backward()
        opt.step()
        moved.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - before)
    assert float((moved[1] - moved[0]).abs().max()) < 1e-9
    assert float((moved[2] - moved[0]).abs().max()) < 1e-9


def test_fresh_batches_do_not_drive_the_damping_to_nothing():
    """Steps that solve their own batch to the bottom are found too long by the next batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Linear(30, 1)).double()
    criterion = nn.MSELoss()
    opt = pullback.GaussNewton(model, criterion)
    mus = []
    for _ in range(60):
        x = torch.randn(8, 3, dtype=torch.float64)
        opt.zero_grad()
        criterion(model(x), x[:, :1] + torch.randn(8, 1, dtype=torch.float64)).backward()
        opt.step()
        mus.append(opt.last.mu)
    assert min(mus[20:]) > 1e-3
    x = torch.randn(4000, 3, dtype=torch.float64)
    with torch.no_grad():
        assert float((model(x) - x[:, :1]).square().mean()) < 0.5


def test_record_and_report_are_readable():
    model, criterion, opt = make()
    train(model, criterion, opt, batches(2))
    last = opt.last
    assert last.accepted
    assert last.rank == 16 * 2
    assert set(last.seconds) == {"sweep", "curvature", "solve", "trial"}
    assert last.gain == pytest.approx(last.actual / last.predicted)
    text = str(opt.coverage)
    assert "0.weight" in text
    assert "exact   linear" in text
    with pytest.raises(KeyError):
        opt.coverage["nothing"]
    sampled = make(metric=pullback.Sampled(m=3))
    train(*sampled, batches(1))
    assert sampled[2].coverage["0.weight"].status == "sampled"
    assert "Sampled(Categorical(), m=3)" in sampled[2].coverage["0.weight"].why
