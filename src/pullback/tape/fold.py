"""The third way to sweep: the batch repeated once per column, one forward and one backward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from pullback.tape import sweep
from pullback.tape.graph import Reached, reach
from pullback.tape.nest import mapped, tensors
from pullback.tape.recorder import Recorder
from pullback.tape.rules import sample_axis
from pullback.tape.term import LossUse


def can_fold(use: LossUse, found: Reached, model: nn.Module | None, N: int) -> bool:
    """Whether the batch may be repeated in one more forward pass, for a sweep in one backward pass.

    Args:
        use: the use of the loss.
        found: the calls that reach its prediction.
        model: the model, None if it is gone.
        N: samples.
    """
    if model is None or len(found.roots) != 1 or use.path is None:
        return False
    (root,) = found.roots
    # A module in training mode may write its buffers; a folded batch must leave no trace.
    pure = not any(m.training and any(b is not None for b in m._buffers.values()) for m in model.modules())
    return pure and root.rng is None and root.batch() == N and use.z.shape[0] % N == 0


def folded(model: nn.Module, recorder: Recorder, use: LossUse, found: Reached, S: Tensor) -> list[Tensor]:
    """Repeat the batch once per column in a new forward pass and sweep it in one backward pass.

    Args:
        model: the model.
        recorder: its recorder, paused.
        use: the use of the loss.
        found: the calls to sweep to.
        S: factor at the prediction, shape (r, B, *out).

    Returns:
        As :func:`pullback.tape.sweep.loop`.
    """
    path = use.path
    assert path is not None
    r, N = S.shape[0], path.root.batch()

    def repeated(t: Tensor) -> Tensor:
        return t.detach().repeat(r, *(1,) * (t.ndim - 1)) if t.ndim and t.shape[0] == N else t

    args, kwargs = mapped(repeated, (path.root.args, dict(path.root.kwargs)))
    recorder.enabled = True
    try:
        with torch.enable_grad(), path.root.context():
            z = path.follow(tensors(model(*args, **kwargs)))
    finally:
        recorder.enabled = False
    again = reach(get_gradient_edge(z), recorder.key).only({id(c.module) for c, _ in found.calls})
    if [c.module for c, _ in again.calls] != [c.module for c, _ in found.calls]:
        raise RuntimeError("the folded batch took another way through the model")
    flat = iter(sweep.loop(get_gradient_edge(z), again.edges, S.flatten(0, 1)[None]))
    out = []
    for call, edges in again.calls:
        for index in edges:
            axis = sample_axis(call.module, index)
            out.append(next(flat)[0].unflatten(axis, (r, -1)).movedim(axis, 0))
    return out
