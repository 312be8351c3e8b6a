from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import pullback
from pullback.problems import Budget, DataError, SpecError, load_problem, run
from pullback.problems.transformer import Transformer

# 400 characters, 4 of them different; the last tenth is "d" alone.
TEXT = "abc" * 120 + "d" * 40
TINY = "layers=1,width=8,heads=2,context=5"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny_shakespeare").mkdir()
    (tmp_path / "tiny_shakespeare" / "input.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    return tmp_path


def test_rows_are_windows_and_targets_the_characters_after(folder: Path) -> None:
    problem = load_problem(f"shakespeare:{TINY},windows=6", folder)
    inputs, targets = problem.train
    assert inputs.shape == targets.shape == (355, 5)
    assert inputs[0].tolist() == [0, 1, 2, 0, 1]
    assert targets[0].tolist() == inputs[1].tolist() == [1, 2, 0, 1, 2]
    # Views of the text take no memory.
    assert inputs.untyped_storage().nbytes() == len(TEXT) * 8
    assert problem.validation is not None
    assert problem.validation[0].shape == (6, 5)
    assert set(problem.validation[0].flatten().tolist()) == {3}
    assert problem.reported is not None
    assert torch.equal(problem.reported[0][0], inputs[0])
    assert torch.equal(problem.reported[0][-1], inputs[-1])
    spaced = load_problem(f"shakespeare:{TINY},stride=5", folder)
    assert len(spaced.train[0]) == 71
    # No more windows than fit beside each other.
    assert spaced.validation is not None
    assert len(spaced.validation[0]) == 7


def test_trains(folder: Path) -> None:
    problem = load_problem(f"shakespeare:{TINY}", folder)
    assert problem.default_budget == Budget(steps=500)
    result = run(problem, "adam:lr=3e-2", budget=Budget(steps=40))
    assert result.failure is None
    assert result.history[0].loss == pytest.approx(1.386, abs=0.05)
    assert result.loss is not None
    assert result.loss < 0.7
    # What never occurs in training is never predicted.
    assert result.validation_score == 0.0


def test_the_layerwise_metric_reads_the_model(folder: Path) -> None:
    problem = load_problem(f"shakespeare:{TINY},batch_size=4", folder)
    result = run(problem, "layerwise-metric:samples=1", budget=Budget(steps=1))
    assert result.failure is None
    assert result.coverage is not None
    assert "tied embedding + linear" in result.coverage
    assert result.coverage.count("sampled") == 16
    model = problem.build_model(0)
    criterion = nn.CrossEntropyLoss()
    optimizer = pullback.LayerwiseMetric(model, criterion, metric=pullback.Sampled(m=1))
    criterion(model(problem.train[0][:4]), problem.train[1][:4]).backward()
    optimizer.step()
    assert model.output.weight is model.embedding.weight


def test_nothing_looks_ahead_and_samples_are_apart() -> None:
    torch.manual_seed(0)
    model = Transformer(tokens=7, layers=2, width=8, heads=2, context=6).double()
    text = torch.randint(7, (3, 6))
    scores = model(text)
    assert scores.shape == (3, 7, 6)
    changed = text.clone()
    changed[0, 4:] = (changed[0, 4:] + 1) % 7
    other = model(changed)
    torch.testing.assert_close(other[0, :, :4], scores[0, :, :4], rtol=0, atol=1e-12)
    torch.testing.assert_close(other[1:], scores[1:], rtol=0, atol=1e-12)
    assert not torch.allclose(other[0, :, 4], scores[0, :, 4])
    torch.testing.assert_close(model(text[:, :3]), scores[:, :, :3], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("heads=3", "width of 128 among 3 heads"),
        ("layers=0", "layers of shakespeare is 0"),
        ("stride=0", "stride of shakespeare"),
        ("windows=0", "windows of shakespeare"),
        ("context=40", "40 characters are held out"),
    ],
)
def test_options_are_checked(folder: Path, option: str, part: str) -> None:
    with pytest.raises(SpecError, match=part):
        load_problem(f"shakespeare:{option}", folder)


def test_without_data_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    monkeypatch.delenv("PULLBACK_DATA", raising=False)
    with pytest.raises(DataError, match=r"shakespeare reads its data.*put input\.txt"):
        load_problem("shakespeare")
    path = folder / "tiny_shakespeare" / "input.txt.gz"
    for content, part in ((b"plain", "damaged"), (path.read_bytes()[:-9], "damaged"), (gzip.compress(b""), "empty")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"input\.txt\.gz is {part}.*; put input\.txt"):
            load_problem("shakespeare", folder)
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        load_problem("shakespeare", folder)


@pytest.mark.skipif("PULLBACK_DATA" not in os.environ, reason="needs the real data folder")
def test_the_real_thing() -> None:
    problem = load_problem("shakespeare")
    model = problem.make_model(0)
    assert problem.train[0].shape == (1_003_854 - 64, 64)
    assert sum(weight.numel() for weight in model.parameters()) == 809_856
    assert model(problem.train[0][:2]).shape == (2, 65, 64)
