from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pullback.problems import Budget, DataError, Problem, Progress, SpecError, load_problem, run
from pullback.problems.driven import ControlledField, DrivenField, cosines, standardise_paths
from pullback.problems.odes import Observed, OwnClock, end_time, evaluations
from pullback.problems.populations import LotkaVolterra
from pullback.problems.spirals import true_velocity

SETS = {
    "japanese-vowels": "JapaneseVowels",
    "articulary-words": "ArticularyWordRecognition",
    "italy-power": "ItalyPowerDemand",
    "arrow-head": "ArrowHead",
}
#: Every problem with a neural ODE: options that make it small, an optimizer, steps, part of the loss that is left.
ODES = [
    ("spirals:trajectories=2,points=6,width=8,horizon=0.5", "feedback", 5, 0.5),
    ("lynx-hare:steps=40", "gauss-newton", 3, 0.8),
    ("lynx-hare:field=neural,ahead=2,width=4", "gauss-newton", 4, 0.8),
    ("sunspots:window=4,ahead=2,width=4,latent=2", "gauss-newton", 4, 0.8),
    ("sunspots:missing=0.4,window=4,ahead=3,width=4,latent=2", "feedback", 4, 0.95),
    ("sunspots:model=ode-rnn,missing=0.4,window=4,ahead=3,width=4,latent=2", "gauss-newton", 5, 0.9),
    ("circles:points=48,width=8,depth=1", "feedback", 5, 0.99),
    ("moons:points=48,width=8,depth=1,trace=hutchinson", "kronecker", 6, 0.99),
    ("miniboone:width=8,batch_size=none", "kronecker", 12, 0.99),
    *(
        (f"{name}:field={field},cosines=3,hidden=4,width=6,steps=3,batch_size=none", "feedback", 5, 0.9)
        for name, field in zip(SETS, ("cde", "driven", "cde", "driven"), strict=True)
    ),
    ("digits-ode:channels=2,steps=1", "kronecker", 10, 0.9),
]
NAMES = [text.partition(":")[0] for text, *_ in ODES]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small data in the form of the real ones."""
    draw = np.random.default_rng(0)
    for name in ("series", "density", "ts_classification"):
        (tmp_path / name).mkdir()
    years = np.arange(21)
    hares = ["# a comment", "Year, Lynx, Hare"]
    hares += [f"{1900 + k}, {20 + 15 * math.sin(k / 1.6 - 1):.2f}, {30 + 20 * math.sin(k / 1.6):.2f}" for k in years]
    write(tmp_path / "series" / "hudson-bay-lynx-hare.csv.gz", hares)
    spots = ['"YEAR","SUNACTIVITY"', *(f"{1880 + k},{50 + 45 * math.sin(k / 1.75):.1f}" for k in range(70))]
    write(tmp_path / "series" / "sunspots_yearly.csv.gz", spots)
    np.savez(tmp_path / "density" / "miniboone_excerpt.npz", X=draw.normal(3, 5, (60, 5)).astype(np.float32))
    for name in SETS.values():
        y = (np.arange(24) % 3).astype(np.uint8)
        x = draw.normal(0, 0.2, (24, 2, 9)).astype(np.float32) + y[:, None, None] * np.linspace(
            -1, 1, 9, dtype=np.float32
        )
        x[::5, :, 6:] = np.nan
        np.savez(tmp_path / "ts_classification" / f"{name}.npz", X_train=x, y_train=y, X_test=x[:6], y_test=y[:6])
    return tmp_path


def write(path: Path, lines: list[str]) -> None:
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


@pytest.mark.parametrize(("text", "optimizer", "steps", "left"), ODES, ids=NAMES)
def test_ours_lowers_the_loss(folder: Path, text: str, optimizer: str, steps: int, left: float) -> None:
    problem = load_problem(text, folder)
    result = run(problem, optimizer, budget=Budget(steps=steps))
    assert result.failure is None
    assert result.loss is not None
    first = result.history[0].loss
    assert result.loss < (left * first if first > 0 else first)
    model = problem.build_model(0)
    assert evaluations(model) == 0
    outputs = model(problem.train[0][:7])
    assert problem.loss(outputs, problem.train[1][:7]).isfinite()
    assert evaluations(model) > 3
    assert end_time(model) == 1.0
    # A row is a sample of its own, up to the tolerance of the solver that all rows share.
    if "hutchinson" not in text and "miniboone" not in text:
        torch.testing.assert_close(model(problem.train[0][3:4]), outputs[3:4], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("text", ["spirals:trajectories=2,points=4,width=4", "circles:points=16,width=4", "digits-ode"])
def test_the_two_ways_back_agree(text: str) -> None:
    gradients = []
    for adjoint in ("true", "false"):
        extra = "" if "digits" in text else ",tolerance=1e-8"
        problem = load_problem(f"{text}{',' if ':' in text else ':'}adjoint={adjoint}{extra}")
        if "digits" in text:
            problem = load_problem(f"digits-ode:channels=2,adjoint={adjoint},solver=dopri5,tolerance=1e-6")
        model = problem.build_model(1)
        problem.loss(model(problem.train[0][:8]), problem.train[1][:8]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 if "digits" in text else 1e-7)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("spirals", "circles", "moons", "digits-ode")])
def test_what_is_missing_or_damaged_is_said(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PULLBACK_DATA", raising=False)
    with pytest.raises(DataError, match=r"--data DIR or in PULLBACK_DATA.*put"):
        load_problem(name)
    for path in [*folder.glob("*/*.gz"), *folder.glob("*/*.npz")]:
        path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"damaged.*put"):
        load_problem(name, folder)
    for path in [*folder.glob("*/*.gz"), *folder.glob("*/*.npz")]:
        path.unlink()
    with pytest.raises(DataError, match=r"is missing.*put"):
        load_problem(name, folder)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("spirals:horizon=-1", "horizon -1"),
        ("spirals:solver=dopri", "solver must be one of"),
        ("spirals:tolerance=0", "tolerance of spirals is 0"),
        ("spirals:width=0", "width of spirals is 0"),
        ("circles:trace=some", "exact or hutchinson"),
        ("moons:noise=0", "noise of moons is 0"),
        ("lynx-hare:field=lynx", "lotka-volterra or neural"),
        ("lynx-hare:ahead=21", "1 to 20 years"),
        ("digits-ode:steps=0", "steps of digits-ode is 0"),
        ("sunspots:model=rnn", "give latent or ode-rnn"),
        ("sunspots:missing=1", "missing of sunspots is 1.0; give a share from 0 to 0.9"),
        ("italy-power:field=read", "field of italy-power cannot be 'read'; give driven or cde"),
        ("arrow-head:cosines=0", "cosines of arrow-head is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(text: str, part: str, folder: Path) -> None:
    with pytest.raises(SpecError, match=part):
        load_problem(text, folder).build_model(0)


def test_spirals_are_trajectories_of_their_field() -> None:
    problem = load_problem("spirals:trajectories=1,points=40,horizon=0.4")
    x, y = problem.train
    states = torch.cat([x[:1, :2], y])
    slopes = (states[2:] - states[:-2]) / 0.02
    torch.testing.assert_close(slopes, true_velocity(states[1:-1]), rtol=0, atol=2e-2)
    # The cubes of one coordinate drive the other, and all decays.
    assert true_velocity(torch.tensor([[2.0, 0.0]])).tolist() == [[pytest.approx(-0.8), pytest.approx(-16.0)]]
    assert x[:, 2].tolist() == pytest.approx([0.01 * (k + 1) for k in range(40)])


def test_rows_run_on_their_own_clocks() -> None:
    grow = torch.nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        grow.weight.fill_(0.5)
    from pullback.ode import ODEBlock

    model = Observed(torch.nn.Identity(), ODEBlock(OwnClock(grow), rtol=1e-9, atol=1e-10))
    inputs = torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
    exact = inputs[:, 0] * (0.5 * inputs[:, 1]).exp()
    torch.testing.assert_close(model(inputs)[:, 0].detach(), exact, rtol=1e-8, atol=0)


def test_lotka_and_volterra_are_in_logarithms() -> None:
    rates = torch.tensor([0.5, 0.7, 0.9, 1.1], dtype=torch.float64)
    field = LotkaVolterra(rates.log())
    hare, lynx = 2.0, 3.0
    state = torch.tensor([[hare, lynx]], dtype=torch.float64).log()
    assert field(state)[0].tolist() == pytest.approx([0.5 - 0.7 * lynx, 1.1 * hare - 0.9])


def test_years_ahead(folder: Path) -> None:
    whole = load_problem("lynx-hare", folder)
    x, y = load_problem("lynx-hare:field=neural,ahead=3", folder).train
    assert len(x) == 20 + 19 + 18
    row = 20 + 5  # of those two years ahead
    assert x[row].tolist() == [*whole.train[1][5].tolist(), 2.0]
    assert y[row].tolist() == whole.train[1][7].tolist()


def test_windows_of_sunspots_do_not_see_the_test(folder: Path) -> None:
    problem = load_problem("sunspots:window=4,ahead=2", folder)
    assert problem.test is not None
    x, y = problem.train
    assert len(x) == 2 * (49 - 4 - 2 + 1)  # 1880 to 1928
    assert x[2, 3] == y[0, 0]  # the first value forecast is the last of the next window
    assert y[1, 0] == y[2, 0]
    assert problem.test[0][0, 3] == y[-1, 0]  # the first window of the test ends with the last year trained on
    assert problem.test[0][0, 4] == 1.0


def test_cosines_are_those_of_the_series() -> None:
    t = (torch.arange(200, dtype=torch.float64)) / 199
    found = cosines(torch.stack([1 + 2 * (3 * math.pi * t).cos(), (math.pi * t).cos()]), 5)
    expected = torch.tensor([[1.0, 0, 0, 2, 0], [0, 1, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(found[:2], expected, rtol=0, atol=2e-3)
    # A straight line: 1/2, and -4 / (pi k)^2 at odd k.
    assert found[2].tolist() == pytest.approx([0.5, -4 / math.pi**2, 0, -4 / (3 * math.pi) ** 2, 0], abs=1e-3)


def test_paths_are_standardised_by_the_training_rows() -> None:
    torch.manual_seed(0)
    train, test = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    train[:, 2] = train[0, 2, 0] * torch.eye(5, dtype=torch.float64)[0]  # constant
    scaled, other = standardise_paths(train, test)
    t = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    waves = (math.pi * torch.arange(5, dtype=torch.float64)[:, None] * t).cos()
    before, after = train @ waves, scaled @ waves
    mean = before.mean((0, 2), keepdim=True)
    std = before.std((0, 2), correction=0, keepdim=True)
    torch.testing.assert_close(after[:, :2], ((before - mean) / std)[:, :2], rtol=1e-10, atol=1e-10)
    assert float(after[:, 2].abs().max()) < 1e-12
    torch.testing.assert_close((other @ waves)[:, :2], ((test @ waves - mean) / std)[:, :2], rtol=1e-10, atol=1e-10)


def test_padding_is_not_looked_at(folder: Path) -> None:
    path = folder / "ts_classification" / "JapaneseVowels.npz"
    short = np.linspace(0, 1, 4, dtype=np.float32)
    x = np.full((2, 1, 9), np.nan, dtype=np.float32)
    x[0, 0, :4], x[1, 0] = short, np.linspace(0, 1, 9, dtype=np.float32)
    y = np.array([0, 1], dtype=np.uint8)
    np.savez(path, X_train=x, y_train=y, X_test=x, y_test=y)
    found = load_problem("japanese-vowels", folder).train[0]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_the_field_reads_the_path_at_its_time() -> None:
    torch.manual_seed(0)
    field = DrivenField(hidden=2, channels=2, width=3, pace=2.0).double()
    z, c = torch.randn(4, 2).double(), torch.randn(4, 2, 3).double()
    t = torch.tensor(0.3, dtype=torch.float64)
    path = sum(c[:, :, k] * math.cos(math.pi * k * 0.3) for k in range(3))
    assert isinstance(path, torch.Tensor)
    expected = 2 * torch.tanh(field.outer(torch.tanh(field.inner(torch.cat([z, path], 1)))))
    found = field(t, torch.cat([z, c.flatten(1)], 1))
    torch.testing.assert_close(found[:, :2], expected, rtol=1e-12, atol=1e-12)
    assert not found[:, 2:].any()


def test_the_controlled_field_follows_the_slope_of_the_path() -> None:
    torch.manual_seed(0)
    field = ControlledField(hidden=3, channels=2, width=4, pace=0.5).double()
    z, c, t = torch.randn(4, 3).double(), torch.randn(4, 2, 5).double(), torch.tensor(0.3, dtype=torch.float64)

    def path(time: torch.Tensor) -> torch.Tensor:
        return sum((c[:, :, k] * (math.pi * k * time).cos() for k in range(5)), torch.zeros(4, 2).double())

    slope = torch.func.jacrev(path)(t)
    G = torch.tanh(field.outer(torch.tanh(field.inner(z)))).view(4, 3, 2)
    expected = 0.5 * torch.stack([G[n] @ slope[n] for n in range(4)])
    found = field(t, torch.cat([z, c.flatten(1)], 1))
    torch.testing.assert_close(found[:, :3], expected, rtol=1e-12, atol=1e-12)
    assert not found[:, 3:].any()


def test_what_the_blocks_do_is_recorded() -> None:
    seen: list[Progress] = []
    text = "circles:points=32,width=6,depth=1,tolerance=1e-3,learn_t1=true"
    result = run(load_problem(text), "adam:lr=1e-1", budget=Budget(steps=3), progress=seen.append)
    model = seen[-1].model
    assert model is not None
    assert (result.t1, seen[-1].t1) == (end_time(model), end_time(model)) != (1.0, 1.0)
    ode = result.to_json()["ode"]
    assert ode["step"] == [0, 1, 2, 3]
    assert ode["t1"] == [1.0, *(progress.t1 for progress in seen)]
    assert ode["nfe"][1:] == [progress.nfe for progress in seen]
    assert all(nfe > 3 for nfe in ode["nfe"])
    others = run(load_problem("wine"), "adam", budget=Budget(steps=1), progress=seen.append)
    assert (others.nfe, others.t1, others.to_json()["ode"], seen[-1].nfe, seen[-1].t1) == (None,) * 5


@pytest.mark.parametrize("name", ["circles", "digits-ode"])
def test_the_end_is_learned_under_its_penalty(name: str) -> None:
    small = {"circles": "points=32,width=6,depth=1,", "digits-ode": "channels=2,"}[name]
    problem = load_problem(f"{name}:{small}learn_t1=true,penalty=5")
    models: list[torch.nn.Module] = []
    watched = replace_model(problem, models)
    run(watched, "kronecker" if name == "digits-ode" else "gauss-newton", budget=Budget(steps=4))
    (end,) = {end_time(model) for model in models[-1:]}
    assert end is not None
    assert 0.0 < end < 1.0


def replace_model(problem: Problem, made: list[torch.nn.Module]) -> Problem:
    """The problem whose models are kept in a list."""
    from dataclasses import replace

    make: Callable[[int], torch.nn.Module] = problem.make_model

    def kept(seed: int) -> torch.nn.Module:
        made.append(make(seed))
        return made[-1]

    return replace(problem, make_model=kept)
