r"""Outputs of a model and their Jacobian :math:`D = \partial x / \partial \theta`, as rows of the tape.

The tape pulls a factor of the output metric back. With the identity as the factor its rows *are* the Jacobian of the
stacked outputs, so that :math:`D D^\top` comes from the same fast Grams as the optimizers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pullback.curvature import Block, blocks_of
from pullback.errors import CoverageError
from pullback.flow.errors import FlowError
from pullback.manifolds import refuse_manifolds
from pullback.metric import OutputMetric
from pullback.tape import Tape


class Jacobian:
    """D at one point, QN rows (output number first, then sample) and K columns, never formed unless asked for.

    Args:
        blocks: the rows of all trained parameters.
        z: the outputs there, in the model's own shape.
    """

    def __init__(self, blocks: Sequence[Block], z: Tensor) -> None:
        self.blocks = list(blocks)
        self.z = z
        self.rows = self.blocks[0].R
        self.columns = sum(block.n for block in self.blocks)

    def matvec(self, theta: Tensor) -> Tensor:
        """D theta, (K,) to (QN,)."""
        parts = theta.split([block.n for block in self.blocks])
        out = self.blocks[0].matvec(parts[0])
        for block, part in zip(self.blocks[1:], parts[1:], strict=True):
            out = out + block.matvec(part)
        return out

    def rmatvec(self, v: Tensor) -> Tensor:
        """D^T v, (QN,) to (K,)."""
        return torch.cat([block.rmatvec(v) for block in self.blocks])

    def gram(self) -> Tensor:
        """D D^T, (QN, QN)."""
        K = self.blocks[0].gram()
        for block in self.blocks[1:]:
            K += block.gram()
        return K

    def normal(self) -> Tensor:
        """D^T D, (K, K), for few parameters."""
        if len(self.blocks) == 1:
            return self.blocks[0].primal()
        D = self.dense()
        return D.T @ D

    def dense(self) -> Tensor:
        """D, (QN, K)."""
        return torch.cat([block.dense() for block in self.blocks], 1)

    @property
    def numbers(self) -> int:
        """Numbers of the dense D."""
        return self.rows * self.columns


class OutputSystem:
    """A model on fixed inputs, as a map from packed parameters to stacked outputs.

    Args:
        model: the model; its trained parameters are moved by :meth:`put`.
        inputs: what it is called with, one tensor or a tuple of tensors.
        metric: says which coordinates of the outputs are stacked; the identity for all of them.

    Raises:
        FlowError: if outputs change from call to call, or are not one floating tensor of finite numbers.
        CoverageError: if parameters cannot be given rows.
        ManifoldError: if one lives on a manifold.
    """

    def __init__(self, model: nn.Module, inputs: Tensor | tuple[Any, ...], metric: OutputMetric) -> None:
        self.model = model
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        refuse_manifolds("an adapted flow", model)
        self.tape = Tape(model, None, metric)
        self.evaluations = 0
        try:
            self._check()
            self.params: list[nn.Parameter] = [p for block in self.linearise().blocks for p in block.params]
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        z, again = self.outputs(), self.outputs()
        if not bool(torch.isfinite(z).all()):
            raise FlowError("The model's outputs are not finite; look for overflow in inputs or weights.")
        if not torch.equal(z, again):
            raise FlowError("The model's outputs change from call to call (dropout?); call model.eval() first.")

    def outputs(self) -> Tensor:
        """The outputs at the present weights, in the model's own shape, without a graph."""
        with torch.no_grad(), self.tape.recorder.paused():
            z = self.model(*self.inputs)
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise FlowError(f"A flow needs a model that returns one floating tensor, got {type(z).__name__}.")
        return z

    def linearise(self) -> Jacobian:
        """D at the present weights.

        Raises:
            FlowError: if something there is not finite.
        """
        self.evaluations += 1
        self.tape.clear()
        with torch.enable_grad():
            z = self.model(*self.inputs)
            if not z.requires_grad:
                raise FlowError("No parameter of the model requires grad; there is nothing to move.")
            # The hook at the output is all that is wanted of this backward pass: it stops where it starts.
            torch.autograd.grad(z, z, torch.ones_like(z))
        if not self.tape.finite or not bool(torch.isfinite(z).all()):
            raise FlowError("The model's outputs or their derivatives are not finite.")
        if not self.tape.terms:
            raise CoverageError("No call of the model was seen; a compiled model must be given as the original.")
        return Jacobian(blocks_of(self.tape.terms), z.detach())

    def get(self) -> Tensor:
        """The trained parameters, packed, (K,)."""
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def put(self, theta: Tensor) -> None:
        """Set the trained parameters from a packed vector (K,)."""
        with torch.no_grad():
            for p, part in zip(self.params, theta.split([p.numel() for p in self.params]), strict=True):
                p.copy_(part.view_as(p))

    def pull(self, cotangent: Tensor) -> Tensor:
        """D^T v by one ordinary backward pass, v in the shape of the outputs; packed (K,)."""
        with torch.enable_grad(), self.tape.recorder.paused():
            z = self.model(*self.inputs)
            grads = torch.autograd.grad(z, self.params, cotangent.view_as(z), allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, grads, strict=True)]
        return torch.cat([g.reshape(-1) for g in pieces])

    def close(self) -> None:
        """Take the hooks off the model."""
        self.tape.close()
