"""What the first step checks by itself: samples are apart, rows reproduce the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback
from oracle import assert_close, dense, jacobian, linearise
from pullback.curvature import Linearisation
from pullback.metric import resolve
from pullback.tape import Tape
from pullback.tape.rules import linear
from sequences import Offsets


def run(model, x, y=None, opt=pullback.LayerwiseMetric, criterion=None):
    criterion = criterion or nn.MSELoss()
    o = opt(model, criterion)
    z = model(x)
    criterion(z, torch.zeros_like(z) if y is None else y).backward()
    o.step()
    return o


def test_batch_norm_in_training_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(pullback.MixingError, match=r"'1' \(BatchNorm1d\) mixes the samples"):
        run(model, torch.randn(6, 3))
    model[1].eval()
    assert run(model, torch.randn(6, 3)).coverage["1.weight"].status == "exact"


def test_a_change_of_mode_is_noticed():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    criterion = nn.MSELoss()
    opt = pullback.GaussNewton(model, criterion)
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    criterion(model(x), y).backward()
    opt.step()
    model.train()
    opt.zero_grad()
    with pytest.raises(pullback.MixingError):
        criterion(model(x), y).backward()


class Centred(nn.Module):
    """Mixes samples without a tell-tale type."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        return self.b(torch.tanh(h - h.mean(0)))


def test_hidden_mixing_is_refused():
    with pytest.raises(pullback.CoverageError, match=r"(mixes samples|mixing)"):
        run(Centred(), torch.randn(5, 3))


class TimeFirst(nn.Module):
    """Folds time-major: its rows are not sample-major positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)

    def forward(self, x):
        n, t, d = x.shape
        return self.a(x.transpose(0, 1).reshape(t * n, d)).view(t, n, -1).sum(0)


def test_time_major_folding_is_not_mistaken_for_positions():
    opt = run(TimeFirst(), torch.randn(4, 4, 2))
    assert opt.coverage["a.weight"].why.startswith("per-sample products of TimeFirst")


class LastStep(nn.Module):
    """Time first, with as many steps as samples, of which the last one is read."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, x):
        return self.a(x.transpose(0, 1))[-1]


def test_a_time_step_is_not_mistaken_for_a_sample():
    """With two samples and two steps the one step that is read sits where sample 1 would."""
    model, x, y = LastStep().double(), torch.randn(2, 2, 3).double(), torch.randn(2, 4).double()
    lin = linearise(model, nn.MSELoss(), [((x,), {}, y)])
    J = jacobian(model, (x,), {})
    rows = torch.stack([J[n, a] for a in range(4) for n in range(2)]) * (2 / 8) ** 0.5
    assert_close(dense(model, lin.blocks), rows)


def test_one_sample_teaches_nothing_about_several():
    """A plan made with one sample, which cannot be mixed with others, is not used for more."""

    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x):
            n, t, d = x.shape
            return self.a(x.transpose(0, 1).reshape(t * n, d)).view(t, n, -1).tanh().sum(0)

    model, criterion = Folds().double(), nn.MSELoss()
    tape = Tape(model, criterion, resolve(criterion, None), "loop")
    for n in (1, 4):
        x = torch.randn(n, 2, 3).double()
        tape.clear()
        criterion(model(x), torch.zeros(n, 4).double()).backward()
        J = jacobian(model, (x,), {}).reshape(n * 4, -1)
        U = dense(model, Linearisation(tape.terms).blocks)
        assert_close(U.reshape(4, n, -1).transpose(0, 1).reshape(n * 4, -1), J * (2 / (4 * n)) ** 0.5)


def test_dropout_inside_a_recurrent_module_is_refused():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTM(2, 3, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.cell(x)[0][:, -1]

    with pytest.raises(pullback.CoverageError, match="do not reproduce its gradient"):
        run(Deep(), torch.randn(4, 3, 2))


def test_a_broken_rule_cannot_pass(monkeypatch):
    """Mutation: rows without their input scale fail the gradient check, by name."""
    true = linear.LinearRows.pull
    monkeypatch.setattr(linear.LinearRows, "pull", lambda self, c: 1.01 * true(self, c))
    with pytest.raises(pullback.CoverageError, match="do not reproduce its gradient"):
        run(Unwrapped(), torch.randn(4, 3))


class Unwrapped(nn.Module):
    """Its generic repair goes wrong as well, so the check has the last word."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x):
        return self.a(x) - self.a(x).mean() * 0 if x.shape[0] > 1 else self.a(x) * 2


def test_a_parameter_from_outside_the_call_is_asked_of_the_whole_model():
    class Borrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.spare = nn.Linear(3, 2)

        def forward(self, x):
            return torch.tanh(self.a(x)) @ self.spare.weight.T

    opt = run(Borrow(), torch.randn(4, 3))
    assert opt.coverage["spare.weight"].status == "exact"
    assert opt.coverage["spare.bias"].status == "unused"


@pytest.mark.parametrize(
    ("words", "offsets", "match"),
    [([1, 2, 3, 3, 0], [0, 2, 4], "No call was seen that gives parameter 'words.weight'"),
     ([1, 2, 3], [0, 1, 2], "EmbeddingBag cannot be differentiated one sample at a time")],
)  # fmt: skip
def test_bags_of_maxima_with_offsets_are_refused(words, offsets, match):
    """Tables of words are exact (tests/cases.py); words in a row, with offsets, cannot be taken sample by sample."""
    model = Offsets()
    model.words.mode = "max"
    criterion = nn.MSELoss()
    o = pullback.GaussNewton(model, criterion)
    with pytest.raises(pullback.CoverageError, match=match):
        criterion(model(torch.tensor(words), torch.tensor(offsets)), torch.zeros(3, 2)).backward()
    o.close()
