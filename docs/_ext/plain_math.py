"""Docstrings for the API page: their roles and formulas as plain text that needs no script in the browser."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_SYMBOLS = {
    r"\lambda": "λ",
    r"\nabla": "∇",
    r"\sigma": "σ",
    r"\theta": "θ",
    r"\delta": "δ",
    r"\alpha": "α",
    r"\phi": "φ",
    r"\rho": "ρ",
    r"\mu": "μ",
    r"\partial": "∂",
    r"\otimes": "⊗",
    r"\odot": "⊙",
    r"\langle": "⟨",
    r"\rangle": "⟩",
    r"\cdot": "·",
    r"\times": "×",
    r"\dots": "…",
    r"\infty": "∞",
    r"\top": "ᵀ",
    r"\sum": "Σ",
    r"\int": "∫",
    r"\leq": "≤",
    r"\geq": "≥",
    r"\approx": "≈",
    r"\to": "→",
    r"\in": "∈",
    r"\tfrac12": "½",
    r"\qquad": "   ",
    r"\quad": "  ",
}
_ACCENTS = {"bar": "\u0304", "hat": "\u0302", "tilde": "\u0303"}


def plain(formula: str) -> str:
    """One formula as text.

    Args:
        formula: what a docstring holds, in LaTeX.

    Returns:
        The same with Unicode letters and signs; a command that is not known loses its backslash.
    """
    text = re.sub(r"\\(?:mathrm|mathbf|text|operatorname)\{([^{}]*)\}", r"\1", formula)
    text = re.sub(r"\\t?frac\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", r"(\1) / (\2)", text)
    text = re.sub(r" *\\, *", " ", text)
    text = re.sub(r"\\(bar|hat|tilde) ?\{?(\w)\}?", lambda m: m[2] + _ACCENTS[m[1]], text)
    text = re.sub(r"\\sqrt\{([^{}]*)\}", r"√(\1)", text)
    text = re.sub(r"\\sqrt ?(\w)", r"√\1", text)
    for command, sign in _SYMBOLS.items():
        # A command of letters ends where the letters end; the space that ended it is no space.
        end = r"(?![a-zA-Z])" if command[-1].isalpha() else ""
        text = re.sub(re.escape(command) + end, lambda _, sign=sign: sign, text)
    text = re.sub(r"\^ ?ᵀ", "ᵀ", text)
    text = text.replace("^{-1}", "⁻¹").replace("^+", "⁺").replace("^2", "²").replace("_0", "₀")
    text = re.sub(r"\^\{([^{}]*)\}", r"^(\1)", text)
    text = re.sub(r"_\{([^{}]*)\}", r"_(\1)", text)
    return text.replace("\\", "").replace("{", "").replace("}", "")


def readable(docstring: str) -> str:
    """A docstring with its cross-reference roles and formulas as code.

    Args:
        docstring: the docstring, dedented.

    Returns:
        Markdown.
    """
    text = re.sub(
        r"^\.\. math:: *(.*(?:\n[ \t]+\S.*)*)$",
        lambda m: "```text\n" + plain(textwrap.dedent(m[1])) + "\n```",
        docstring,
        flags=re.MULTILINE,
    )
    text = re.sub(r":math:`([^`]*)`", lambda m: f"`{plain(m[1])}`", text)
    return re.sub(r":(?:class|meth|func|attr|mod):`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)


class PlainMath(griffe.Extension):
    """Rewrites every docstring that is collected."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring.

        Args:
            obj: the object it belongs to.
        """
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
