from __future__ import annotations

import pytest
import torch
from torch import nn

import pullback
from pullback.problems import SpecError
from pullback.problems.vision import image_net

NETS = ["small", "conv4", "residual", "inception"]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("shape", [(1, 28), (3, 32), (3, 7)])
def test_ten_scores_and_samples_apart(net: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = image_net("x", net, shape, 4)()
    images = torch.randn(3, shape[0], shape[1], shape[1])
    scores = model(images)
    assert scores.shape == (3, 10)
    torch.testing.assert_close(model(images[1:2]), scores[1:2], rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize(
    ("net", "grey", "colour"),
    [("small", 9098, 11642), ("conv4", 230186, 292202), ("residual", 38218, 38506), ("inception", 36586, 36874)],
)
def test_sizes_are_those_of_the_documentation(net: str, grey: int, colour: int) -> None:
    models = (image_net("x", net, shape, None)() for shape in ((1, 28), (3, 32)))
    assert [sum(weight.numel() for weight in model.parameters()) for model in models] == [grey, colour]


def test_conv4_is_the_network_of_the_papers() -> None:
    model = image_net("x", "conv4", (3, 32), None)()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [tuple(c.weight.shape) for c in convolutions] == [(32, 3, 3, 3)] + [(32, 32, 3, 3)] * 3
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 2


@pytest.mark.parametrize("net", NETS)
def test_every_parameter_gets_its_rows(net: str) -> None:
    torch.manual_seed(0)
    model = image_net("x", net, (1, 7), 4)()
    criterion = nn.CrossEntropyLoss()
    optimizer = pullback.LayerwiseMetric(model, criterion, metric=pullback.Sampled(m=1))
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer.zero_grad()
    criterion(model(torch.randn(4, 1, 7, 7)), torch.arange(4)).backward()
    optimizer.step()
    assert "fallback" not in str(optimizer.coverage)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_nonsense_is_refused() -> None:
    with pytest.raises(SpecError, match=r"net of x cannot be 'conv5'\. Did you mean 'conv4'\?"):
        image_net("x", "conv5", (1, 28), None)
    with pytest.raises(SpecError, match="channels of x is 0; give 1 or more"):
        image_net("x", "small", (1, 28), 0)
