"""What users expect of an optimizer, of those in closed loop: groups, schedules, copies, heads, fallbacks."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from cases import CASES
from closed import CLOSED, chain, train, weights
from models import Spare
from oracle import assert_close
from pullback import Damping, Momentum, Sampled

FIXED = Damping(control="fixed", initial=3.0)
every = pytest.mark.parametrize("Opt", CLOSED.values(), ids=list(CLOSED))
stages = pytest.mark.parametrize("Opt", [CLOSED["feedback"], CLOSED["plain feedback"]], ids=["feedback", "plain"])


@stages
def test_every_stage_may_have_a_learning_rate(Opt):
    model, x, y = chain()
    groups = [{"params": model[k].parameters(), "lr": lr} for k, lr in ((0, 1.0), (2, 0.0), (4, 0.5))]
    opt = Opt(model, nn.MSELoss(), params=groups)
    before = model[2].weight.detach().clone()
    losses = train(opt, lambda: opt.criterion(model(x), y), 20)
    assert torch.equal(before, model[2].weight)
    assert opt.last.accepted
    assert losses[-1] < 0.5 * losses[0]


@stages
@pytest.mark.parametrize("slow", [0, 1, 2])
def test_a_slow_stage_does_not_undo_what_fast_ones_did(Opt, slow):
    model, x, y = chain()
    groups = [{"params": model[2 * k].parameters(), "lr": 1e-3 if k == slow else 1.0} for k in range(3)]
    opt = Opt(model, nn.MSELoss(), params=groups)
    losses = train(opt, lambda: opt.criterion(model(x), y), 20)
    assert losses[-1] < 0.5 * losses[0]
    assert all(b <= a for a, b in itertools.pairwise(losses))


@every
def test_different_rates_inside_a_stage_are_refused(Opt):
    model, x, y = chain()
    groups = [{"params": [p for n, p in model.named_parameters() if n.endswith(end)], "lr": lr}
              for end, lr in (("weight", 1.0), ("bias", 0.5))]  # fmt: skip
    opt = Opt(model, nn.MSELoss(), params=groups)
    opt.criterion(model(x), y).backward()
    before = weights(model)
    with pytest.raises(ValueError, match=r"different learning rates \(0.5, 1.0\); .* give its parameters one rate"):
        opt.step()
    assert torch.equal(before, weights(model))


@every
def test_a_learning_rate_of_zero_takes_no_step(Opt):
    model, x, y = chain()
    opt = Opt(model, nn.MSELoss(), momentum=Momentum(kind="spring", decay=0.9))
    train(opt, lambda: opt.criterion(model(x), y), 3)
    opt.param_groups[0]["lr"] = 0.0
    before = weights(model)
    train(opt, lambda: opt.criterion(model(x), y), 1)
    assert torch.equal(before, weights(model))


@every
def test_schedules_shorten_the_steps(Opt):
    moved = []
    for factor in (1.0, 0.1):
        model, x, y = chain()
        opt = Opt(model, nn.MSELoss(), damping=FIXED)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k, factor=factor: factor)
        before = weights(model)
        train(opt, lambda: opt.criterion(model(x), y), 1)  # noqa: B023
        schedule.step()
        moved.append(float((weights(model) - before).norm()))
    assert moved[1] == pytest.approx(0.1 * moved[0], rel=0.1)


@every
@pytest.mark.parametrize("options", [{}, {"mass": "marquardt"}, {"momentum": Momentum(kind="spring", decay=0.5)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resume_in_mid_run_is_bit_exact(Opt, options, dtype):
    model, x, y = chain(dtype=dtype)
    opt = Opt(model, nn.MSELoss(), sweep="loop", lr=0.8, weight_decay=1e-3, **options)
    train(opt, lambda: opt.criterion(model(x), y), 7)
    twin, _, _ = chain(seed=5, dtype=dtype)
    again = Opt(twin, nn.MSELoss(), sweep="loop", **options)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    a = train(opt, lambda: opt.criterion(model(x), y), 7)
    b = train(again, lambda: again.criterion(twin(x), y), 7)
    assert a == b
    assert torch.equal(weights(model), weights(twin))


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_of_the_model_train_alone_and_with_optimizers_of_their_own(Opt, copied):
    model, x, y = chain()
    opt = Opt(model, nn.MSELoss(), sweep="loop")
    train(opt, lambda: opt.criterion(model(x), y), 1)
    twin = copied(model)
    other = copied(model)
    state = copy.deepcopy(opt.state_dict())
    train(opt, lambda: opt.criterion(model(x), y), 3)
    second = Opt(twin, nn.MSELoss(), sweep="loop")
    second.load_state_dict(state)
    train(second, lambda: second.criterion(twin(x), y), 3)
    assert torch.equal(weights(model), weights(twin))
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    losses = train(sgd, lambda: nn.functional.mse_loss(other(x), y), 3)
    assert losses[-1] < losses[0]


@stages
def test_two_optimizers_on_one_model(Opt):
    model, x, y = chain()
    criterion = nn.MSELoss()
    first = Opt(model, criterion, params=model[:3].parameters())
    second = CLOSED["feedback"](model, criterion, params=model[4].parameters())
    for _ in range(15):
        for opt, still in ((first, model[4]), (second, model[0])):
            before = still.weight.detach().clone()
            opt.zero_grad()
            model.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            opt.step()
            assert torch.equal(before, still.weight)
            with torch.no_grad():
                assert float(criterion(model(x), y)) == pytest.approx(opt.last.loss - opt.last.actual, rel=1e-9)
            assert opt.last.accepted
    assert loss.item() < 0.2


@stages
def test_a_second_optimizer_that_only_looks_changes_nothing(Opt):
    moved = []
    for watched in (False, True):
        model, x, y = chain()
        opt = Opt(model, nn.MSELoss(), sweep="loop", damping=FIXED)
        other = CLOSED["feedback"](model, nn.MSELoss()) if watched else None
        train(opt, lambda: opt.criterion(model(x), y), 2)  # noqa: B023
        moved.append(weights(model))
        assert other is None or other.last is None
    assert_close(*moved, 1e-10)


@every
def test_a_model_edited_between_steps(Opt):
    model, x, y = chain()
    opt = Opt(model, nn.MSELoss())
    train(opt, lambda: opt.criterion(model(x), y), 3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    train(opt, lambda: opt.criterion(model(x), y), 3)
    model[2] = nn.Linear(5, 4).double()
    new = model[2].weight.detach().clone()
    losses = train(opt, lambda: opt.criterion(model(x), y), 10)
    assert torch.equal(new, model[2].weight)
    assert opt.coverage["2.weight"].status == "frozen"
    assert losses[-1] < losses[0]
    for p in model[0].parameters():
        p.requires_grad_(False)
    before = model[0].weight.detach().clone()
    train(opt, lambda: opt.criterion(model(x), y), 2)
    assert torch.equal(before, model[0].weight)
    opt.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return {"kind": self.kind(h), "size": self.size(h)}


@every
@pytest.mark.parametrize("sampled", [False, True])
def test_several_heads_and_sketches(Opt, sampled):
    torch.manual_seed(0)
    _, x, y = chain()
    model, kind = Heads().double(), torch.randint(0, 4, (9,))
    criteria = {"kind": nn.CrossEntropyLoss(), "size": nn.MSELoss()}
    metric = {"kind": Sampled(m=2), "size": Sampled(m=2, seed=3)} if sampled else None
    opt = Opt(model, criteria, metric=metric)

    def loss():
        out = model(x)
        return criteria["kind"](out["kind"], kind) + 0.5 * criteria["size"](out["size"], y)

    losses = train(opt, loss, 15)
    assert losses[-1] < 0.8 * losses[0]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))
    assert {e.status for e in opt.coverage.parameters} == {"sampled" if sampled else "exact"}


@every
def test_a_fallback_takes_what_has_no_rows(Opt):
    _, x, y = chain(dtype=torch.float32)
    model = Spare()
    opt = Opt(model, nn.MSELoss(), fallback=lambda p: torch.optim.SGD(p, lr=0.1))
    before = model.extra.weight.item()
    train(opt, lambda: opt.criterion(model(x), y) + model.extra.weight.square().sum(), 1)
    assert model.extra.weight.item() == pytest.approx(before * 0.8)
    assert opt.coverage["extra.weight"].status == "fallback"
    assert opt.coverage["core.weight"].status == "exact"


@every
@pytest.mark.parametrize("case", [case for case in CASES if "in-place" in case.name], ids=lambda case: case.name)
def test_in_place_operations(Opt, case):
    model, args, kwargs = case.build()
    y = torch.randn_like(model(*args, **kwargs))
    opt = Opt(model, nn.MSELoss())
    losses = train(opt, lambda: opt.criterion(model(*args, **kwargs), y), 10)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        now = float(opt.criterion(model(*args, **kwargs), y))
    assert now == pytest.approx(opt.last.loss - opt.last.actual, rel=1e-9)


@every
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": Momentum()}, r"Momentum\(kind='spring'\)"),
        ({"solver": "cg"}, "'auto', 'dual' or 'primal'"),
        ({"batch_norm": "frozen"}, "GroupNorm"),
    ],
)
def test_options_without_a_meaning_are_refused_when_made(Opt, options, words):
    model, _, _ = chain()
    with pytest.raises(ValueError, match=words):
        Opt(model, nn.MSELoss(), **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@stages
@pytest.mark.parametrize("control", ["fixed", "slope"])
def test_an_untried_sweep_that_is_thrown_out_is_undone(Opt, control):
    class Cliff(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
            self.start = self.first.weight.detach().clone()

        def forward(self, x):
            h = self.first(x)
            moved = not torch.equal(self.first.weight.detach(), self.start)
            return self.last(torch.tanh(h) * (float("inf") if moved else 1.0))

    _, x, y = chain(dtype=torch.float32)
    model = Cliff()
    opt = Opt(model, nn.MSELoss(), damping=Damping(control=control))
    before = weights(model)
    opt.criterion(model(x), y).backward()
    opt.step()
    assert not opt.last.accepted
    assert torch.equal(before, weights(model))
