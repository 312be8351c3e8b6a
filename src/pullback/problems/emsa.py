"""E-MSA, the extended method of successive approximations (Li, Chen, Tai, E, JMLR 18(165), 2018).

A network is a control problem x_{l+1} = f_l(x_l, w_l). With the costates p_l, which are minus the gradient of the loss
of a sample, each layer has the Hamiltonian H_l(x, p, w) = p . f_l(x, w), and Pontryagin's principle says that the
optimal weights maximise it, layer by layer. Maximising at the states and costates of the present weights diverges as
soon as the states move, so the paper holds both equations with a penalty (its augmented Hamiltonian, here in discrete
time, mean over the samples):

    A_l(w) = mean_i [ H_l - rho/2 |x_{l+1} - f_l(x_l, w)|^2 - rho/2 |p_l - grad_x H_l|^2 ]

At the present weights both penalties and their gradients vanish, so the gradient of A_l is minus that of the loss: a
small inner budget or a large rho is gradient descent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_TRAINED = (nn.Linear, nn.Conv1d, nn.Conv2d)
_FREE = (
    nn.Tanh,
    nn.ReLU,
    nn.Sigmoid,
    nn.SiLU,
    nn.GELU,
    nn.Softplus,
    nn.ELU,
    nn.Identity,
    nn.Flatten,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
)


class ExtendedMSA:
    """Maximises the augmented Hamiltonian of every layer at once, for chains of linear layers and convolutions.

    States and costates are those of the training loop's own passes. A stage is a layer with weights and whatever
    follows it up to the next one. The input is given, so the first stage has no costate to keep.

    Args:
        model: An ``nn.Sequential`` of linear layers, convolutions and modules without weights.
        rho: Weight of both penalties, 0 or more; 0 with L-BFGS is the unstable plain method.
        inner: Iterations of the maximiser per step and layer.
        maximiser: "lbfgs", with a line search, or "gradient", steps of `inner_lr` uphill.
        inner_lr: Step of "gradient".
        costate: Whether the penalty on the costates is there.

    Raises:
        ValueError: If the model is something else, or an option makes no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rho: float = 1.0,
        inner: int = 5,
        maximiser: str = "lbfgs",
        inner_lr: float = 0.1,
        costate: bool = True,
    ) -> None:
        if not (rho >= 0 and inner >= 1 and inner_lr > 0):
            raise ValueError(f"rho is {rho}, inner {inner}, inner_lr {inner_lr}; give rho >= 0, the others above 0.")
        if maximiser not in ("lbfgs", "gradient"):
            raise ValueError(f"maximiser cannot be {maximiser!r}; give lbfgs or gradient.")
        self.rho, self.inner, self.maximiser, self.inner_lr, self.costate = rho, inner, maximiser, inner_lr, costate
        self.stages = _stages(model)
        # x_0 .. x_L of the last training pass; those the network made keep their gradients.
        self._states: list[Tensor] = []
        self._busy = False
        # The model calls the modules and not our stages, so it is they that are watched.
        self._hooks = [
            self.stages[0][0].register_forward_pre_hook(self._begin),
            *(stage[-1].register_forward_hook(self._note) for stage in self.stages),
        ]

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for stage in self.stages:
            stage.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves all layers, each by its own maximisation at the states and costates of the last passes.

        Args:
            closure: Computes the loss and the gradients, or None if that has been done.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: If there was no forward and backward pass since the last step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if len(self._states) != len(self.stages) + 1 or self._states[-1].grad is None:
            raise RuntimeError("e-msa has no states and costates; call the model and backward() before step().")
        rows = len(self._states[0])
        # The loss is a mean over the samples, so the gradient of one sample's loss is `rows` times what arrives.
        costates = [None if x.grad is None else -rows * x.grad for x in self._states]
        states = [x.detach() for x in self._states]
        self._busy = True
        try:
            for k, stage in enumerate(self.stages):
                after = costates[k + 1]
                assert after is not None
                before = costates[k] if k and self.costate else None
                self._maximise(stage, states[k], states[k + 1], before, after)
        finally:
            self._states, self._busy = [], False
        return loss

    def close(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def augmented(self, stage: nn.Module, x: Tensor, x_next: Tensor, p: Tensor | None, p_next: Tensor) -> Tensor:
        """The augmented Hamiltonian of a stage at its present weights.

        Args:
            stage: The map f.
            x: States in front of it, shape (N, ...).
            x_next: States behind it, shape (N, ...).
            p: Costates in front of it, of the shape of `x`; None for no penalty on them.
            p_next: Costates behind it, of the shape of `x_next`.

        Returns:
            A scalar, differentiable in the weights.
        """
        x = x.detach().requires_grad_(p is not None)
        reached = stage(x)
        hamiltonian = (p_next * reached).sum()
        value = hamiltonian - 0.5 * self.rho * (x_next - reached).square().sum()
        if p is not None:
            (slope,) = torch.autograd.grad(hamiltonian, x, create_graph=True)
            value = value - 0.5 * self.rho * (p - slope).square().sum()
        mean: Tensor = value / len(x)
        return mean

    def _maximise(self, stage: nn.Module, x: Tensor, x_next: Tensor, p: Tensor | None, p_next: Tensor) -> None:
        weights = list(stage.parameters())

        def descend() -> Tensor:
            loss = -self.augmented(stage, x, x_next, p, p_next)
            for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                # That of a convolution may lie in another order, which L-BFGS refuses.
                weight.grad = slope.contiguous()
            return loss.detach()

        with torch.enable_grad():
            if self.maximiser == "lbfgs":
                torch.optim.LBFGS(weights, max_iter=self.inner, line_search_fn="strong_wolfe").step(descend)
                return
            uphill = torch.optim.SGD(weights, lr=self.inner_lr)
            for _ in range(self.inner):
                uphill.step(descend)

    def _begin(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and not self._busy:
            self._states = [args[0].detach()]

    def _note(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled() and not self._busy and self._states:
            output.retain_grad()
            self._states.append(output)


def _stages(model: nn.Module) -> list[nn.Sequential]:
    """The layers with weights, each with the modules that follow it; what stands in front belongs to the first."""
    if type(model) is not nn.Sequential:
        raise ValueError(f"e-msa is for nn.Sequential models, not {type(model).__name__}; use another optimizer.")
    groups: list[list[nn.Module]] = [[]]
    trained = 0
    for name, module in model.named_children():
        if not isinstance(module, (*_TRAINED, *_FREE)) or getattr(module, "inplace", False):
            raise ValueError(f"e-msa has no stage for {name} ({module}); use another optimizer or module.")
        if isinstance(module, _TRAINED):
            trained += 1
            if trained > 1:
                groups.append([])
        groups[-1].append(module)
    modules = list(model)
    weights = [weight for module in modules for weight in module.parameters()]
    if not trained or len(set(map(id, modules))) < len(modules) or len(set(map(id, weights))) < len(weights):
        raise ValueError("e-msa needs layers with weights, none of them used twice; use another optimizer.")
    if not all(weight.requires_grad for weight in weights):
        raise ValueError("e-msa trains every layer, and some weights are frozen; use another optimizer.")
    return [nn.Sequential(*group) for group in groups]
