"""How the window of a convolution moves: one description for one to three axes, forwards and transposed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True)
class Geometry:
    """Window, its steps, and what surrounds the image.

    Attributes:
        kernel: window size per axis.
        stride: step per axis.
        dilation: spacing inside the window per axis.
        pads: numbers added before and after, per axis.
        mode: what they are: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        groups: groups of channels that do not see each other.
        transposed: whether the module is the adjoint of the convolution described by the rest.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    mode: str
    groups: int
    transposed: bool

    @classmethod
    def of(cls, module: Conv) -> Geometry:
        """Read it off a module."""
        pads: list[tuple[int, int]] = []
        for axis, (k, d) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
            if isinstance(module.padding, str):
                total = d * (k - 1) if module.padding == "same" else 0
                pads.append((total // 2, total - total // 2))
            else:
                pads.append((int(module.padding[axis]),) * 2)
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        return cls(
            tuple(module.kernel_size),
            tuple(module.stride),
            tuple(module.dilation),
            tuple(pads),
            module.padding_mode,
            module.groups,
            transposed,
        )

    def _surrounded(self, x: Tensor) -> Tensor:
        if not any(any(pair) for pair in self.pads):
            return x
        last_first = [number for pair in reversed(self.pads) for number in pair]
        return F.pad(x, last_first, "constant" if self.mode == "zeros" else self.mode)

    def _native(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """Image and the padding left to the operation, which only knows zeros, alike on both sides."""
        if self.mode == "zeros" and all(before == after for before, after in self.pads):
            return x, [before for before, _ in self.pads]
        return self._surrounded(x), [0] * len(self.pads)

    def patches(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Windows of an image as columns.

        Args:
            x: images, shape (n, c, *axes).
            size: number of windows wanted along each axis (the output padding of a transposed convolution
                may leave room for more).

        Returns:
            Shape (n, groups, c / groups * window, windows).
        """
        k = len(self.kernel)
        v = self._surrounded(x)
        for axis in range(k):
            v = v.unfold(2 + axis, self.dilation[axis] * (self.kernel[axis] - 1) + 1, self.stride[axis])
            v = v.narrow(2 + axis, 0, size[axis])
        spread: tuple[Any, ...] = tuple(slice(None, None, d) for d in self.dilation)
        v = v[(..., *spread)]
        inner = v.permute(0, 1, *range(2 + k, 2 + 2 * k), *range(2, 2 + k))
        return inner.reshape(x.shape[0], self.groups, -1, math.prod(size))

    def _output_padding(self, x: Tensor, size: Sequence[int]) -> list[int]:
        if not self.transposed:
            return [0] * len(self.kernel)
        return [
            have - ((n - 1) * s - sum(pair) + d * (k - 1) + 1)
            for have, n, s, pair, d, k in zip(
                size, x.shape[2:], self.stride, self.pads, self.dilation, self.kernel, strict=True
            )
        ]

    def push(self, x: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
        """The module's output without bias for another weight.

        Args:
            x: inputs, shape (n, c, *axes).
            weight: shape of the module's weight.
            size: axes of the output.
        """
        x, padding = self._native(x)
        out: Tensor = torch.ops.aten.convolution(
            x, weight, None, self.stride, padding, self.dilation, self.transposed,
            self._output_padding(x, size), self.groups,
        )  # fmt: skip
        return out

    def pull(self, x: Tensor, c: Tensor, weight: Tensor) -> Tensor:
        """Gradient of <c, output> with respect to the weight, in its shape.

        Args:
            x: inputs, shape (n, channels, *axes).
            c: cotangent of the output, shape (n, output channels, *axes).
            weight: any tensor of the weight's shape.
        """
        x, padding = self._native(x)
        out: Tensor = torch.ops.aten.convolution_backward(
            c, x, weight, None, self.stride, padding, self.dilation, self.transposed,
            self._output_padding(x, c.shape[2:]), self.groups, [False, True, False],
        )[1]  # fmt: skip
        return out
