"""nn.Conv2d (one group): a linear layer on patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from pullback.tape.call import CallFactor
from pullback.tape.rules.outer import OuterRows, held


class Conv2dRows(OuterRows):
    """Rows of a convolution; the positions are the output pixels of every call.

    Patches are unfolded only for Grams and rows; products with vectors are convolutions.
    """

    rule = "conv2d"

    def __init__(
        self,
        module: nn.Conv2d,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        inputs: Sequence[Tensor],
        s: Tensor,
    ) -> None:
        super().__init__(weight, bias, s)
        self.module = module
        self.inputs = list(inputs)

    @property
    def width(self) -> int:
        """See the base class."""
        return self.module.weight[0].numel()

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Input with the padding that F.conv2d cannot do itself, and the padding left to do."""
        m = self.module
        if m.padding_mode != "zeros":
            return F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode), (0, 0)
        if isinstance(m.padding, str):
            left_right_top_bottom = m._reversed_padding_repeated_twice
            return F.pad(x, left_right_top_bottom), (0, 0)
        return x, (int(m.padding[0]), int(m.padding[1]))

    def input_rows(self, start: int, stop: int | None) -> Tensor:
        """See the base class."""
        m, out = self.module, []
        for x in self.inputs:
            padded, padding = self._padded(x[start:stop])
            patches = F.unfold(padded, m.kernel_size, m.dilation, padding, m.stride)
            out.append(patches.transpose(1, 2))
        return out[0] if len(out) == 1 else torch.cat(out, 1)

    def inner(self, other: OuterRows) -> Tensor:
        """See the base class."""
        left = self.input_rows(0, None).reshape(-1, self.width)
        right = left if other is self else other.input_rows(0, None).reshape(-1, self.width)
        return (left @ right.T).view(self.N, self.P, other.N, other.P)

    def push(self, weight: Tensor) -> Tensor:
        """See the base class."""
        m, out = self.module, []
        for x in self.inputs:
            padded, padding = self._padded(x)
            y = F.conv2d(padded, weight, None, m.stride, padding, m.dilation)
            out.append(y.flatten(2).transpose(1, 2))
        return out[0] if len(out) == 1 else torch.cat(out, 1)

    def pull(self, c: Tensor) -> Tensor:
        """See the base class."""
        m, total, start = self.module, None, 0
        for x in self.inputs:
            padded, padding = self._padded(x)
            size = [
                (padded.shape[2 + k] + 2 * padding[k] - m.dilation[k] * (m.kernel_size[k] - 1) - 1) // m.stride[k] + 1
                for k in (0, 1)
            ]
            part = c[:, start : start + size[0] * size[1]].transpose(1, 2).reshape(self.N, -1, *size)
            start += size[0] * size[1]
            grad = conv2d_weight(
                padded,
                list(m.weight.shape),
                part,
                m.stride,
                padding,
                m.dilation,
            )
            total = grad if total is None else total + grad
        assert isinstance(total, Tensor)
        return total.reshape(-1)

    def to(self, dtype: torch.dtype) -> Conv2dRows:
        """See the base class."""
        inputs = [x.to(dtype) for x in self.inputs]
        return Conv2dRows(self.module, self.weight, self.bias, inputs, self.s.to(dtype))


def conv2d_rows(module: nn.Conv2d, calls: Sequence[CallFactor], wanted: frozenset[str], N: int) -> Conv2dRows:
    """Rows of a convolution with one group; several calls are further positions.

    Args:
        module: the layer.
        calls: its calls in one term, each with a batch of N images.
        wanted: names of its parameters that take part.
        N: samples.
    """
    parts = [call.factor().flatten(3).transpose(2, 3) for call in calls]
    s = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    weight = held(module, "weight") if "weight" in wanted else None
    bias = held(module, "bias") if "bias" in wanted else None
    assert s.shape[1] == N
    return Conv2dRows(module, weight, bias, [call.input() for call in calls], s)
