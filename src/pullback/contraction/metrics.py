r"""Metrics in which contraction is measured, :math:`M = \Theta^\top \Theta`, and when they are none.

A metric is ``None`` (identity), a symmetric positive definite matrix, a :class:`Factor`, a function of the state that
returns such a matrix, or :class:`Blocks` of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.contraction.errors import ContractionError

#: What is not symmetric beyond this share of the largest entry is not called so.
_SYMMETRIC = 1e-10


@dataclass(frozen=True)
class Factor:
    r"""A metric given by its factor.

    Attributes:
        theta: :math:`\Theta`, invertible, (n, n).
    """

    theta: Tensor


class Blocks:
    """A block-diagonal metric, diag(k_1 M_1, k_2 M_2, ...), each block at its own part of the state.

    Args:
        parts: size and metric of every block, in the order of the state.
        weights: k, positive; all one by default.

    Raises:
        ContractionError: if a weight is not positive, or there are not as many as blocks.
    """

    def __init__(self, parts: Sequence[tuple[int, Metric]], weights: Sequence[float] | None = None) -> None:
        self.parts = list(parts)
        self.weights = [1.0] * len(self.parts) if weights is None else [float(k) for k in weights]
        if len(self.weights) != len(self.parts):
            raise ContractionError(
                f"There are {len(self.parts)} blocks and {len(self.weights)} weights; give one each."
            )
        for number, k in enumerate(self.weights):
            if not 0 < k < float("inf"):
                raise ContractionError(f"The weight of block {number} is {k}; weights of a metric are positive.")

    @property
    def size(self) -> int:
        """Numbers of the whole state."""
        return sum(size for size, _ in self.parts)

    @property
    def varies(self) -> bool:
        """Whether a block depends on the state."""
        return any(varies(metric) for _, metric in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        """The matrix at the state x, (n,) to (n, n)."""
        pieces = []
        for (size, metric), k, own in zip(
            self.parts, self.weights, x.split([size for size, _ in self.parts]), strict=True
        ):
            M = raw(metric, own)
            pieces.append(k * (torch.eye(size, dtype=x.dtype, device=x.device) if M is None else M))
        whole: Tensor = torch.block_diag(*pieces)
        return whole


#: See the head of this file.
Metric = Tensor | Factor | Blocks | Callable[[Tensor], Tensor] | None


def varies(metric: Metric) -> bool:
    """Whether it depends on the state."""
    if isinstance(metric, Blocks):
        return metric.varies
    return not (metric is None or isinstance(metric, Tensor | Factor))


def raw(metric: Metric, x: Tensor) -> Tensor | None:
    """M at the state x, unchecked, (n, n); None for the identity."""
    if metric is None:
        return None
    if isinstance(metric, Factor):
        M: Tensor = metric.theta.T @ metric.theta
        return M
    return metric if isinstance(metric, Tensor) else metric(x)


def matrix(metric: Metric, x: Tensor) -> Tensor | None:
    """M at the state x, checked, (n, n); None for the identity.

    Args:
        metric: the metric.
        x: the state, (n,).

    Raises:
        ContractionError: if it does not fit the state, is not symmetric, not finite, or not positive definite.
    """
    if isinstance(metric, Blocks) and metric.size != len(x):
        raise ContractionError(f"The blocks of the metric have {metric.size} numbers in all, the state {len(x)}.")
    M = raw(metric, x)
    if M is None:
        return None
    if M.shape != (len(x), len(x)):
        raise ContractionError(
            f"The metric has shape {tuple(M.shape)} and the state {tuple(x.shape)}; it must be ({len(x)}, {len(x)})."
        )
    return check(M.detach().to(x))


def check(M: Tensor) -> Tensor:
    """M, made exactly symmetric.

    Args:
        M: a matrix, (n, n).

    Raises:
        ContractionError: if it is not finite, not symmetric or not positive definite.
    """
    scale = M.abs().amax()
    if not bool(torch.isfinite(scale)):
        raise ContractionError("The metric holds numbers that are not finite.")
    apart = float((M - M.T).abs().amax())
    if apart > _SYMMETRIC * float(scale):
        raise ContractionError(
            f"The metric is not symmetric: entries differ by {apart:.1e} from the transposed ones; give (M + M.T) / 2."
        )
    M = (M + M.T) / 2
    if int(torch.linalg.cholesky_ex(M).info) != 0:
        least = float(torch.linalg.eigvalsh(M)[0])
        raise ContractionError(
            f"The metric is not positive definite: its smallest eigenvalue is {least:.6g}. Add a "
            "positive multiple of the identity, or fit one (fit_metric)."
        )
    return M


def factor(M: Tensor) -> Tensor:
    r"""The factor :math:`\Theta` (upper triangular) of a checked metric, (n, n)."""
    theta: Tensor = torch.linalg.cholesky(M).T
    return theta
