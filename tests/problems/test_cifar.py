from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pullback.problems import Budget, DataError, SpecError, load_problem, run

ROWS = 4000


def write(folder: Path, rows: int = ROWS, **others: np.ndarray) -> Path:
    """Images of one colour each, different from row to row."""
    (folder / "cifar10").mkdir(exist_ok=True)
    pixels = np.broadcast_to((np.arange(rows) % 251).astype(np.uint8)[:, None, None, None], (rows, 32, 32, 3))
    arrays = {"X": pixels, "y": (np.arange(rows) % 10).astype(np.uint8)} | others
    path = folder / "cifar10" / "cifar10_exact_first4000.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def test_the_last_800_rows_are_for_validation(tmp_path: Path) -> None:
    write(tmp_path)
    problem = load_problem("cifar10:net=small,channels=2", tmp_path)
    assert problem.validation is not None
    assert problem.test is None
    assert problem.train[0].shape == (3200, 3, 32, 32)
    assert problem.validation[0].shape == (800, 3, 32, 32)
    assert problem.train[1][:12].tolist() == [*range(10), 0, 1]
    assert problem.validation[1][0] == 3200 % 10
    torch.testing.assert_close(problem.train[0].mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(problem.train[0].std((0, 2, 3), correction=0), torch.ones(3))
    # Standardised by the rows trained on alone, and the pixels are where they were.
    assert problem.validation[0].mean().abs() > 1e-3
    assert problem.train[0][0, 0, 0, 0] == problem.train[0][251, 2, 31, 31] == problem.train[0].min()
    result = run(problem, "adam", budget=Budget(steps=1))
    assert result.failure is None
    assert result.history[-1].validation_score is not None
    with pytest.raises(SpecError, match="net of cifar10 cannot be 'resnet'"):
        load_problem("cifar10:net=resnet", tmp_path)


def test_without_data_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PULLBACK_DATA", raising=False)
    with pytest.raises(DataError, match=r"cifar10 reads its data.*first 4000 images"):
        load_problem("cifar10")
    with pytest.raises(DataError, match=r"cifar10_exact_first4000\.npz is missing; it holds X"):
        load_problem("cifar10", tmp_path)


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    for wrong in (content[:200], b"no archive", content[:-400] + bytes(400)):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match="is damaged"):
            load_problem("cifar10", tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is damaged"):
        load_problem("cifar10", tmp_path)
    write(tmp_path, rows=30)
    with pytest.raises(DataError, match=r"images \(30, 32, 32, 3\) uint8 and labels \(30,\)"):
        load_problem("cifar10", tmp_path)
    write(tmp_path, y=np.full(ROWS, 10, dtype=np.uint8))
    with pytest.raises(DataError, match="labels"):
        load_problem("cifar10", tmp_path)
    np.savez(path, X=np.zeros(3))
    with pytest.raises(DataError, match="KeyError"):
        load_problem("cifar10", tmp_path)


@pytest.mark.skipif("PULLBACK_DATA" not in os.environ, reason="needs the real data folder")
def test_the_real_thing() -> None:
    problem = load_problem("cifar10")
    assert problem.validation is not None
    assert problem.train[1][:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    counts = torch.bincount(torch.cat([problem.train[1], problem.validation[1]])).tolist()
    assert counts == [396, 366, 420, 384, 422, 393, 414, 385, 407, 413]
