"""scipy.optimize.least_squares as a baseline: it solves all training data by itself and tells after each iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pullback.problems.errors import SpecError, missing_extra

# Relative difference of J^T r from autograd's gradient above which the samples cannot be apart.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


@runtime_checkable
class Solver(Protocol):
    """What the training loop asks of an optimizer that drives itself."""

    trials: int

    def solve(self, inputs: Tensor, targets: Tensor, scale: float, tick: Callable[[float], None]) -> None:
        """Trains until it is done or the callback raises.

        Args:
            inputs: All training inputs, shape (N, ...).
            targets: All training targets, shape (N, ...).
            scale: Factor on the criterion.
            tick: To be called after each iteration, with the loss there and the model's weights set.
        """


class LeastSquares:
    """scipy's trust-region solver on the residuals of all training data; a step is one of its iterations.

    Args:
        model: The model; its samples must not depend on each other.
        criterion: ``nn.MSELoss``, mean or sum.
        method: "trf", "dogbox" or "lm" (MINPACK, wants at least as many residuals as parameters).
        x_scale: "unit", or "jac" for scales from the columns of the Jacobian, as Marquardt's.

    Raises:
        ValueError: If the criterion is another, or an option is none of these.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, *, method: str = "trf", x_scale: str = "unit") -> None:
        if type(criterion) is not nn.MSELoss or criterion.reduction == "none":
            raise ValueError(
                f"it solves least squares alone and the criterion is {type(criterion).__name__}; "
                "choose a problem whose criterion is MSELoss."
            )
        if method not in ("trf", "dogbox", "lm") or x_scale not in ("unit", "jac"):
            raise ValueError(f"method={method}, x_scale={x_scale}; give trf, dogbox or lm, and unit or jac.")
        self.model, self.criterion = model, criterion
        self.method, self.x_scale = method, 1.0 if x_scale == "unit" else x_scale
        self.trials = 0

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self.model.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Does nothing but refuse: the solver drives itself.

        Args:
            closure: Not used.

        Raises:
            SpecError: Always.
        """
        raise SpecError("least-squares drives itself; call solve.")

    def solve(self, inputs: Tensor, targets: Tensor, scale: float, tick: Callable[[float], None]) -> None:
        """Runs scipy's solver to its end, which the callback may bring about by raising.

        Args:
            inputs: All training inputs, shape (N, ...).
            targets: All training targets, shape (N, ...), of the shape of the model's outputs.
            scale: Factor on the criterion.
            tick: Called after each iteration, with the loss there and the model's weights set.

        Raises:
            ValueError: If the model mixes samples.
        """
        require_scipy()
        from scipy.optimize import least_squares
        from threadpoolctl import threadpool_limits

        parameters = [p for p in self.model.parameters() if p.requires_grad]
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        size = targets.numel() if self.criterion.reduction == "mean" else 1
        weight = (2 * scale / size) ** 0.5
        at: dict[str, Any] = {"residual": None, "jacobian": None, "loss": 0.0}

        def put(x: Any) -> None:
            with torch.no_grad():
                vector_to_parameters(torch.as_tensor(x, dtype=parameters[0].dtype), parameters)

        def tell(x: Any) -> None:
            if not (x == at["residual"]).all():
                residuals(x)
            tick(at["loss"])

        def residuals(x: Any) -> Any:
            put(x)
            self.trials += 1
            with torch.no_grad():
                found = weight * (self.model(inputs) - targets).flatten().double()
            at.update(residual=x.copy(), loss=0.5 * float(found @ found))
            return found.numpy()

        def outputs(values: dict[str, Tensor], sample: Tensor) -> Tensor:
            found: Tensor = functional_call(self.model, values, (sample.unsqueeze(0),))
            return found.flatten()

        def jacobian(x: Any) -> Any:
            put(x)
            first = at["jacobian"] is None
            if not first:  # One Jacobian per iteration, at the weights that the iteration before it arrived at.
                tell(x)
            at["jacobian"] = x.copy()
            values = {name: p.detach() for name, p in zip(names, parameters, strict=True)}
            with torch.no_grad():
                parts = vmap(jacrev(outputs), in_dims=(None, 0))(values, inputs)
            rows = torch.cat([part.reshape(*part.shape[:2], -1) for part in parts.values()], 2).flatten(0, 1) * weight
            if first:
                self._check(rows, inputs, targets, scale, weight)
            return rows.double().numpy()

        start = parameters_to_vector(parameters).detach().double().numpy().copy()
        tiny = torch.finfo(torch.float64).eps
        with threadpool_limits(limits=torch.get_num_threads()):
            result = least_squares(
                residuals,
                start,
                jacobian,
                method=self.method,
                x_scale=self.x_scale,
                ftol=tiny,
                xtol=tiny,
                gtol=tiny,
                max_nfev=10**9,
            )
        if not (result.x == at["jacobian"]).all():
            put(result.x)
            tell(result.x)

    def _check(self, rows: Tensor, inputs: Tensor, targets: Tensor, scale: float, weight: float) -> None:
        """The gradient by the Jacobian must be autograd's, else the rows are not what the model does."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        with torch.enable_grad():
            outputs = self.model(inputs)
            loss = scale * self.criterion(outputs, targets)
            gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
        own = rows.T @ (weight * (outputs.detach() - targets)).flatten()
        if (own - gradient).norm() > _TOLERANCE.get(gradient.dtype, 1e-2) * (gradient.norm() + loss.detach()):
            raise ValueError("the model mixes samples, so that its Jacobian is not one of samples; use another.")


def require_scipy() -> None:
    """Checks that scipy is there.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import scipy.optimize  # noqa: F401
        import threadpoolctl  # noqa: F401
    except ImportError as error:
        raise missing_extra("the optimizer least-squares", "scipy", "problems") from error
