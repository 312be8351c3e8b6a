from __future__ import annotations

import pytest

from pullback.problems import Grid, SpecError, parse_grid


def test_bars_part_values_and_the_product_is_run() -> None:
    adam, sgd = parse_grid("adam:lr=1e-3|1e-2,betas=0.9/0.99|0.9/0.999,amsgrad=true,sgd:lr=0.1|1, momentum=0.9")
    assert adam == Grid("adam", {"lr": (0.001, 0.01), "betas": ((0.9, 0.99), (0.9, 0.999)), "amsgrad": (True,)})
    assert adam.axes == ("lr", "betas")
    assert (adam.label, sgd.label) == ("adam:amsgrad=true", "sgd:momentum=0.9")
    assert [spec.label for spec in adam.specs()] == [
        "adam:lr=0.001,betas=0.9/0.99,amsgrad=true",
        "adam:lr=0.001,betas=0.9/0.999,amsgrad=true",
        "adam:lr=0.01,betas=0.9/0.99,amsgrad=true",
        "adam:lr=0.01,betas=0.9/0.999,amsgrad=true",
    ]
    assert [spec.options for spec in sgd.specs()] == [{"lr": 0.1, "momentum": 0.9}, {"lr": 1, "momentum": 0.9}]


def test_one_value_is_a_grid_too() -> None:
    (grid,) = parse_grid("lbfgs")
    assert (grid.axes, [spec.label for spec in grid.specs()]) == ((), ["lbfgs"])
    (grid,) = parse_grid("layerwise-metric:samples=none|1|2")
    assert grid.values == {"samples": (None, 1, 2)}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("adma:lr=1|2", "Did you mean 'adam'"),
        ("adam:lrr=1|2", "Did you mean 'lr'"),
        ("adam:lr=1|fast", "lr of adam must be a number"),
        ("adam:lr=1|", "nothing on one side of a bar"),
        ("adam:lr=1|2|1.0", "one value twice"),
        ("adam:lr=1|2,adam:lr=3", "adam has two grids"),
        ("lr=1|2", "before any optimizer"),
        ("", "between two commas"),
    ],
)
def test_nonsense_is_refused_with_the_remedy(text: str, part: str) -> None:
    with pytest.raises(SpecError, match=part):
        parse_grid(text)
