"""A metric seen through a few random columns."""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.errors import MetricError
from pullback.metric.base import OutputMetric


class Sampled(OutputMetric):
    r"""Monte-Carlo factor of another metric: m columns :math:`s_k / \sqrt m` with :math:`E[s s^\top] = G`.

    Unbiased, :math:`E[S S^\top] = G`, with an error that falls as :math:`1/\sqrt m`; the gradient stays
    exact, only the metric is a sketch (theory 1). Columns are drawn from a generator of its own, so the
    user's random stream is left alone.

    Args:
        metric: the metric to sketch; None takes the one the criterion resolves to.
        m: number of columns.
        seed: seed of the generator.
    """

    exact = False

    def __init__(self, metric: OutputMetric | None = None, m: int = 1, *, seed: int = 0) -> None:
        if m < 1:
            raise MetricError(f"Sampled needs m >= 1 columns, got {m}.")
        if isinstance(metric, Sampled):
            raise MetricError("Sampled(Sampled(...)) sketches twice; give the inner metric and one m.")
        super().__init__()
        self.metric = metric
        self.m = int(m)
        self.seed = int(seed)
        self._generator: torch.Generator | None = None
        self._pending: Tensor | None = None

    def bind(self, metric: OutputMetric) -> None:
        """Take ``metric`` as the one to sketch, if none was given."""
        if self.metric is None:
            self.metric = metric

    @property
    def inner(self) -> OutputMetric:
        """The metric that is sketched.

        Raises:
            MetricError: if it is not known yet.
        """
        if self.metric is None:
            raise MetricError("Sampled() has no metric to sketch; pass one, as in Sampled(Categorical(), m=1).")
        return self.metric

    @property
    def own_weights(self) -> bool:  # type: ignore[override]  # read only here
        """As the inner metric's."""
        return self.inner.own_weights

    def cells(self, z: Tensor) -> tuple[int, ...]:
        """As the inner metric's."""
        return self.inner.cells(z)

    def columns(self, z: Tensor, samples: int) -> int:
        """M. See the base class."""
        del z, samples
        return self.m

    def default_weight(self, z: Tensor, samples: int) -> Tensor:
        """As the inner metric's."""
        return self.inner.default_weight(z, samples)

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of this metric on ``device``."""
        if self._generator is None or self._generator.device.type != device.type:
            self._generator = torch.Generator(device=device)
            self._generator.manual_seed(self.seed)
            if self._pending is not None:
                self._generator.set_state(self._pending)
                self._pending = None
        return self._generator

    def state(self) -> Tensor | None:
        """State of the generator, for checkpoints (None before its first use)."""
        return None if self._generator is None else self._generator.get_state()

    def load_state(self, state: Tensor | None) -> None:
        """Continue the stream of a checkpoint."""
        self._generator = None
        self._pending = state

    def factor(self, z: Tensor, weight: Tensor, samples: int, target: Tensor | None = None) -> Tensor:
        """M columns; positions of one sample share a column, which stays unbiased since draws differ."""
        del samples
        generator = self.generator(z.device)
        if self.m == 1:
            return self.inner.draw(z, weight, generator, target)[None]
        draws = [self.inner.draw(z, weight, generator, target) for _ in range(self.m)]
        return torch.stack(draws).mul_(self.m**-0.5)

    def coordinates(
        self, z: Tensor, weight: Tensor, costate: Tensor, samples: int, target: Tensor | None = None
    ) -> Tensor:
        """Zeros: the costate is not in the range of a sketch, so the whole gradient is remainder."""
        del weight, costate, target
        return z.new_zeros(self.m, samples)

    def __repr__(self) -> str:
        inner = "" if self.metric is None else f"{self.metric!r}, "
        return f"Sampled({inner}m={self.m})"
