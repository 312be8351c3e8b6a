"""Certificates: what is said is what was found, by whatever way it was found."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from certification.conftest import Make
from pullback.certification import Certificate, Settings, Statement, certify, rates
from pullback.certification.settings import default_sizes
from pullback.certification.subject import make_subject
from pullback.errors import PullbackError
from pullback.manifolds import Sphere, constrain
from pullback.problems import Problem
from pullback.stability import Descent, StabilityError, Twins
from pullback.stability.descent import PATHWISE

f64 = torch.float64
QUICK = Settings(steps=6, pairs=2, points=3, sizes=(8, 16, 26))


def of_kind(found: Certificate, kind: str) -> str:
    return " ".join(one.text for one in found.statements if one.kind == kind)


def test_a_whole_certificate(line: Make) -> None:
    found = certify(line(), QUICK)
    subject = make_subject(line(), 0, 0.01)
    trail = Descent(subject.objective, subject.start, steps=6, h=0.3).train(subject.data)
    torch.testing.assert_close(found.path.places[-1].theta, trail.end, rtol=0, atol=0)
    assert [end.step for end in found.ends] == [0, 3, 6]
    assert [report.n for report in found.reports] == [8, 16, 26]
    assert found.ended == "whole"
    assert all(report.held and len(report.pairs) == 2 for report in found.reports)
    assert found.path.discrete is not None
    assert abs(found.path.discrete) < 1e-24
    action = found.path.action
    assert action is not None
    assert action.gap is not None
    assert 0 < action.total < action.kinetic
    assert abs(action.gap) < 1e-3
    assert sum(action.modules.values()) == pytest.approx(action.total)

    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    asked = "problem optimizer seed rates constants twins bounds action certificate seconds machine"
    assert set(asked.split()) <= set(record)
    assert record["constants"]["rate"] == min(row["rate"] for row in record["rates"])
    assert {row["kind"] for row in record["certificate"]} == {"proved", "measured", "not claimed"}
    assert all(row["broken"] == 0 for row in record["bounds"] if row["derived"])
    assert "all 3 places" in of_kind(found, "proved")
    assert "all 6 pairs is below the derived bound 'along the pair'" in of_kind(found, "proved")
    assert "is no bound here" in of_kind(found, "not claimed")
    assert "Twin distance goes as" in of_kind(found, "measured")
    text = str(found)
    assert max(map(len, text.splitlines())) <= 160
    assert text.index("PROVED") < text.index("MEASURED") < text.index("NOT CLAIMED")


def test_what_is_left_between_the_steps_goes_with_their_square(line: Make) -> None:
    once = Settings(pairs=1, points=2, sizes=(26,))
    coarse = certify(line(), replace(once, optimizer="descent:lr=0.05,steps=16")).path.action
    fine = certify(line(), replace(once, optimizer="descent:lr=0.025,steps=32")).path.action
    assert coarse is not None
    assert fine is not None
    assert fine.time == pytest.approx(coarse.time)
    assert coarse.total / fine.total == pytest.approx(4, rel=0.15)
    assert coarse.gap == pytest.approx(0, abs=1e-6)


def test_sgd_of_the_registry_is_descent_and_has_no_bound(line: Make) -> None:
    sizes = replace(QUICK, sizes=(20,))
    ours = certify(line(), replace(sizes, optimizer="descent:lr=0.2,decay=0"))
    theirs = certify(line(), replace(sizes, optimizer="sgd:lr=0.2"))
    for a, b in zip(ours.reports[0].pairs, theirs.reports[0].pairs, strict=True):
        assert a.index == b.index
        assert a.distance == pytest.approx(b.distance, rel=1e-9)
        assert a.loss_change == pytest.approx(b.loss_change, rel=1e-9)
        assert a.gap == pytest.approx(b.gap, rel=1e-9)
        assert len(a.bounds) == (3 if a is ours.reports[0].pairs[0] else 1)  # the spectrum is sampled for the first
        assert not b.bounds
    assert [end.rate.value for end in ours.ends] == pytest.approx([end.rate.value for end in theirs.ends], abs=1e-10)
    assert "A bound for twins of sgd" in of_kind(theirs, "not claimed")
    assert "A bound for twins" not in of_kind(ours, "not claimed")
    assert theirs.path.action is not None
    assert abs(theirs.path.action.total) < 1e-24  # steps of the identity's flow


@pytest.mark.parametrize("name", ["layerwise-metric:lr=0.5", "gauss-newton"])
def test_our_steps_have_no_action_in_their_own_metric(line: Make, name: str) -> None:
    found = certify(line(), replace(QUICK, optimizer=name, steps=3, sizes=None, pairs=1))
    action = found.path.action
    assert action is not None
    assert abs(action.total) < 1e-18 * action.kinetic
    assert "zero but for round-off" in of_kind(found, "measured")
    constants = found.constants
    assert constants is not None
    assert constants.B2 is not None
    assert constants.B2 > 0
    assert 0 < constants.xi < 1
    assert found.reports[0].n == 26
    assert "its metric moves with the weights" in found.why_no_bound


def test_batches_are_noise_and_the_rest_is_not(line: Make) -> None:
    problem = line(batch_size=8)
    found = certify(problem, replace(QUICK, optimizer="adam:lr=1e-2", sizes=(12, 20)))
    action = found.path.action
    assert action is not None
    assert action.shares()["noise"] > 0
    assert sum(action.shares().values()) == pytest.approx(1)
    assert "a step sees 8 of 26 samples" in found.why_no_bound
    assert found.fits is None
    with pytest.raises(PullbackError, match=r"sees 8 samples, twins were asked for n = 6; give n of 8 or more"):
        certify(problem, replace(QUICK, optimizer="adam", sizes=(6, 20)))


def test_rates_that_have_not_converged_prove_nothing(line: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "DENSE", 0)
    monkeypatch.setattr(rates, "_STEPS", 3)
    found = certify(line(), replace(QUICK, sizes=(8,), pairs=1))
    assert "did not converge and is UNPROVED" in of_kind(found, "not claimed")
    assert "rate at all" not in of_kind(found, "proved").replace("The rate is NEGATIVE at all", "")
    assert "UNPROVED" in str(found)
    assert all(not row["proved"] for row in found.to_json()["rates"])


def test_a_broken_bound_is_said_and_not_proved(line: Make) -> None:
    found = certify(line(), QUICK)
    first = found.reports[0].pairs[0]
    bound = next(b for b in first.bounds if b.name == PATHWISE)
    assert bound.distance is not None
    found.reports[0] = Twins(8, [replace(first, distance=2 * bound.distance), *found.reports[0].pairs[1:]])
    assert "distance of 1 of 6 pairs is ABOVE the bound 'along the pair'" in of_kind(found, "measured")
    assert "pairs is below" not in of_kind(found, "proved")


def test_a_training_that_goes_up_is_said_to(line: Make) -> None:
    found = certify(line(), replace(QUICK, optimizer="sgd:lr=3", sizes=(26,), pairs=1, steps=3))
    assert "did NOT lower it" in of_kind(found, "measured")


@pytest.mark.parametrize("phase", ["training", "rates", "twins"])
def test_ctrl_c_keeps_what_was_reached(line: Make, phase: str) -> None:
    def press(at: str, share: float, about: str) -> None:
        if at == phase and share > 0.5:
            raise KeyboardInterrupt

    found = certify(line(), QUICK, progress=press)
    assert found.ended == "interrupted"
    assert bool(found.ends) is (phase != "training")
    assert bool(found.reports) is (phase == "twins")
    assert found.path.actions
    json.dumps(found.to_json(), allow_nan=False)
    said = of_kind(found, "not claimed")
    assert "Anything beyond what was reached" in said
    assert ("pairs of twins" in said) is (phase == "twins")
    assert "took" in str(found)


def test_time_that_is_up(line: Make) -> None:
    found = certify(line(), replace(QUICK, seconds=1e-6))
    assert (found.ended, len(found.ends), found.reports) == ("seconds", 1, [])
    assert any(one == Statement("not claimed", one.text, "the time was up") for one in found.statements)


def test_without_other_data_some_are_kept(line: Make) -> None:
    found = certify(line(test=None), replace(QUICK, sizes=(21,), pairs=1))
    assert found.n == 21
    assert any("5 of 26 training samples are kept" in note for note in found.notes)
    sealed = line(sealed=True, validation=line().test)
    assert any("validation data" in note for note in make_subject(sealed, 0, 0.0).notes)
    single = line(dtype=torch.float32, train=tuple(t.float() for t in line().train), test=None, loss_scale=0.5)
    assert {n.partition(";")[0] for n in make_subject(single, 0, 0.0).notes} >= {"in float64"}


def test_sizes() -> None:
    assert default_sizes(1437) == (100, 150, 240, 380, 590, 920, 1400)
    assert default_sizes(142) == (10, 15, 24, 37, 58, 91, 140)
    assert default_sizes(3) == (3,)


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1))


def with_batches() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 10**5), nn.Linear(10**5, 1))


def on_a_sphere() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double()
    constrain(model, "0.weight", Sphere(), project=True)
    return model


def test_refusals(line: Make) -> None:
    inputs = torch.randn(12, 2, dtype=f64)
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0], dtype=f64))
    classes = {
        "criterion": weighted, "train": (inputs, torch.tensor([0, 1, 0, 1, 1, 0] * 2)), "test_metric": "accuracy",
        "test": None, "model": lambda: nn.Linear(2, 2),
    }  # fmt: skip
    bad = line().train[0].clone()
    bad[3] = torch.nan
    cases: list[tuple[Problem, dict[str, object], str]] = [
        (line(), {"optimizer": "desent"}, "Did you mean 'descent'"),
        (line(), {"optimizer": "adm"}, "Did you mean 'adam'"),
        (line(), {"optimizer": "descent:rate=1"}, "descent has no option 'rate'"),
        (line(), {"optimizer": "descent:lr=-1"}, "lr and steps are positive"),
        (line(), {"optimizer": "descent:steps=3", "steps": 4}, "steps are 3 in .* and 4 beside it"),
        (line(), {"optimizer": "least-squares"}, "cannot be observed"),
        (line(), {"optimizer": "adam:lr=-1"}, "adam refuses"),
        (line(), {"pairs": 0}, "pairs is 0; give 1 or more"),
        (line(), {"points": 1}, "points is 1; give 2 or more"),
        (line(), {"sizes": (1, 5)}, "at least 2"),
        (line(), {"sizes": (8, 27)}, "26 training samples here, twins were asked for n = 27; give at most 26"),
        (line(), {"seconds": 0.0}, "seconds is 0.0"),
        (line(), {"optimizer": "descent:lr=1e200"}, "finite"),
        (line(rows=1), {}, "at least 2 of each"),
        (line(rows=4, test=None), {}, "at least 2 of each"),
        (line(with_dropout), {}, "'1' of line is Dropout, which draws at random"),
        (line(with_batches), {}, "'1' of line is BatchNorm1d, which mixes samples"),
        (line(on_a_sphere), {}, "lives on"),
        (line(**classes), {}, "no class weights"),
        (line(criterion=nn.MSELoss(reduction="sum")), {}, "reduction='sum'"),
        (line(train=(bad, line().train[1])), {}, "not finite"),
        (line(wide), {"optimizer": "descent:steps=1000"}, "would take"),
    ]
    for problem, options, said in cases:
        quick = {"pairs": 1, "points": 2} | ({} if "steps=" in str(options) else {"steps": 2})
        with pytest.raises((PullbackError, StabilityError), match=said):
            certify(problem, Settings(**(quick | options)))  # type: ignore[arg-type]
