r"""The guaranteed rate of a composite from those of its parts (standard; Theory 15).

.. math:: x_1' = f_1(x_1) + G_{12} x_2, \qquad x_2' = f_2(x_2) + G_{21} x_1

In the metric diag(M1, k M2) the generalised Jacobian has :math:`-\lambda_1, -\lambda_2` or less on its diagonal, and
the couplings :math:`k^{-1/2} \Theta_1 G_{12} \Theta_2^{-1}` and :math:`k^{1/2} \Theta_2 G_{21} \Theta_1^{-1}` beside
it. The rules bound the largest eigenvalue of its symmetric part.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pullback.contraction.errors import ContractionError
from pullback.contraction.guarantee import Block, Guarantee, Reason

#: How far M1 G12 may be from -k (M2 G21)^T, relative to the larger of both.
SKEW = 1e-10
#: Where no margin is demanded, a hierarchy gives away this share of the smaller rate in modulus.
MARGIN = 0.05


def gain(to: Guarantee, coupling: Tensor, source: Guarantee) -> float:
    r"""The norm of a constant coupling in the metrics of the parts, :math:`|\Theta_{to} G \Theta_{source}^{-1}|_2`.

    Args:
        to: the part that is acted on, n numbers.
        coupling: G, (n, m).
        source: the part that acts, m numbers.

    Raises:
        ContractionError: if shapes differ or numbers are not finite.
    """
    G = _checked(to, coupling, source)
    B = torch.linalg.solve_triangular(source.theta, to.theta @ G, upper=True, left=False)
    return float(torch.linalg.matrix_norm(B, 2))


def parallel(a: Guarantee, b: Guarantee) -> Guarantee:
    """The sum of two vector fields on one state: in a common metric rates add up.

    Args:
        a: the first.
        b: the second; its metric is that of the first, up to a factor.

    Raises:
        ContractionError: if sizes or metrics differ.
    """
    if a.size != b.size:
        raise ContractionError(
            f"{a.name} has {a.size} numbers of state and {b.name} {b.size}; a sum of fields needs one state."
        )
    M, N = a.metric, b.metric
    scale = float((M * N).sum() / (N * N).sum())
    apart = float((M - scale * N).abs().amax() / M.abs().amax())
    if apart > SKEW:
        raise ContractionError(
            f"The metrics of {a.name} and {b.name} differ by {apart:.1e} of their size; rates add up only in a common "
            "metric: measure both in one."
        )
    rate = a.rate + b.rate
    text = f"parallel sum in a common metric: {a.rate:.6g} + {b.rate:.6g} = {rate:.6g}"
    return _joined(a, b, rate, text, a.blocks)


def hierarchy(
    up: Guarantee,
    down: Guarantee,
    coupling: Tensor | float,
    *,
    margin: float | None = None,
    eps: float | None = None,
) -> Guarantee:
    """A part that acts on another and is not acted on: any rate below the smaller one, in diag(M1, eps M2).

    Args:
        up: the part upstream, M1.
        down: the part downstream, M2.
        coupling: G21, (down, up), constant; or a bound of its gain in the metrics of the parts, assumed as stated.
        margin: how much of the smaller rate may be given away, positive; 5 % of its modulus by default.
        eps: the weight, in place of a margin.

    Raises:
        ContractionError: if shapes differ, the gain is not finite, or margin and eps are not positive.
    """
    gamma, said = _gain_of(down, coupling, up)
    least = min(up.rate, down.rate)
    if eps is None:
        given = MARGIN * abs(least) if margin is None else margin
        if not 0 < given < math.inf:
            raise ContractionError(f"The margin below the smaller rate is {given}; give a positive one, or eps.")
        # (l1 - r) (l2 - r) = eps gamma^2 / 4 at r = least - given.
        eps = 4 * (up.rate - least + given) * (down.rate - least + given) / gamma**2 if gamma else 1.0
    if not 0 < eps < math.inf:
        raise ContractionError(f"The weight eps of a hierarchy is {eps}; give a positive one.")
    rate = _two(up.rate, down.rate, eps * gamma**2 / 4)
    text = (
        f"hierarchy {up.name} -> {down.name}: rates {up.rate:.6g}, {down.rate:.6g}, gain {gamma:.6g}, eps {eps:.6g} "
        f"give {rate:.6g}"
    )
    return _joined(up, down, rate, text, up.blocks + down.weighed(eps), said)


def skew_feedback(a: Guarantee, b: Guarantee, G12: Tensor, G21: Tensor) -> Guarantee:
    """Two parts whose couplings cancel, M1 G12 = -k (M2 G21)^T: the smaller rate, in diag(M1, k M2).

    Args:
        a: the first part, M1.
        b: the second part, M2.
        G12: what the second does to the first, (a, b), constant.
        G21: what the first does to the second, (b, a), constant.

    Raises:
        ContractionError: if shapes differ, numbers are not finite, or no positive k satisfies the condition.
    """
    G12, G21 = _checked(a, G12, b), _checked(b, G21, a)
    left, right = a.metric @ G12, (b.metric @ G21).T
    square = float((right * right).sum())
    k = -float((left * right).sum()) / square if square else 0.0
    size = max(float(left.abs().amax()), k * float(right.abs().amax()))
    apart = float((left + k * right).abs().amax())
    if k <= 0 or apart > SKEW * size:
        raise ContractionError(
            f"The feedback of {a.name} and {b.name} is not skew: the best k is {k:.6g}, and M1 G12 differs from "
            f"-k (M2 G21)^T by {apart:.1e} at size {size:.1e}; k must be positive and the difference round-off."
        )
    rate = min(a.rate, b.rate)
    text = f"skew feedback with k = {k:.6g} (checked, difference {apart:.0e}): min({a.rate:.6g}, {b.rate:.6g})"
    return _joined(a, b, rate, text, a.blocks + b.weighed(k))


def small_gain(a: Guarantee, b: Guarantee, coupling12: Tensor | float, coupling21: Tensor | float) -> Guarantee:
    """Two parts that act on each other, l1 l2 > g12 g21, in diag(M1, k M2) with k = g12 / g21.

    Args:
        a: the first part, M1.
        b: the second part, M2.
        coupling12: what the second does to the first: G12, (a, b), constant, or a bound of its gain, assumed as stated.
        coupling21: what the first does to the second, likewise, (b, a).

    Raises:
        ContractionError: if shapes differ, a gain is zero or not finite, a part does not contract, or the gains are
            too large.
    """
    g12, said12 = _gain_of(a, coupling12, b)
    g21, said21 = _gain_of(b, coupling21, a)
    if g12 == 0 or g21 == 0:
        raise ContractionError("One of the gains is zero, so there is no loop; this is a hierarchy.")
    if a.rate <= 0 or b.rate <= 0 or a.rate * b.rate <= g12 * g21:
        raise ContractionError(
            f"Small gain needs contracting parts and l1 l2 > g12 g21; here {a.rate:.6g} * {b.rate:.6g} = "
            f"{a.rate * b.rate:.6g} and {g12:.6g} * {g21:.6g} = {g12 * g21:.6g}. Weaken the coupling, or fit "
            "better metrics."
        )
    k, rate = g12 / g21, _two(a.rate, b.rate, g12 * g21)
    text = f"small gain: rates {a.rate:.6g}, {b.rate:.6g}, gains {g12:.6g}, {g21:.6g}, k = {k:.6g} give {rate:.6g}"
    return _joined(a, b, rate, text, a.blocks + b.weighed(k), said12 + said21)


def compose(
    a: Guarantee,
    b: Guarantee,
    G12: Tensor | None = None,
    G21: Tensor | None = None,
    *,
    margin: float | None = None,
) -> Guarantee:
    """Two parts and their constant couplings, by the rule that applies and gives the most.

    Args:
        a: the first part.
        b: the second part.
        G12: what the second does to the first, (a, b); None for nothing.
        G21: what the first does to the second, (b, a); None for nothing.
        margin: of a hierarchy, see :func:`hierarchy`.

    Raises:
        ContractionError: if shapes differ, numbers are not finite, or no rule applies; then with the reasons.
    """
    back = None if G12 is None or not bool((_checked(a, G12, b) != 0).any()) else G12
    forth = None if G21 is None or not bool((_checked(b, G21, a) != 0).any()) else G21
    if back is None and forth is None:
        rate = min(a.rate, b.rate)
        return _joined(a, b, rate, f"side by side, no coupling: min({a.rate:.6g}, {b.rate:.6g})", a.blocks + b.blocks)
    if back is None and forth is not None:
        return hierarchy(a, b, forth, margin=margin)
    if forth is None and back is not None:
        return _exchanged(hierarchy(b, a, back, margin=margin), b)
    assert back is not None
    assert forth is not None
    found, reasons = [], []
    for rule in (skew_feedback, small_gain):
        try:
            found.append(rule(a, b, back, forth))
        except ContractionError as error:
            reasons.append(str(error))
    if not found:
        raise ContractionError(f"No rule applies to {a.name} and {b.name}. " + " ".join(reasons))
    return max(found, key=lambda guarantee: guarantee.rate)


def _two(l1: float, l2: float, square: float) -> float:
    """The smaller eigenvalue of [[l1, s], [s, l2]], s^2 given."""
    return (l1 + l2) / 2 - math.sqrt((l1 - l2) ** 2 / 4 + square)


def _checked(to: Guarantee, G: Tensor, source: Guarantee) -> Tensor:
    if G.shape != (to.size, source.size):
        raise ContractionError(
            f"The coupling from {source.name} to {to.name} has shape {tuple(G.shape)}; their interface is "
            f"({to.size}, {source.size})."
        )
    if not bool(torch.isfinite(G).all()):
        raise ContractionError(f"The coupling from {source.name} to {to.name} holds numbers that are not finite.")
    return G.detach().double()


def _gain_of(to: Guarantee, coupling: Tensor | float, source: Guarantee) -> tuple[float, tuple[str, ...]]:
    if isinstance(coupling, Tensor):
        return gain(to, coupling, source), ()
    gamma = float(coupling)
    if not 0 <= gamma < math.inf:
        raise ContractionError(
            f"The gain from {source.name} to {to.name} is {gamma}; give a finite bound, zero or more."
        )
    return gamma, (f"the gain from {source.name} to {to.name} is at most {gamma:.6g} in their metrics",)


def _joined(
    a: Guarantee, b: Guarantee, rate: float, text: str, blocks: tuple[Block, ...], said: tuple[str, ...] = ()
) -> Guarantee:
    """The composite; what was not certain of either part is not of the whole (the chances of failure add up)."""
    regions = [g.region for g in (a, b) if g.region]
    return Guarantee(
        rate,
        blocks,
        a.proved and b.proved,
        Reason(text, (a.how, b.how)),
        " and ".join(dict.fromkeys(regions)),
        max(0.0, a.confidence + b.confidence - 1),
        tuple(dict.fromkeys(a.assumptions + b.assumptions + said)),
    )


def _exchanged(composite: Guarantee, first: Guarantee) -> Guarantee:
    """The blocks of ``first``, which lead, moved behind the others, so that the state keeps its order."""
    cut = len(first.blocks)
    return replace(composite, blocks=composite.blocks[cut:] + composite.blocks[:cut])
