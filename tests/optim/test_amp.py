"""Mixed precision: bf16 autocast and GradScaler give the steps of full precision, as far as bf16 can."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback
from closed import CLOSED
from pullback import Damping

FIXED = Damping(control="fixed", initial=0.3)
OPTS = {"global": pullback.GaussNewton, **CLOSED}


def problem(kind="mlp"):
    torch.manual_seed(0)
    if kind == "mlp":
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        x = torch.randn(16, 5)
    else:
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        x = torch.randn(16, 1, 6, 6)
    return model, nn.CrossEntropyLoss(), x, torch.randint(0, 3, (16,))


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def moved(kind, Opt="global", *, autocast=False, scale=None, clip=None, inside=True, **options):
    model, criterion, x, y = problem(kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    if clip and scaler:
        options["grad_scaler"] = scaler
    opt = OPTS[Opt](model, criterion, damping=FIXED, sweep="loop", **options)
    before = weights(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        z = model(x)
        loss = criterion(z, y) if inside else None
    if not inside:
        loss = criterion(z, y)
    (scaler.scale(loss) if scaler else loss).backward()
    if clip:
        if scaler:
            scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    if scaler:
        scaler.step(opt)
        scaler.update()
    else:
        opt.step()
    return weights(model) - before, opt


def close(a, b, tolerance):
    assert float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("Opt", ["global", "plain feedback"])
def test_autocast_is_the_full_step_to_the_precision_of_bf16(Opt, kind, inside):
    full, _ = moved(kind, Opt)
    half, opt = moved(kind, Opt, autocast=True, inside=inside)
    close(half, full, 0.1)
    assert {p.dtype for p in opt.model.parameters()} == {torch.float32}


def test_second_differences_are_not_taken_in_half_precision():
    for Opt, note in (("feedback", "feedback"), ("geodesic", "plain")):
        step, opt = moved("mlp", Opt, autocast=True)
        plain, _ = moved("mlp", "global" if Opt == "geodesic" else "plain feedback", autocast=True)
        assert opt.last.note == note
        close(step, plain, 1e-6)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("scale", [2.0**16, 3.0])
@pytest.mark.parametrize("Opt", OPTS)
def test_grad_scaler_is_taken_out_of_costates_and_factors(Opt, clip, scale):
    plain, a = moved("mlp", Opt, clip=clip)
    scaled, b = moved("mlp", Opt, clip=clip, scale=scale)
    close(scaled, plain, 1e-4)
    assert b.last.loss == pytest.approx(a.last.loss, rel=1e-5)
    assert b.last.mu == pytest.approx(a.last.mu, rel=1e-4)


@pytest.mark.parametrize("Opt", [pullback.LayerwiseMetric, *CLOSED.values()])
def test_autocast_and_scaler_train_with_gain_control(Opt):
    model, criterion, x, y = problem("mlp")
    opt = Opt(model, criterion)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(25):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = criterion(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
    assert loss.item() < 0.1
    assert opt.last.actual is not None


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("Opt", OPTS)
def test_a_whole_loop_inside_an_autocast_region(Opt, closure):
    model, criterion, x, y = problem("mlp")
    opt = OPTS[Opt](model, criterion)
    first = weights(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(15):
            if closure:
                loss = opt.step(lambda: criterion(model(x), y))
                continue
            opt.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            opt.step()
    assert loss.item() < 0.1
    assert not torch.equal(first, weights(model))


def test_an_overflow_skips_the_step():
    model, criterion, x, y = problem("mlp")
    opt = pullback.LayerwiseMetric(model, criterion)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = weights(model)
    scaler.scale(criterion(model(x), y)).backward()
    model[0].weight.grad[0, 0] = float("inf")
    scaler.step(opt)
    scaler.update()
    assert torch.equal(before, weights(model))
    assert scaler.get_scale() < 2.0**10


def test_closures_and_hidden_scales_are_refused_in_words():
    model, criterion, x, y = problem("mlp")
    opt = pullback.LayerwiseMetric(model, criterion)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(criterion(model(x), y)).backward()
    with pytest.raises(pullback.StepError, match="cannot unscale inside a closure"):
        scaler.step(opt, lambda: criterion(model(x), y))
    scaler = torch.amp.GradScaler("cpu")
    opt = pullback.LayerwiseMetric(model, criterion)
    scaler.scale(criterion(model(x), y)).backward()
    scaler.unscale_(opt)
    with pytest.raises(pullback.StepError, match="grad_scaler=scaler"):
        scaler.step(opt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_half_and_complex_weights_are_refused(dtype):
    with pytest.raises(TypeError, match=r"metrics need float32 or float64 weights"):
        pullback.GaussNewton(nn.ParameterList([torch.zeros(2, dtype=dtype)]), nn.MSELoss())


def test_meta_weights_are_refused():
    with pytest.raises(TypeError, match="on the meta device"):
        pullback.GaussNewton(nn.Linear(2, 2, device="meta"), nn.MSELoss())
