"""OCNOpt on pullback.Kronecker: its steps without feedback, the dense twin with it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pullback
from closed import train, weights
from oracle import assert_close
from pullback import Kronecker, OCNOpt, Refresh, Sampled
from pullback.control import Host
from pullback.control.forms import own_form
from pullback.control.host import Raised
from pullback.optim.kronecker_host import KroneckerHost, solved_rows
from pullback.tape import Tape
from samplewise import Dense, Meanwise, Riccati, network

SLOW = Refresh(every=3)


def classes(dtype=torch.float64, N=12, sizes=(3, 5, 4, 3), seed=0):
    model = network(list(sizes), seed).to(dtype)
    return model, nn.CrossEntropyLoss(), torch.randn(N, sizes[0], dtype=dtype), torch.randint(sizes[-1], (N,))


def hosted(criterion, model, **options):
    return lambda params: Kronecker(model, criterion, params=params, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"columns": "exact"}, {"form": "ekfac", "refresh": SLOW}, {"trust": None, "weight_decay": 1e-2}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_feedback_it_is_kronecker_bit_for_bit(options, dtype):
    model, criterion, x, y = classes(dtype)
    twin = copy.deepcopy(model)
    opt = OCNOpt(model, criterion, host=hosted(criterion, model, **options), feedback=False)
    host = Kronecker(twin, criterion, **options)
    ours = train(opt, lambda: criterion(model(x), y), 15)
    theirs = train(host, lambda: criterion(twin(x), y), 15)
    assert ours == theirs
    assert torch.equal(weights(model), weights(twin))
    assert opt.last == host.last
    assert "refresh" not in opt.last.note  # nor a tape in between
    assert opt.last.rank == 0


def test_the_named_host_is_the_default_kronecker():
    model, criterion, x, y = classes()
    twin = copy.deepcopy(model)
    opt = OCNOpt(model, criterion, host="kronecker", lr=0.5, damping=0.3, seed=4, feedback=False)
    host = Kronecker(twin, criterion, lr=0.5, damping=0.3, seed=4)
    train(opt, lambda: criterion(model(x), y), 12)
    train(host, lambda: criterion(twin(x), y), 12)
    assert torch.equal(weights(model), weights(twin))
    assert isinstance(opt.host, Host)


@pytest.mark.parametrize("rank", [1, None])
def test_the_update_is_that_of_the_dense_twin(rank):
    model, criterion, x, y = classes()
    metric = None if rank is None else Sampled(m=1, seed=3)
    columns = "exact" if rank is None else "sampled"
    opt = OCNOpt(model, criterion, host="kronecker", rank=rank, seed=3, bound=None, refresh=SLOW)
    shadow = copy.deepcopy(model)
    # Its own draws, of the looks alone, would not be ours: it is given the metrics of the looks.
    host = KroneckerHost(Kronecker(shadow, criterion, columns=columns, refresh=SLOW))
    for _ in range(6):
        opt._tape.recorder.enabled = False
        shadow.load_state_dict(model.state_dict())
        tape = Tape(shadow, criterion, metric, "loop")
        shadow.zero_grad()
        criterion(shadow(x), y).backward()
        (term,) = tape.terms
        tape.close()
        S = term.factors[id(shadow[-1])][0].factor().permute(1, 2, 0)
        with torch.no_grad():
            host.note([term], float(criterion(model(x), y)))
            host.advance()
        pairs = list(zip(model[::2], shadow[::2], strict=True))
        steps = [Riccati.flat(moved) - Riccati.flat(layer) for layer, moved in pairs]
        blocks = {id(block.params[0]): block for block in host.optimizer.blocks}
        matrices = {id(layer.weight): dense_of(blocks[id(moved.weight)], host) for layer, moved in pairs}
        z = model(x)
        (lam,) = torch.autograd.grad(criterion(z, y), z)
        chain = Riccati(model, x, 12 * lam, S * 12**0.5, Dense(matrices))
        expected = torch.cat(Meanwise(chain, S @ S.mT, steps, Dense(matrices)).updated())
        opt._tape.recorder.enabled = True
        before = weights(model)
        train(opt, lambda: criterion(model(x), y), 1)
        assert_close(weights(model) - before, expected - before, 1e-8)


def dense_of(block, host):
    """Q_uu in the layout of the weight, then the bias."""
    A, B = (damped(side, block) for side in (block.left, block.right))
    o, i = A.shape[0], B.shape[0]
    order = torch.arange(o * i).view(o, i)
    order = torch.cat([order[:, :-1].reshape(-1), order[:, -1]])
    return torch.kron(A, B)[order][:, order] / host.optimizer.last.scale


def damped(side, block):
    C = side.dense()[0]
    return C + 0.1**0.5 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def conv():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3, bias=False)
    ).double()
    return model, nn.CrossEntropyLoss(), torch.randn(5, 2, 4, 4).double(), torch.randint(3, (5,))


@pytest.mark.parametrize("form", ["kfac", "ekfac"])
def test_many_vectors_at_once_are_one_after_the_other(form):
    model, criterion, x, y = conv()
    opt = OCNOpt(model, criterion, host=hosted(criterion, model, form=form))
    losses = train(opt, lambda: criterion(model(x), y), 40)
    assert losses[-1] < 0.5 * losses[0]
    for block in opt.host.optimizer.blocks:
        many = [torch.randn(3, 2, *p.shape, dtype=p.dtype) for p in block.params]
        found = solved_rows(block, many)
        for a in range(3):
            for b in range(2):
                one = block.parted(block.solve(block.gathered([t[a, b] for t in many])))
                for own, t in zip(one, found, strict=True):
                    assert_close(t[a, b], own)


def test_sides_give_what_the_rows_formed_give(monkeypatch):
    model, criterion, x, y = classes()
    tape = Tape(model, criterion, Sampled(m=2), "loop")
    opt = OCNOpt(model, criterion, host="kronecker", rank=2)
    criterion(model(x), y).backward()
    (term,) = tape.terms
    opt.step()
    for layer in model[::2]:
        unit = next(unit for unit in term.plan.units if unit.module is layer)
        rows = unit.rows(term.factors[id(layer)], term.N)
        with torch.no_grad():
            fast = own_form(rows, Raised(opt.host))
            assert opt.host.outer(rows) is not None
            with monkeypatch.context() as patch:
                patch.setattr(KroneckerHost, "outer", lambda self, rows: None)
                assert_close(fast, own_form(rows, Raised(opt.host)))


def test_what_fails_leaves_no_trace_and_a_run_can_be_resumed():
    model, criterion, x, y = classes()
    opt = OCNOpt(model, criterion, host="kronecker", refresh=SLOW)
    run = lambda: criterion(model(x), y)  # noqa: E731
    train(opt, run, 4)
    for steps in (1, 2, 3):  # between looks, and at one
        train(opt, run, steps)
        before, kept = weights(model), copy.deepcopy(opt.state_dict())
        again = copy.deepcopy(model)
        other = OCNOpt(again, criterion, host="kronecker", refresh=SLOW)
        other.load_state_dict(copy.deepcopy(kept))
        bad = x.clone()
        bad[0, 0] = torch.nan
        with pytest.raises(pullback.StepError, match="not finite"):
            train(opt, lambda bad=bad: criterion(model(bad), y), 1)
        opt.load_state_dict(kept)  # the draw was made
        rate, opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"], 1e200
        with pytest.raises(pullback.StepError, match="answer to is not finite"):
            train(opt, run, 1)
        assert torch.equal(before, weights(model))
        opt.param_groups[0]["lr"] = rate
        for sketch, state in zip(opt._sketches(), kept["pullback"]["generators"], strict=True):
            sketch.load_state(state)
        ours = train(opt, run, 2)
        assert ours == train(other, lambda again=again: criterion(again(x), y), 2)
        assert torch.equal(weights(model), weights(again))


def test_options_that_clash_are_refused():
    model, criterion, _, _ = classes()
    with pytest.raises(ValueError, match="columns of the host are those of the policies"):
        OCNOpt(model, criterion, host="kronecker", columns="exact")
    with pytest.raises(TypeError, match="unexpected keyword"):
        OCNOpt(model, criterion, host="kronecker", betas=3)
