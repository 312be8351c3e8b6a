"""A model and its loss as a function of one packed vector, whole and sample by sample."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from pullback.stability.errors import StabilityError
from pullback.stability.norms import chain_norms, is_chain
from pullback.tape.recorder import Hook

#: Inputs and targets, one row per sample.
Data = tuple[Tensor, Tensor]

_CHUNK = 2**24


class Objective:
    r"""The loss :math:`L(\theta) = \tfrac1n \sum_i l_i(\theta) + \tfrac\xi2 |\theta|^2` of a model.

    It is evaluated on copies of model and criterion made here, so that no optimizer's tape takes part: what is changed
    later, other than weights, is not seen.

    Args:
        model: the model; the parameters that require grad are packed in the order of ``named_parameters``.
        criterion: a loss module that takes (prediction, target) and averages; of one sample it gives l_i.
        decay: the weight decay xi, which belongs to the loss and to no sample.

    Attributes:
        model: the copy that is evaluated.
        criterion: likewise.
        params: the trained parameters of the model that was given.
        names: names of the packed parameters.
        size: K, numbers packed.
        modules: where the parameters of each module lie in the packed vector, by the module's name.

    Raises:
        StabilityError: if the criterion does not average, the decay is negative, or no parameter requires grad.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, *, decay: float = 0.0) -> None:
        reduction = getattr(criterion, "reduction", "mean")
        if reduction != "mean":
            raise StabilityError(f"The criterion has reduction={reduction!r}, samples are averaged here; take 'mean'.")
        if not decay >= 0:
            raise StabilityError(f"decay is {decay}; give zero or a positive number.")
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise StabilityError("No parameter of the model requires grad; there is nothing to train.")
        self.decay = decay
        self.model, self.criterion = quiet(model), quiet(criterion)
        self.params = list(named.values())
        self.names = list(named)
        self.sizes = [p.numel() for p in self.params]
        self.size = sum(self.sizes)
        self.modules: dict[str, Tensor] = {}
        start = 0
        for name, n in zip(self.names, self.sizes, strict=True):
            owner = name.rpartition(".")[0] or "(model)"
            here = torch.arange(start, start + n, device=self.params[0].device)
            self.modules[owner] = torch.cat([self.modules[owner], here]) if owner in self.modules else here
            start += n

    def get(self) -> Tensor:
        """The weights of the model that was given, packed, (K,)."""
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def put(self, theta: Tensor) -> None:
        """Set the weights of the model that was given from a packed vector (K,)."""
        with torch.no_grad():
            for p, part in zip(self.params, self.unpack(theta).values(), strict=True):
                p.copy_(part)

    def moved(self, theta: Tensor) -> nn.Module:
        """The copy of the model, its weights set to a packed vector (K,)."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, part in self.unpack(theta).items():
                own[name].copy_(part)
        return self.model

    def unpack(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of a packed vector (K,) in the parameters' shapes, by name.

        Raises:
            StabilityError: if the vector has another length.
        """
        if theta.shape != (self.size,):
            raise StabilityError(f"A packed vector of this model has shape ({self.size},), got {tuple(theta.shape)}.")
        parts = theta.split(self.sizes)
        return {name: part.view_as(p) for name, part, p in zip(self.names, parts, self.params, strict=True)}

    def pack_gradient(self) -> Tensor:
        """The gradients in ``p.grad``, packed, (K,).

        Raises:
            StabilityError: if a parameter has none.
        """
        missing = [name for name, p in zip(self.names, self.params, strict=True) if p.grad is None]
        if missing:
            raise StabilityError(f"'{missing[0]}' has no gradient; call backward() on the loss first.")
        return torch.cat([p.grad.detach().reshape(-1) for p in self.params if p.grad is not None])

    def loss(self, theta: Tensor, data: Data) -> float:
        """L at packed weights."""
        with torch.no_grad():
            return float(self._loss(theta, data))

    def gradient(self, theta: Tensor, data: Data) -> Tensor:
        """The gradient of L at packed weights, (K,).

        Raises:
            StabilityError: if it is not finite.
        """
        return self.loss_and_gradient(theta, data)[1]

    def loss_and_gradient(self, theta: Tensor, data: Data) -> tuple[float, Tensor]:
        """L and its gradient (K,) in one pass; errors as :meth:`gradient`."""
        with torch.enable_grad():
            at = theta.detach().requires_grad_()
            value = self._loss(at, data)
            (g,) = torch.autograd.grad(value, at)
        if not bool(torch.isfinite(g).all()):
            raise StabilityError("A gradient is not finite; look for bad data, or take shorter steps.")
        return float(value.detach()), g

    def losses(self, theta: Tensor, data: Data) -> Tensor:
        """The losses l_i of single samples, without decay, (n,).

        Raises:
            StabilityError: if the model mixes samples (BatchNorm in training).
        """
        self._check_apart()
        with torch.no_grad():
            out: Tensor = vmap(self._sample, (None, 0, 0))(self.unpack(theta), *data)
        return out

    def gradients(self, theta: Tensor, data: Data) -> Tensor:
        """The gradients of the l_i, without decay, (n, K)."""
        return torch.cat([part.clone() for part in self._rows(theta, data)])

    def gradient_norms(self, theta: Tensor, data: Data) -> Tensor:
        """The norms of the gradients of the l_i, (n,): by one backward pass for a chain, else in pieces that fit."""
        if is_chain(self.model, data[0]):
            return chain_norms(self.moved(theta), self.criterion, *data)
        return torch.cat([torch.linalg.vector_norm(part, dim=1) for part in self._rows(theta, data)])

    def _check_apart(self) -> None:
        for name, part in self.model.named_modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
                raise StabilityError(
                    f"'{name}' is BatchNorm in training, which mixes samples, so that no sample has a loss of its own; "
                    "call model.eval() first, or take LayerNorm."
                )

    def _rows(self, theta: Tensor, data: Data) -> list[Tensor]:
        self._check_apart()
        step = max(1, _CHUNK // self.size)
        per_sample = vmap(grad(self._packed_sample), (None, 0, 0))
        pieces = zip(data[0].split(step), data[1].split(step), strict=True)
        return [per_sample(theta.detach(), x, y) for x, y in pieces]

    def _packed_sample(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self._sample(self.unpack(theta), x, y)

    def _sample(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        z = functional_call(self.model, params, (x[None],))
        value: Tensor = self.criterion(z, y[None])
        return value

    def _loss(self, theta: Tensor, data: Data) -> Tensor:
        z = functional_call(self.model, self.unpack(theta), (data[0],))
        value: Tensor = self.criterion(z, data[1])
        return value + 0.5 * self.decay * (theta @ theta) if self.decay else value


def quiet(module: nn.Module) -> nn.Module:
    """A copy without gradients and without hooks of this library."""
    out = copy.deepcopy(module)
    for part in out.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[key]
    for p in out.parameters():
        p.grad = None
    return out


def check_data(data: Data, least: int = 2) -> Data:
    """Data with as many targets as inputs, at least two samples, all numbers finite.

    Raises:
        StabilityError: if they are not.
    """
    x, y = data
    if len(x) != len(y):
        raise StabilityError(f"There are {len(x)} inputs and {len(y)} targets; give one target per input.")
    if len(x) < least:
        raise StabilityError(f"There are n = {len(x)} samples; replacing one of them needs n of at least {least}.")
    for name, part in (("inputs", x), ("targets", y)):
        if part.is_floating_point() and not bool(torch.isfinite(part).all()):
            raise StabilityError(f"The {name} hold numbers that are not finite; clean the data first.")
    return data
