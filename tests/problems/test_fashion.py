from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import pytest
import torch

from pullback.problems import Budget, DataError, SpecError, load_problem, run
from pullback.problems.idx import read_idx


def write_idx(path: Path, array: torch.Tensor) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + bytes(array.flatten().tolist())))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with 40 + 10 images, the k-th filled with k."""
    root = tmp_path / "fashion_mnist"
    root.mkdir()
    for part, rows in (("train", 40), ("t10k", 10)):
        images = torch.arange(rows, dtype=torch.uint8).reshape(-1, 1, 1).expand(rows, 28, 28)
        write_idx(root / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(root / f"{part}-labels-idx1-ubyte.gz", torch.arange(rows) % 10)
    return tmp_path


@pytest.mark.parametrize(("name", "shape"), [("fashion-mnist", (784,)), ("fashion-mnist-cnn", (1, 28, 28))])
def test_loads_and_trains(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    problem = load_problem(f"{name}:batch_size=16", folder)
    assert problem.train[0].shape == (40, *shape)
    assert problem.test is not None
    assert problem.test[0].shape == (10, *shape)
    assert problem.train[0].dtype == torch.float32
    assert problem.train[0][7].flatten()[0].item() == pytest.approx((7 / 255 - 0.2860) / 0.3530)
    assert problem.train[1].tolist() == [k % 10 for k in range(40)]
    assert run(problem, "adam", budget=Budget(steps=2)).failure is None


def test_the_folder_may_come_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PULLBACK_DATA", str(folder))
    problem = load_problem("fashion-mnist:rows=20,test_rows=5,width=8")
    assert problem.test is not None
    assert (len(problem.train[0]), len(problem.test[0])) == (20, 5)


def test_without_a_folder_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PULLBACK_DATA", raising=False)
    with pytest.raises(DataError, match=r"fashion-mnist reads its data.*--data DIR or in PULLBACK_DATA"):
        load_problem("fashion-mnist")
    with pytest.raises(DataError, match="no data folder"):
        load_problem("fashion-mnist", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["fashion-mnist", "fashion-mnist-cnn"])
def test_the_last_training_rows_may_be_for_validation(folder: Path, name: str) -> None:
    problem = load_problem(f"{name}:validation_rows=10", folder)
    assert problem.validation is not None
    assert (len(problem.train[0]), len(problem.validation[0])) == (30, 10)
    some = load_problem(f"{name}:validation_rows=10,rows=7,loss_rows=3", folder)
    assert some.validation is not None
    # The same rows however many are trained on: the k-th image is filled with k.
    assert torch.equal(some.validation[0], problem.validation[0])
    assert some.validation[1].tolist() == list(range(10))
    assert len(some.train[0]) == 7
    assert some.reported is not None
    assert torch.equal(some.reported[0], problem.train[0][:3])
    assert load_problem(name, folder).validation is None
    with pytest.raises(SpecError, match=f"rows of {name} is 31; give 1 to 30"):
        load_problem(f"{name}:validation_rows=10,rows=31", folder)


def test_five_layers_of_one_width(folder: Path) -> None:
    model = load_problem("fashion-mnist:depth=5,width=16", folder).make_model(0)
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    assert shapes == [(16, 784), (16, 16), (16, 16), (16, 16), (10, 16)]


@pytest.mark.parametrize("net", ["small", "conv4", "residual", "inception"])
def test_networks(folder: Path, net: str) -> None:
    problem = load_problem(f"fashion-mnist-cnn:net={net},channels=2,rows=8", folder)
    assert run(problem, "adam", budget=Budget(steps=1)).failure is None


@pytest.mark.parametrize(
    "option", ["rows=41", "rows=0", "test_rows=11", "width=0", "depth=0", "validation_rows=-1", "loss_rows=41"]
)
def test_sizes_are_checked(folder: Path, option: str) -> None:
    with pytest.raises(SpecError, match=r"give [01] (to|or)"):
        load_problem(f"fashion-mnist:{option}", folder)
    with pytest.raises(SpecError, match="validation_rows of fashion-mnist is 40; give 0 to 39"):
        load_problem("fashion-mnist:validation_rows=40", folder)


def test_channels_are_checked(folder: Path) -> None:
    with pytest.raises(SpecError, match="channels of fashion-mnist-cnn"):
        load_problem("fashion-mnist-cnn:channels=0", folder)


DAMAGE = {
    "is missing": None,
    "not a gzip file": b"hello, this is no archive",
    "cut off": gzip.compress(os.urandom(4000))[:-900],
    "garbled": gzip.compress(bytes(1000))[:12] + b"\xff" * 20,
    "not an idx file": gzip.compress(b"\x00\x00\x08\x01" + bytes(20)),
    "12 bytes for the shape": gzip.compress(b"\x00\x00\x08\x03" + struct.pack(">3I", 9, 28, 28) + bytes(12)),
}


@pytest.mark.parametrize("part", DAMAGE)
def test_a_damaged_file_is_one_sentence_with_the_remedy(folder: Path, part: str) -> None:
    path = folder / "fashion_mnist" / "train-images-idx3-ubyte.gz"
    content = DAMAGE[part]
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte\.gz.*{part}.*put the four \.gz files"):
        load_problem("fashion-mnist", folder)


def test_images_and_labels_must_agree(folder: Path) -> None:
    write_idx(folder / "fashion_mnist" / "train-labels-idx1-ubyte.gz", torch.arange(39) % 10)
    with pytest.raises(DataError, match="39 labels"):
        load_problem("fashion-mnist", folder)


def test_idx_of_any_shape(tmp_path: Path) -> None:
    array = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a.gz", array)
    assert torch.equal(read_idx(tmp_path / "a.gz", 3, "weep."), array)
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path, 3, "weep.")


@pytest.mark.skipif("PULLBACK_DATA" not in os.environ, reason="needs the real data folder")
def test_the_real_thing() -> None:
    problem = load_problem("fashion-mnist-cnn")
    assert problem.test is not None
    assert (len(problem.train[0]), len(problem.test[0])) == (60000, 10000)
    assert torch.bincount(problem.train[1]).tolist() == [6000] * 10
    assert abs(problem.train[0].mean().item()) < 1e-3
    assert abs(problem.train[0].std().item() - 1) < 1e-3
