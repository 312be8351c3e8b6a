r"""The objects of the backward recursion: value functions, open-loop terms and feedback gains, module by module.

In R-space the value function in front of stage l, after all stages from l on have answered at best, is

.. math:: V_l(e) = \tfrac12 (e_0 + e)^\top \Gamma_l (e_0 + e), \qquad
          \Gamma_l^{-1} = \Gamma_{l+1}^{-1} + \tfrac1\mu U_l U_l^\top, \quad \Gamma_{L+1} = I,

hence :math:`\Gamma_l = \mu T_l^{-1}` (derived in docs/theory 9). With :math:`e = S^\top dx` at the tensors x across the
cut it has gradient :math:`V_x = S \Gamma_l e_0` and curvature :math:`V_{xx} = S \Gamma_l S^\top`; the best answer is

.. math:: \delta_l = k_l + K_l\, dx, \qquad k_l = -\tfrac1\mu U_l^\top \Gamma_l e_0, \quad
          K_l = -\tfrac1\mu U_l^\top \Gamma_l S^\top .

To first order nothing behind the cut answers: :math:`\Gamma_l = I`, :math:`V_x` is the costate of backpropagation and
:math:`k_l = -g_l / \mu` a step of gradient descent (Liu, Chen & Theodorou, arXiv 2510.14168, Theorem 1, in R-space).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pullback.control.route import CutPlan, Route
from pullback.curvature import Block, Linearisation, Partition, check_partition, divide
from pullback.curvature.cholesky import factorise
from pullback.errors import StepError
from pullback.manifolds import refuse_manifolds
from pullback.metric import Criteria, Metrics
from pullback.tape import Tape, Term


@dataclass
class BellmanStage:
    """One stage of the recursion. State deviations have shape (N, numbers of one sample), one per tensor.

    Attributes:
        names: names of its parameters.
        gamma: the value metric in R-space, shape (R, R).
        e0: the residual, shape (R,).
        mu: the damping.
    """

    names: tuple[str, ...]
    gamma: Tensor
    e0: Tensor
    mu: float
    _blocks: list[Block]
    _terms: list[Term]
    _plans: list[CutPlan]

    @property
    def state(self) -> list[Tensor]:
        """The tensors across the cut in front of it, as recorded; none in front of the first stage."""
        return [value for value, _ in self._carriers()]

    @property
    def value_gradient(self) -> list[Tensor]:
        """V_x at each tensor of :attr:`state`."""
        return self._pull(self.gamma @ self.e0)

    def value_curvature(self, dx: Sequence[Tensor]) -> list[Tensor]:
        """V_xx dx.

        Args:
            dx: a deviation of each tensor of :attr:`state`.
        """
        return self._pull(self.gamma @ self.deviation(dx))

    @property
    def open_loop(self) -> dict[str, Tensor]:
        """k_l: the step if nothing deviates, by parameter name."""
        return self._answer(self.gamma @ self.e0)

    def feedback(self, dx: Sequence[Tensor]) -> dict[str, Tensor]:
        """K_l dx: what a deviation adds to the step, by parameter name.

        Args:
            dx: a deviation of each tensor of :attr:`state`.
        """
        return self._answer(self.gamma @ self.deviation(dx))

    def value(self, e: Tensor | None = None) -> float:
        """V_l(e), the quadratic model's loss to go (beside what no step can change).

        Args:
            e: deviation in R-space, shape (R,); None for none.
        """
        residual = self.e0 if e is None else self.e0 + e
        return 0.5 * float(residual @ (self.gamma @ residual))

    def deviation(self, dx: Sequence[Tensor]) -> Tensor:
        """S^T dx: a deviation of the state in R-space, shape (R,).

        Args:
            dx: a deviation of each tensor of :attr:`state`.
        """
        out = torch.zeros_like(self.e0)
        carriers = self._carriers()
        for (value, rows), d in zip(carriers, dx, strict=True):
            if d.shape != value.shape:
                raise ValueError(f"A deviation has shape {tuple(d.shape)}, the tensor {tuple(value.shape)}.")
            for start, S in rows:
                part = torch.einsum("and,nd->an", S, d).reshape(-1)
                out[start : start + part.shape[0]] += part
        return out

    def _pull(self, v: Tensor) -> list[Tensor]:
        out = []
        for value, rows in self._carriers():
            total = torch.zeros_like(value)
            for start, S in rows:
                own = v[start : start + S.shape[0] * S.shape[1]].view(S.shape[:2])
                total += torch.einsum("and,an->nd", S, own)
            out.append(total)
        return out

    def _answer(self, v: Tensor) -> dict[str, Tensor]:
        pieces = [piece for block in self._blocks for piece in block.unpack(-block.rmatvec(v) / self.mu)]
        return dict(zip(self.names, pieces, strict=True))

    def _carriers(self) -> list[tuple[Tensor, list[tuple[int, Tensor]]]]:
        """Tensors across the cut, each with its remaining factors and where their rows begin."""
        out: list[tuple[Tensor, list[tuple[int, Tensor]]]] = []
        start = 0
        for term, plan in zip(self._terms, self._plans, strict=True):
            if plan.broken is not None:
                raise StepError(f"The state in front of {', '.join(self.names)} cannot be separated: {plan.broken}.")
            assert term.ports is not None
            out += [(value, [(start, S)]) for value, S in term.ports.carriers(plan.rank)]
            start += term.R
        return out


def bellman(
    model: nn.Module,
    criterion: Criteria,
    inputs: Tensor | tuple[Any, ...],
    target: Any,
    *,
    mu: float,
    order: Literal[1, 2] = 2,
    metric: Metrics = None,
    partition: Partition = "layerwise",
) -> list[BellmanStage]:
    """The Bellman recursion of a model at a batch; weights and gradients stay as they are.

    Args:
        model: the model.
        criterion: the loss module.
        inputs: what the model is called with, a tuple for several.
        target: what the criterion is called with after the prediction.
        mu: damping, positive.
        order: 2 for the recursion above; 1 for its first order, which is backpropagation.
        metric: overrides the metric the criterion resolves to; it must be exact.
        partition: modules that answer jointly.

    Returns:
        The stages in the order in which the model reaches them.

    Raises:
        ValueError: if ``mu`` is not positive or the metric is a sketch.
        ManifoldError: if a parameter lives on a manifold.
    """
    if not mu > 0:
        raise ValueError(f"mu must be positive, got {mu}.")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 (backpropagation) or 2, got {order!r}.")
    refuse_manifolds("bellman", model)
    tape = Tape(model, criterion, metric, wiring="all")
    if not tape.metric.exact:
        raise ValueError("The recursion starts from e0, which a sampled metric does not have; give an exact metric.")
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        for p, _ in grads:
            p.grad = None
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        if not isinstance(criterion, nn.Module):
            raise TypeError("bellman takes one criterion module; for several heads give it their sum as a module.")
        criterion(model(*args), target).sum().backward()
        lin = Linearisation(tape.terms)
    finally:
        for p, grad in grads:
            p.grad = grad
        names = tape.names.full
        tape.close()
    groups = divide(lin.blocks, check_partition(partition), names)
    route = Route(lin.terms, groups)
    gamma = torch.eye(lin.R, dtype=lin.e0.dtype, device=lin.e0.device)
    tail = torch.zeros_like(gamma)
    stages = []
    for number in range(len(groups) - 1, -1, -1):
        blocks = groups[route.order[number]]
        if order == 2:
            for block in blocks:
                tail += block.gram()
            gamma = mu * factorise(tail, mu).inverse()
        own = tuple(names[id(p)] for block in blocks for p in block.params)
        stages.append(BellmanStage(own, gamma, lin.e0, mu, list(blocks), lin.terms, route.plans[number]))
    return stages[::-1]
