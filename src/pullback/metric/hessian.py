"""The Hessian in the prediction of any loss, as a metric."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pullback.errors import MetricError
from pullback.metric.base import OutputMetric

Loss = Callable[[Tensor, Tensor], Tensor]


class LossHessian(OutputMetric):
    r"""Hessian :math:`G_n = \nabla^2_z\, w_n \phi(z_n, y_n)` of any twice differentiable loss, by torch.func.

    All samples are differentiated at once, one Hessian-vector product per output number; the square root is
    taken in each sample's eigenbasis. Directions without curvature have no column.

    Args:
        loss: function of prediction and target that returns losses per sample, shape (N,), weighted by
            ``scale`` and ``reduction``; or a criterion module, which brings its own weights and reduction;
            None takes the criterion of the optimizer.
        project: what becomes of negative eigenvalues: refused (False) or replaced by zero (True). In their
            directions the gradient then stays in the remainder, where the mass mu alone limits the step.
        scale: as in :class:`~pullback.metric.OutputMetric`.
        reduction: likewise.

    Attributes:
        clamped: negative eigenvalues that were replaced in the last factor.
    """

    own_weights = True

    def __init__(
        self, loss: Loss | None = None, *, project: bool = False, scale: float = 1.0, reduction: str = "mean"
    ) -> None:
        super().__init__(scale=scale, reduction=reduction)
        if loss is not None and not callable(loss):
            raise TypeError(f"LossHessian takes a loss function or criterion, got {loss!r}.")
        self.loss = loss
        self.project = bool(project)
        self.clamped = 0
        self._kept: tuple[tuple[Tensor | None, ...], int, tuple[Tensor, Tensor]] | None = None

    def bind(self, loss: Loss) -> None:
        """Take ``loss`` as the one to differentiate, if none was given."""
        if self.loss is None:
            self.loss = loss

    def cells(self, z: Tensor) -> tuple[int, ...]:
        """One cell per sample."""
        return (z.shape[0],)

    def default_weight(self, z: Tensor, samples: int) -> Tensor:
        """One weight for the loss as it is; a criterion has divided by its samples already."""
        reduced = isinstance(self.loss, nn.Module) or self.reduction == "sum"
        return z.new_tensor(self.scale if reduced else self.scale / samples)

    def columns(self, z: Tensor, samples: int) -> int:
        """The whole Hessian is formed, whatever its rank. See the base class."""
        return z.numel() // samples

    # -- the Hessian ---------------------------------------------------------------------------------------

    def _hessian(self, z: Tensor, weight: Tensor, samples: int, target: Tensor | None) -> Tensor:
        """Blocks of the samples, shape (N, d, d)."""
        loss = self.loss
        if loss is None or target is None:
            missing = "a loss" if loss is None else "the target"
            raise MetricError(f"LossHessian needs {missing}; give the optimizer the criterion that the loop calls.")

        def total(v: Tensor) -> Tensor:
            losses = loss(v, target)
            if not isinstance(loss, nn.Module) and (losses.shape != z.shape[:1] or weight.ndim > 1):
                raise MetricError(
                    f"The loss must return one number per sample, shape {tuple(z.shape[:1])}, with one weight "
                    f"each; got {tuple(losses.shape)} and weights {tuple(weight.shape)}. Sum over outputs only."
                )
            return (weight * losses).sum()

        pull = torch.func.vjp(torch.func.grad(total), z)[1]
        d = z.numel() // samples
        basis = torch.eye(d, dtype=z.dtype, device=z.device)[:, None].expand(d, samples, d).reshape(d, *z.shape)
        try:
            columns = torch.func.vmap(lambda v: pull(v)[0])(basis)
        except RuntimeError:  # no batching rule
            columns = torch.stack([pull(v)[0] for v in basis])
        if samples > 1:
            probe = torch.zeros_like(z).view(samples, d)
            probe[0] = torch.arange(1, d + 1, device=z.device).cos()  # in no loss's null space
            _refuse_mixing(pull(probe.view_as(z))[0].reshape(samples, d))
        H: Tensor = columns.reshape(d, samples, d).transpose(0, 1)
        return (H + H.transpose(1, 2)).div_(2)

    def _spectrum(self, z: Tensor, weight: Tensor, samples: int, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """Eigenvalues (N, r), zero where there is no curvature, and their vectors (N, d, r)."""
        # The coordinates are asked for right after the factor: the same numbers need no second eigenbasis.
        key = (z, weight, target)
        kept = self._kept
        if kept is not None and kept[1] == z._version and all(a is b for a, b in zip(key, kept[0], strict=True)):
            return kept[2]
        H = self._hessian(z, weight, samples, target)
        if not bool(torch.isfinite(H).all()):
            # The caller looks for this; an eigensolver would fail.
            return torch.full_like(H[:, :, 0], torch.nan), H
        values, vectors = torch.linalg.eigh(H)
        tolerance = 4 * H.shape[1] * torch.finfo(z.dtype).eps * float(values.abs().amax())
        negative = values < -tolerance
        self.clamped = int(negative.sum())
        if self.clamped and not self.project:
            raise MetricError(
                f"The Hessian of {_name(self.loss)} has negative eigenvalues, down to {float(values.amin()):.1e} "
                f"(largest {float(values.amax()):.1e}), for {int(negative.any(1).sum())} of {samples} samples; "
                "it is no metric. LossHessian(..., project=True) replaces them by zero."
            )
        values = torch.where(values > tolerance, values, torch.zeros_like(values))
        # Ascending: columns that are zero for every sample come first. One is kept if there is nothing else.
        rank = max(1, int((values > 0).any(0).sum()))
        found = values[:, -rank:], vectors[:, :, -rank:]
        self._kept = key, z._version, found
        return found

    # -- the metric ----------------------------------------------------------------------------------------

    def factor(self, z: Tensor, weight: Tensor, samples: int, target: Tensor | None = None) -> Tensor:
        """Eigenvectors times roots of eigenvalues. See the base class."""
        values, vectors = self._spectrum(z, weight, samples, target)
        S = vectors * values.sqrt()[:, None]
        return S.permute(2, 0, 1).reshape(-1, *z.shape)

    def coordinates(
        self, z: Tensor, weight: Tensor, costate: Tensor, samples: int, target: Tensor | None = None
    ) -> Tensor:
        """Least squares on the range. See the base class."""
        values, vectors = self._spectrum(z, weight, samples, target)
        inverse = torch.where(values == 0, torch.zeros_like(values), values.rsqrt())
        e0: Tensor = (costate.reshape(samples, 1, -1) @ vectors)[:, 0] * inverse
        return e0.T

    def __repr__(self) -> str:
        parts = [_name(self.loss)] if self.loss is not None else []
        if self.project:
            parts.append(f"project=True, clamped={self.clamped}")
        return f"LossHessian({', '.join([*parts, *filter(None, [self._options()])])})"


def _name(loss: object) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


def _refuse_mixing(column: Tensor) -> None:
    if bool((column[1:].abs() > 0).any()):
        raise MetricError(
            "The loss of one sample depends on the predictions for others, so its Hessian has no blocks per "
            "sample; give a loss that treats samples apart."
        )
