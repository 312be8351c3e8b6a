r"""The rate of a training system: metric gradient flow :math:`\theta' = -M^{-1} \nabla L` in a metric held fixed.

With M constant the generalised Jacobian is similar to :math:`-M^{-1/2} H M^{-1/2}`, H the Hessian of the loss, so that
the rate is the smallest eigenvalue of :math:`H y = \theta M y`: negative wherever the loss is not convex.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pullback.contraction.davidson import davidson
from pullback.contraction.errors import ContractionError
from pullback.contraction.hessian import System
from pullback.contraction.known import Known
from pullback.contraction.lanczos import lanczos
from pullback.contraction.record import DELTA, Rate, exact


def training_rate(
    model: nn.Module,
    criterion: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    targets: Any,
    *,
    mass: str | Mapping[str, float | Tensor] = "identity",
    pulled: float | None = None,
    method: str = "davidson",
    tol: float = 1e-6,
    evaluations: int = 200,
    start: Tensor | None = None,
    seed: int = 0,
) -> Rate:
    """The rate at the present weights, on one batch.

    Args:
        model: the model; in evaluation mode, or the loss must at least not change from call to call.
        criterion: a loss module whose output metric is known.
        inputs: what the model is called with, one tensor or a tuple.
        targets: what the criterion gets beside the prediction.
        mass: D: ``"identity"``, ``"module"``, ``"marquardt"`` or numbers by parameter name.
        pulled: None for the metric M = D; a number mu for M = mu D + U^T U at this point.
        method: ``"davidson"`` (preconditioned by the pulled-back metric), ``"lanczos"``, or ``"dense"``.
        tol: what may be missing, relative to the spectrum's larger end as far as it is known.
        evaluations: of the gradient that may be spent: a product with the Hessian counts two, a difference of
            gradients one, a column of the metric pulled back one.
        start: ``vectors`` of a rate nearby, to start from (davidson).
        seed: of a random start.

    Returns:
        The rate. Without convergence within ``evaluations`` it is unproved, and says what is missing.

    Raises:
        ContractionError: if loss or gradient are not finite, ``pulled`` is not positive, or the budget is below one
            product.
        MetricError: if the criterion's metric is not known.
        CoverageError: if a parameter cannot be given rows.
        ValueError: if the method is none of those.
    """
    if method not in ("davidson", "lanczos", "dense"):
        raise ValueError(f"method must be 'davidson', 'lanczos' or 'dense', got {method!r}.")
    if pulled is not None and not (pulled > 0 and math.isfinite(pulled)):
        raise ContractionError(
            f"The metric {pulled} D + U^T U is not positive definite in general; give a positive number as pulled."
        )
    system = System(model, criterion, inputs, targets, mass, pulled)
    known, product = system.known, system.product
    # One gradient for U, one whose graph exact products share; davidson counts that one itself.
    spent = 1 + known.columns
    if method == "dense":
        return _dense(product, known, spent + 1)
    budget = evaluations - spent
    if budget < 4:
        raise ContractionError(
            f"A budget of {evaluations} gradient evaluations leaves no product with the Hessian: the metric took "
            f"{spent}, and 4 more are the least; give more (evaluations=...)."
        )
    generator = torch.Generator().manual_seed(seed)
    if method == "lanczos":
        found = lanczos(
            lambda v: -known.half_solve(product(known.half_solve(v))), known.n, tol=tol, steps=(budget - 1) // 2,
            dtype=known.dtype, generator=generator,
        )  # fmt: skip
        return Rate(
            -(found.value + found.error), -found.above(DELTA), -found.value, found.residual, found.error,
            found.converged, False, 1 - DELTA, "lanczos", found.steps, spent + 1 + 2 * found.steps,
            found.vector[:, None],
        )  # fmt: skip
    if start is not None and (start.ndim != 2 or len(start) != known.n):
        raise ContractionError(f"The start has shape {tuple(start.shape)}; {known.n} parameters need ({known.n}, k).")
    drawn = torch.randn(known.n, 1, dtype=known.dtype, generator=generator)
    first = drawn if start is None else torch.cat([start.to(known.dtype), drawn], 1)
    # Differences of gradients in single precision have no digits to spare.
    rough = system.difference if known.dtype == torch.float64 else None
    low = davidson(
        rough, product, known.metric, known.solve_metric, known.precondition, first, tol=tol, scale=known.scale(),
        budget=budget, cost=2,
    )  # fmt: skip
    return Rate(
        low.value - low.error, -math.inf, low.value, low.residual, low.error, low.converged, False, None, "davidson",
        low.products, spent + low.spent, low.vectors,
    )  # fmt: skip


def _dense(product: Callable[[Tensor], Tensor], known: Known, spent: int) -> Rate:
    eye = torch.eye(known.n, dtype=known.dtype)
    H = torch.stack([known.half_solve(product(known.half_solve(row))) for row in eye])
    if not bool(torch.isfinite(H).all()):
        raise ContractionError("The Hessian is not finite; look for overflow in weights, inputs or targets.")
    return exact(float(torch.linalg.eigvalsh((H + H.T) / 2)[0]), known.n, spent + 2 * known.n)
