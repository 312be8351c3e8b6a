"""Convolutional networks for small images: plain, residual, with parallel branches. None normalises over the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pullback.problems.errors import SpecError, nearest
from pullback.problems.preparation import at_least


def image_net(owner: str, net: str, shape: tuple[int, int], channels: int | None) -> Callable[[], nn.Module]:
    """Makes a maker of networks for ten classes.

    Args:
        owner: The problem, for the error message.
        net: "small", "conv4", "residual" or "inception".
        shape: Channels of the images, and their height, which is their width.
        channels: Channels of the first layer; None for the usual number of that network.

    Returns:
        A function that builds the network, from (N, channels, height, height) to (N, 10).

    Raises:
        SpecError: If there is no such network, or `channels` is not positive.
    """
    if net not in _NETS:
        raise SpecError(f"net of {owner} cannot be {net!r}.{nearest(net, _NETS)}")
    build, usual = _NETS[net]
    width = at_least(owner, "channels", usual if channels is None else channels)
    return lambda: build(*shape, width)


def _small(colours: int, height: int, width: int) -> nn.Sequential:
    """Two strided 3 x 3 convolutions and a linear layer."""
    side = (height + 3) // 4
    return nn.Sequential(
        *_conv(colours, width, stride=2),
        *_conv(width, 2 * width, stride=2),
        nn.Flatten(),
        nn.Linear(2 * width * side**2, 10),
    )


def _conv4(colours: int, height: int, width: int) -> nn.Sequential:
    """Four 3 x 3 convolutions of equal width, the second and fourth strided, and two linear layers."""
    convolutions = [
        module
        for fan_in, stride in ((colours, 1), (width, 2), (width, 1), (width, 2))
        for module in _conv(fan_in, width, stride=stride)
    ]
    side = (height + 3) // 4
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(width * side**2, 128), nn.ReLU(), nn.Linear(128, 10))


def _residual(colours: int, _height: int, width: int) -> nn.Sequential:
    """A strided convolution, three basic blocks and the mean over positions."""
    return nn.Sequential(
        *_conv(colours, width, stride=2),
        BasicBlock(width, width),
        BasicBlock(width, 2 * width, stride=2),
        BasicBlock(2 * width, 2 * width),
        *_classify(2 * width),
    )


def _inception(colours: int, _height: int, width: int) -> nn.Sequential:
    """A strided convolution, two stages of parallel branches and the mean over positions."""
    return nn.Sequential(
        *_conv(colours, width, stride=2),
        Branches(width, width),
        nn.MaxPool2d(2),
        Branches(3 * width, width),
        *_classify(3 * width),
    )


class BasicBlock(nn.Module):
    """relu(shortcut(x) + branch(x)), the branch two 3 x 3 convolutions with GroupNorm (He et al. 2016, Wu and He 2018).

    GroupNorm keeps samples apart, which BatchNorm does not.

    Args:
        fan_in: Channels of x.
        fan_out: Channels of the result.
        stride: Stride of the first convolution.
    """

    def __init__(self, fan_in: int, fan_out: int, *, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False),
            _norm(fan_out),
            nn.ReLU(),
            nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False),
            _norm(fan_out),
        )
        same = fan_in == fan_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(fan_in, fan_out, 1, stride=stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Adds the branch to the shortcut.

        Args:
            x: Shape (N, fan_in, H, W).

        Returns:
            Shape (N, fan_out, H / stride, W / stride), rounded up.
        """
        result: Tensor = self.relu(self.shortcut(x) + self.branch(x))
        return result


class Branches(nn.Module):
    """Convolutions of 1, 3 and 5 pixels beside each other, their channels put together (Szegedy et al. 2015).

    Args:
        fan_in: Channels of x.
        width: Channels of each branch.
    """

    def __init__(self, fan_in: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*_conv(fan_in, width, size=size)) for size in (1, 3, 5))

    def forward(self, x: Tensor) -> Tensor:
        """Runs all branches.

        Args:
            x: Shape (N, fan_in, H, W).

        Returns:
            Shape (N, 3 width, H, W).
        """
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _conv(fan_in: int, fan_out: int, *, size: int = 3, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(fan_in, fan_out, size, stride=stride, padding=size // 2), nn.ReLU()


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(4 if channels % 4 == 0 else 1, channels)


def _classify(channels: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)


_NETS: dict[str, tuple[Callable[[int, int, int], nn.Module], int]] = {
    "small": (_small, 8),
    "conv4": (_conv4, 32),
    "residual": (_residual, 16),
    "inception": (_inception, 16),
}
