"""Small networks for the embedded problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from pullback.problems.preparation import at_least


def seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """Makes a model maker that depends on the seed alone.

    Args:
        build: Builds the model with torch's global random numbers.

    Returns:
        A function of the seed; the caller's random state is left as it was.
    """

    def make_model(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return make_model


def hidden_widths(owner: str, width: int, depth: int | None = None) -> list[int]:
    """The hidden widths that the options ``width`` and ``depth`` describe.

    Args:
        owner: The problem, for the error message.
        width: The first hidden width.
        depth: Linear layers, all hidden ones `width` wide; None for three, the second hidden width half the first.

    Returns:
        One width per hidden layer.

    Raises:
        SpecError: If one of them is not positive.
    """
    at_least(owner, "width", width)
    return [width, max(1, width // 2)] if depth is None else [width] * (at_least(owner, "depth", depth) - 1)


def mlp(
    widths: Sequence[int], activation: Callable[[], nn.Module], dtype: torch.dtype = torch.float32
) -> nn.Sequential:
    """A multilayer perceptron, its last layer linear.

    Args:
        widths: Inputs, hidden widths, outputs.
        activation: Makes the module that follows each layer but the last.
        dtype: Floating dtype of the parameters.

    Returns:
        A model from (N, widths[0]) to (N, widths[-1]).
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, dtype=dtype), activation()]
    return nn.Sequential(*layers[:-1])
