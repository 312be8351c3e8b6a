"""Kronecker as an optimizer: what users expect of one, and how it behaves on bad input."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import pullback
from pullback import Kronecker, Refresh, Trust
from pullback.optim.trust import Agreement

FORMS = pytest.mark.parametrize("form", ["kfac", "ekfac"])


def make(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    criterion = nn.CrossEntropyLoss()
    return model, criterion, Kronecker(model, criterion, **options)


def batches(count, n=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, n, 3, generator=g).to(dtype)
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


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@FORMS
@pytest.mark.parametrize("columns", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("cut", [3, 14])  # before a look, and between two
def test_resume_is_bit_exact(form, columns, cut):
    data = batches(30)
    model, criterion, opt = make(form=form, columns=columns)
    train(model, criterion, opt, data[:cut])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    expected = train(model, criterion, opt, data[cut:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, criterion, opt = make(seed=5, form=form, columns=columns)
    again.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    assert train(again, criterion, opt, data[cut:]) == expected
    assert torch.equal(weights(model), weights(again))


@FORMS
def test_training_lowers_the_loss(form):
    model, criterion, opt = make(form=form)
    losses = train(model, criterion, opt, batches(60, 64))
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert {entry.status for entry in opt.coverage.parameters} == {"sampled"}


def test_nothing_is_taped_between_looks():
    model, criterion, opt = make(refresh=Refresh(every=5, growth=1e9))
    notes = []
    for x, y in batches(11):
        train(model, criterion, opt, [(x, y)])
        notes.append(opt.last.note)
    assert [k for k, note in enumerate(notes) if note == "refresh"] == [0, 1, 6]
    opt.refresh()
    train(model, criterion, opt, batches(1))
    assert opt.last.note == "refresh"


def test_the_schedule_grows_to_its_distance():
    step, seen = 0, []
    while step < 60:
        seen.append(step)
        step = Refresh(every=8, growth=0.25).after(step)
    assert seen == [0, 1, 2, 3, 4, 6, 8, 11, 14, 18, 23, 29, 37, 45, 53]


def test_the_step_is_the_damped_metric_times_the_gradient():
    model, criterion, opt = make(dtype=torch.float64, columns="exact", momentum=0.0, trust=None, lr=0.5)
    (x, y), *_ = batches(1, dtype=torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, criterion, opt, [(x, y)])
    for block in opt.blocks:
        G = block.gathered([p.grad for p in block.params])
        for p, d in zip(block.params, block.parted(block.solve(G)), strict=True):
            old = next(b for b, q in zip(before, model.parameters(), strict=True) if q is p)
            torch.testing.assert_close(old - p.detach(), 0.5 * d, rtol=1e-10, atol=1e-12)


def test_a_closure_and_accumulated_batches_give_the_step_of_the_whole_batch():
    (x, y), *_ = batches(1, dtype=torch.float64)
    steps = []
    for kind in ("loop", "closure", "parts"):
        model, criterion, opt = make(dtype=torch.float64, columns="exact")
        opt.zero_grad()
        if kind == "loop":
            criterion(model(x), y).backward()
        elif kind == "parts":
            for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
                (criterion(model(a), b) / 2).backward()

        def closure(model=model, criterion=criterion):
            return criterion(model(x), y)

        opt.step(closure if kind == "closure" else None)
        steps.append(weights(model))
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(steps[2], steps[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [False, True])
def test_a_scaled_loss_gives_the_same_steps(clip):
    runs = []
    for scale in (None, 1024.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        model, criterion, opt = make(grad_scaler=scaler)
        for x, y in batches(8):
            opt.zero_grad()
            loss = criterion(model(x), y)
            (scaler.scale(loss) if scaler else loss).backward()
            if clip:
                if scaler:
                    scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if scaler:
                scaler.step(opt)
                scaler.update()
            else:
                opt.step()
        runs.append(weights(model))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-6)


def test_autocast_and_batch_norm_and_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, groups=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip
    criterion = nn.CrossEntropyLoss()
    opt = Kronecker(model, criterion)
    x = torch.randn(16, 1, 6, 6)
    y = torch.randint(0, 3, (16,))
    losses = []
    for _ in range(25):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = criterion(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert opt.coverage.frozen == ("1",)


def test_schedulers_decay_and_groups():
    model, criterion, _ = make()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[3].parameters(), "weight_decay": 0.5}]
    opt = Kronecker(model, criterion, params=groups)
    before = weights(model[0]), weights(model[1])
    train(model, criterion, opt, batches(3))
    assert torch.equal(before[0], weights(model[0]))
    assert torch.equal(before[1], weights(model[1]))
    plain, criterion, twin = make()
    twin_opt = Kronecker(plain, criterion, params=[{"params": plain[3].parameters()}])
    twin.close()
    x, y = batches(1)[0]
    start = weights(plain[3])
    train(plain, criterion, twin_opt, [(x, y)])
    moved = weights(plain[3]) - start
    other, criterion, third = make()
    third.close()
    decayed = Kronecker(other, criterion, params=[{"params": other[3].parameters()}], weight_decay=0.5)
    train(other, criterion, decayed, [(x, y)])
    torch.testing.assert_close(weights(other[3]), 0.5 * start + moved)


def test_a_batch_of_one_and_absent_classes():
    model, criterion, opt = make()
    losses = train(model, criterion, opt, [(x[:1], torch.zeros(1, dtype=torch.long)) for x, _ in batches(20)])
    assert all(math.isfinite(v) for v in losses)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("between", [False, True])
def test_numbers_that_are_not_finite_leave_the_weights(between):
    model, criterion, opt = make()
    train(model, criterion, opt, batches(10 if between else 1))
    assert between == (not opt._tape.recorder.enabled)
    before = weights(model)
    x, y = batches(1)[0]
    opt.zero_grad()
    criterion(model(x * float("nan")), y).backward()
    with pytest.raises(pullback.StepError, match="no step was taken"):
        opt.step()
    assert torch.equal(before, weights(model))
    assert math.isfinite(train(model, criterion, opt, [(x, y)])[0])


def test_a_layer_met_later_waits_for_a_look():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.both = nn.Linear(3, 3), nn.Linear(3, 3), False

        def forward(self, x):
            return self.b(torch.tanh(self.a(x))) if self.both else self.a(x)

    torch.manual_seed(0)
    model, criterion = Two(), nn.CrossEntropyLoss()
    opt = Kronecker(model, criterion, refresh=Refresh(every=50, growth=1e9))
    train(model, criterion, opt, batches(3))
    model.both = True
    before = weights(model.b)
    train(model, criterion, opt, batches(1))
    assert torch.equal(before, weights(model.b))
    train(model, criterion, opt, batches(1))
    assert not torch.equal(before, weights(model.b))


def test_parameters_without_a_gradient_stay():
    model, criterion, opt = make()
    train(model, criterion, opt, batches(3))
    model[0].requires_grad_(False)
    before = weights(model[0])
    train(model, criterion, opt, batches(3))
    assert torch.equal(before, weights(model[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping must be positive"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"form": "shampoo"}, "form must be 'kfac' or 'ekfac'"),
        ({"shared": "sum"}, "shared must be 'expand' or 'reduce'"),
        ({"columns": "all"}, "columns must be 'sampled', 'exact' or 'empirical'"),
        ({"lr": -1.0}, "lr must be finite and at least 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_option_objects_are_checked():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Refresh(every=0)
    with pytest.raises(ValueError, match=r"Trust\(noisy"):
        Trust(noisy=0.0)


def test_agreement_is_the_part_of_a_gradient_that_is_signal():
    g = torch.Generator().manual_seed(0)
    signal = torch.randn(400, generator=g)
    noise = 2.0
    agreement, previous = Agreement(Trust(memory=10_000), first=1.0), None
    for _ in range(4000):
        d = signal + noise * torch.randn(400, generator=g)
        agreement.scale(float(d @ d), None if previous is None else float(d @ previous))
        previous = d
    expected = float(signal @ signal) / (float(signal @ signal) + 400 * noise**2)
    assert agreement.q == pytest.approx(expected, rel=0.05)


def test_a_step_is_as_long_as_trusted():
    trust = Trust(noisy=1e-4, agreed=1e-2, least=1e-9)
    agreement = Agreement(trust, first=2.0, q=0.5, seen=10, last=1.0)
    slope = 50.0
    nu = agreement.scale(slope, None)
    assert nu**2 * slope == pytest.approx(2.0 * (1e-4 + 1e-2 * 0.25), rel=1e-12)
    assert Agreement(trust, first=1e9, q=0.25, seen=10, last=1.0).scale(1.0, None) == 0.25


def test_no_weight_changes_by_more_than_its_share():
    """Three matrices: each moves by at most `missed` times its norm, or of what torch would start it with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].weight *= 30
        model[4].weight *= 0.01
        model[4].bias.zero_()
    criterion = nn.CrossEntropyLoss()
    opt = Kronecker(model, criterion, momentum=0.0, trust=Trust(noisy=1e3, missed=0.01))
    before = [p.detach().clone() for p in model.parameters()]
    criterion(model(torch.randn(32, 6).double()), torch.randint(3, (32,))).backward()
    opt.step()
    shares = []
    for k, outputs in ((0, 8), (2, 8), (4, 3)):
        old = torch.cat([before[k].flatten(), before[k + 1]])
        new = torch.cat([p.detach().flatten() for p in list(model.parameters())[k : k + 2]])
        shares.append(float((new - old).norm() / old.norm().clamp_min((2 * outputs / 3) ** 0.5)))
    assert shares == pytest.approx([0.01] * 3, rel=1e-9)


def test_a_deep_net_without_signal_is_brought_to_life():
    """Deep ReLU nets with torch's initialisation start flat, and explode under steps as long as the metric allows."""
    torch.manual_seed(0)
    x = torch.randn(256, 10)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    widths = [10, *[16] * 6]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    model, criterion = nn.Sequential(*layers, nn.Linear(16, 4)), nn.CrossEntropyLoss()
    opt, losses = Kronecker(model, criterion), []
    for step in range(100):
        batch = slice(64 * (step % 4), 64 * (step % 4 + 1))
        opt.zero_grad()
        loss = criterion(model(x[batch]), y[batch])
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert max(losses) < 1.5 * losses[0]
    assert sum(losses[-4:]) < 0.2
