r"""A module at a point: its linearisation as operators, nothing formed.

.. math:: dy = A\, dx + B\, d\theta, \qquad (A^\top dy,\; B^\top dy)

For a leaf by Jacobian-vector and vector-Jacobian products of its forward; for a composite by the chain rule of its
parts.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pullback.errors import MixingError
from pullback.modules.errors import CompositionError
from pullback.modules.pulled import PulledBack
from pullback.tape.functional import called, places_of

if TYPE_CHECKING:
    from pullback.modules.base import RiemannianModule

#: a number per parameter, by the parameter's id: shared ones are met several times
ById = Mapping[int, Tensor]


class Local(ABC):
    """The linearisation of a module at a batch of states.

    States have their samples along the first axis, (N, *state). Changes of parameters go by name; those that are
    left out are zero.

    Args:
        module: the module; its parameters must not be moved while this is in use.
        x: the states it is given, (N, *in).
        y: the states it returns, (N, *out).
    """

    def __init__(self, module: RiemannianModule, x: Tensor, y: Tensor) -> None:
        self.module = module
        self.x = x
        self.y = y

    # -- operators ---------------------------------------------------------------------------------------

    def A(self, dx: Tensor) -> Tensor:
        """A dx: (N, *in) to (N, *out)."""
        return self.push(self._like(dx, self.x, "state"), {})

    def At(self, dy: Tensor) -> Tensor:
        """A^T dy: (N, *out) to (N, *in)."""
        return self.pull(self._like(dy, self.y, "output"))[0]

    def B(self, dtheta: Mapping[str, Tensor]) -> Tensor:
        """B dtheta: changes by parameter name to (N, *out).

        Raises:
            CompositionError: if a name or a shape is none of the module's.
        """
        return self.push(torch.zeros_like(self.x), self._ids(dtheta))

    def Bt(self, dy: Tensor) -> dict[str, Tensor]:
        """B^T dy: (N, *out) to a tensor per trained parameter, by name."""
        found = self.pull(self._like(dy, self.y, "output"))[1]
        named = self.module.trained()
        return {name: found[id(p)] if id(p) in found else torch.zeros_like(p) for name, p in named.items()}

    def pull_back(self, factor: Tensor | None = None, *, matrix: Tensor | None = None) -> PulledBack:
        r"""Pull a metric of the output back: the factor at the input, and the rows U of the parameters.

        .. math:: S_{\text{in}} = A^\top S, \qquad U_{(a,n)} = B_n^\top s_{an}

        Args:
            factor: S with G = S S^T sample by sample, (r, N, *out): columns first. Nothing is divided by the number
                of samples; a factor of a mean loss carries its :math:`1/\sqrt N` already.
            matrix: G instead, symmetric and at least semidefinite: (d, d) or (N, d, d), d numbers of an output.

        Raises:
            CompositionError: if neither or both are given, a shape does not fit, or G is not semidefinite.
            MixingError: if a sample's output depends on other samples, so that there are no rows.
        """
        if (factor is None) == (matrix is None):
            raise CompositionError("pull_back takes a factor S or matrix=G, one of them.")
        S = self._root(matrix) if factor is None else factor
        assert S is not None
        if S.shape[1:] != self.y.shape:
            raise CompositionError(
                f"A factor at outputs of shape {tuple(self.y.shape)} is (r, *that), got {tuple(S.shape)}."
            )
        into, found = self.rows(S)
        named = self.module.trained()
        N, r = self.y.shape[0], S.shape[0]
        parts = [
            found[id(p)].reshape(r, N, -1) if id(p) in found else S.new_zeros(r, N, p.numel()) for p in named.values()
        ]
        U = torch.cat(parts, 2).reshape(r * N, -1) if parts else S.new_zeros(r * N, 0)
        return PulledBack(into, U, {name: p.shape for name, p in named.items()}, self.module.mass_vector())

    # -- what leaves and composites supply, parameters by id -----------------------------------------------

    @abstractmethod
    def push(self, dx: Tensor, theta: ById) -> Tensor:
        """A dx + B dtheta."""

    @abstractmethod
    def pull(self, dy: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """A^T dy and B^T dy."""

    @abstractmethod
    def rows(self, S: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """A^T S of a factor (r, N, *out), and B_n^T s_an, (r, N, *parameter)."""

    # -- parts -------------------------------------------------------------------------------------------

    def _like(self, d: Tensor, at: Tensor, what: str) -> Tensor:
        if d.shape != at.shape:
            raise CompositionError(f"The change of a {what} has shape {tuple(d.shape)}, the {what} {tuple(at.shape)}.")
        return d

    def _ids(self, dtheta: Mapping[str, Tensor]) -> dict[int, Tensor]:
        named = self.module.trained()
        for name, d in dtheta.items():
            if name not in named or d.shape != named[name].shape:
                found = tuple(named[name].shape) if name in named else "no trained parameter"
                raise CompositionError(f"The change of '{name}' has shape {tuple(d.shape)}, the module has {found}.")
        return {id(named[name]): d for name, d in dtheta.items()}

    def _root(self, G: Tensor | None) -> Tensor:
        """A factor (d, N, *out) of a matrix."""
        assert G is not None
        N, d = self.y.shape[0], self.y[0].numel()
        if G.shape not in {(d, d), (N, d, d)}:
            raise CompositionError(f"G has shape {tuple(G.shape)}; for {d} outputs give ({d}, {d}) or ({N}, {d}, {d}).")
        if not bool(torch.isfinite(G).all()):
            raise CompositionError("G is not finite; look for overflow where it was made.")
        values, vectors = torch.linalg.eigh((G + G.mT) / 2)
        scale = float(values.abs().max())
        skew = float((G - G.mT).abs().max())
        small = torch.finfo(G.dtype).eps ** 0.5 * scale
        if not float(values.min()) >= -small or not skew <= small:
            raise CompositionError(
                f"G is not symmetric positive semidefinite: smallest eigenvalue {float(values.min()):.3g}, asymmetry "
                f"{skew:.3g}, largest eigenvalue {scale:.3g}; give (G + G^T) / 2 with its negative part removed."
            )
        root: Tensor = vectors * values.clamp_min(0).sqrt()[..., None, :]
        return root.expand(N, d, d).permute(2, 0, 1).reshape(d, *self.y.shape)


class LeafLocal(Local):
    """The linearisation of one module's forward.

    Args:
        module: what it is a linearisation of.
        inner: the module that is called.
        x: the states it is given.
    """

    def __init__(self, module: RiemannianModule, inner: nn.Module, x: Tensor) -> None:
        self._inner = inner
        self._params = {name: p for name, p in inner.named_parameters() if p.requires_grad}
        self._places = places_of(inner, self._params)
        self._values = {name: p.detach() for name, p in self._params.items()}
        x = x.detach()
        found = torch.func.vjp(self._forward, x, self._values)
        y: Tensor = found[0]
        if not isinstance(y, Tensor):
            raise CompositionError(
                f"{type(inner).__name__} returned {type(y).__name__}; a state map returns one tensor."
            )
        self._pull: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]] = found[1]
        super().__init__(module, x, y.detach())

    def _forward(self, x: Tensor, values: dict[str, Tensor]) -> Tensor:
        # Buffers are copied: running statistics must neither move nor be moved inside a transform.
        buffers = {name: b.clone() for name, b in self._inner.named_buffers()}
        out: Tensor = called(self._inner, self._places, values, (x,), None, buffers)
        return out

    def push(self, dx: Tensor, theta: ById) -> Tensor:
        """See the base class."""
        own = {
            name: theta[id(p)] if id(p) in theta else torch.zeros_like(p.detach()) for name, p in self._params.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when it loads its rules for jvp
            out: Tensor = torch.func.jvp(self._forward, (self.x, self._values), (dx, own))[1]
        return out

    def pull(self, dy: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """See the base class."""
        dx, own = self._pull(dy)
        return dx, {id(p): own[name] for name, p in self._params.items()}

    def rows(self, S: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """See the base class."""

        def one(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            found = torch.func.vjp(lambda x, p: self._forward(x[None], p)[0], x, self._values)
            dx, own = torch.func.vmap(found[1])(s)
            return found[0], dx, own

        try:
            y, dx, own = torch.func.vmap(one, in_dims=(0, 1), out_dims=(0, 1, 1))(self.x, S)
        except (RuntimeError, ValueError) as error:
            raise MixingError(
                f"{type(self._inner).__name__} cannot be differentiated one sample at a time ({error}); put BatchNorm "
                "in eval mode, or give it a forward that treats samples alike."
            ) from error
        apart = float((y - self.y).abs().max()) if y.numel() else 0.0
        if not apart <= torch.finfo(y.dtype).eps ** 0.5 * max(1.0, float(self.y.abs().max())):
            raise MixingError(
                f"{type(self._inner).__name__} gives a sample another output in a batch than alone (they differ by "
                f"{apart:.3g}), so the metric has no rows; put BatchNorm in eval mode or use GroupNorm."
            )
        return dx, {id(p): own[name] for name, p in self._params.items()}
