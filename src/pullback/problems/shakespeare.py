"""A character language model on Shakespeare, read from a data folder."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from pullback.problems.budget import Budget
from pullback.problems.data import data_folder
from pullback.problems.errors import DataError, SpecError
from pullback.problems.models import seeded
from pullback.problems.preparation import at_least
from pullback.problems.problem import Problem, Split
from pullback.problems.registry import register
from pullback.problems.transformer import Transformer

_FILE = "tiny_shakespeare/input.txt.gz"
_REMEDY = f"put input.txt of tinyshakespeare (github.com/karpathy/char-rnn), gzipped, in DATA/{_FILE}."
_TRAINED = 0.9


@register("shakespeare")
def shakespeare(
    *,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    context: int = 64,
    stride: int = 1,
    windows: int = 256,
    batch_size: int | None = 32,
    data: Path | None = None,
) -> Problem:
    """Characters of Shakespeare, each from those before it: pre-norm transformer with tied embedding, cross-entropy.

    The first 90 percent of the text are trained on, the rest is for validation. A row is a window of `context`
    characters with the following ones as targets; the windows begin at every multiple of `stride`, so with 1 a batch
    is windows from anywhere, drawn without replacement, and with ``stride=64`` an epoch reads the text once. Losses
    are reported on equally spaced windows of either part, always the same.

    Args:
        layers: Blocks of attention and MLP.
        width: Columns of the stream.
        heads: Attention heads; they divide the width.
        context: Characters per window.
        stride: Distance of the windows that are trained on.
        windows: How many windows the training loss is reported on, and as many for validation; fewer if the text is
            too short for as many that do not overlap.
        batch_size: Windows per step, or None for all.
        data: Folder that contains ``tiny_shakespeare/``, or None for the environment variable PULLBACK_DATA.

    Returns:
        The problem; losses in nats per character, inputs and targets (N, context) int64.

    Raises:
        DataError: If the data folder or the file is missing or damaged.
        SpecError: If a size makes no sense.
    """
    sizes = {"layers": layers, "width": width, "heads": heads, "context": context, "stride": stride, "windows": windows}
    for option, value in sizes.items():
        at_least("shakespeare", option, value)
    if width % heads:
        raise SpecError(
            f"shakespeare cannot part a width of {width} among {heads} heads; give a multiple of the heads."
        )
    alphabet, text = _read(data_folder("shakespeare", data, _REMEDY) / _FILE)
    trained, held = text.tensor_split([int(_TRAINED * len(text))])
    if len(held) <= context:
        raise SpecError(f"context of shakespeare is {context}, and {len(held)} characters are held out; give less.")
    return Problem(
        name="shakespeare",
        make_model=seeded(
            lambda: Transformer(tokens=alphabet, layers=layers, width=width, heads=heads, context=context)
        ),
        train=_windows(trained, context, stride),
        reported=_spaced(trained, context, windows),
        validation=_spaced(held, context, windows),
        criterion=nn.CrossEntropyLoss(),
        batch_size=batch_size,
        targets=(2.5, 2.0, 1.7),
        budget=Budget(steps=500),
        description=f"tiny Shakespeare, transformer of {layers} blocks, cross-entropy per character",
    )


def _windows(text: Tensor, context: int, stride: int) -> Split:
    """All windows at multiples of the stride; views of the text, so that they take no memory."""
    return text[:-1].unfold(0, context, stride), text[1:].unfold(0, context, stride)


def _spaced(text: Tensor, context: int, count: int) -> Split:
    inputs, targets = _windows(text, context, 1)
    count = min(count, (len(text) - 1) // context)
    rows = torch.linspace(0, len(inputs) - 1, count, dtype=torch.float64).long()
    return inputs[rows], targets[rows]


def _read(path: Path) -> tuple[int, Tensor]:
    """How many characters there are, and the text as their numbers in order of their codes."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {_REMEDY}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}); {_REMEDY}") from error
    if not raw:
        raise DataError(f"{path} is empty; {_REMEDY}")
    # frombuffer shares memory and wants it writable, hence the bytearray.
    codes, text = torch.frombuffer(bytearray(raw), dtype=torch.uint8).unique(return_inverse=True)
    return len(codes), text
