"""Parameters that cannot be given rows, in the care of an ordinary optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Fallback:
    """An optimizer for the strays, made when they are first met.

    Args:
        make: makes it from a list of parameters.
    """

    def __init__(self, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        self.make = make
        self.optimizer: torch.optim.Optimizer | None = None
        self.members: list[Tensor] = []

    def __contains__(self, p: object) -> bool:
        return any(p is member for member in self.members)

    def ids(self) -> set[int]:
        """Ids of its parameters."""
        return {id(p) for p in self.members}

    def step(self, strays: Sequence[Tensor]) -> None:
        """Step on the gradients of parameters; new ones join as a group of their own."""
        fresh = [p for p in strays if p not in self]
        if fresh:
            self.members += fresh
            if self.optimizer is None:
                self.optimizer = self.make(list(fresh))
            else:
                self.optimizer.add_param_group({"params": list(fresh)})
        assert self.optimizer is not None
        self.optimizer.step()

    def state(self, order: Sequence[int]) -> dict[str, Any]:
        """Members by their place in ``order`` (ids of all parameters), and the optimizer's own state."""
        if self.optimizer is None:
            return {"members": [], "state": None}
        place = {key: k for k, key in enumerate(order)}
        return {"members": [place[id(p)] for p in self.members], "state": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Continue from :meth:`state`."""
        if state["state"] is None:
            return
        self.members = [params[k] for k in state["members"]]
        sizes = [len(group["params"]) for group in state["state"]["param_groups"]]
        self.optimizer = self.make(self.members[: sizes[0]])
        start = sizes[0]
        for size in sizes[1:]:
            self.optimizer.add_param_group({"params": self.members[start : start + size]})
            start += size
        self.optimizer.load_state_dict(state["state"])
