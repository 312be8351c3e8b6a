"""A small causal transformer, its output layer tied to its embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

# Standard deviation of the initial weights (Radford et al. 2019).
_SPREAD = 0.02


class Transformer(nn.Module):
    """Pre-norm blocks between a token embedding and its transpose (Radford et al. 2019); positions are learned.

    Args:
        tokens: Size of the alphabet.
        layers: Blocks.
        width: Columns of the stream.
        heads: Attention heads; they divide the width.
        context: The longest sequence.
    """

    def __init__(self, *, tokens: int, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, tokens, bias=False)
        self.output.weight = self.embedding.weight
        self.apply(_initialise)

    def forward(self, text: Tensor) -> Tensor:
        """Scores the next token at each place.

        Args:
            text: Token indices, shape (N, T).

        Returns:
            Shape (N, tokens, T), as ``CrossEntropyLoss`` wants it.
        """
        # One row of places per sample: the embedding of places then has a batch axis like every other layer.
        places = torch.arange(text.shape[1], device=text.device).expand_as(text)
        stream = self.blocks(self.embedding(text) + self.positions(places))
        scores: Tensor = self.output(self.norm(stream))
        return scores.transpose(1, 2)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        width: Columns of the stream.
        heads: Attention heads; they divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Looks back, then thinks.

        Args:
            x: Shape (N, T, width).

        Returns:
            Shape (N, T, width).
        """
        query, key, value = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        looked = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(looked.transpose(1, 2).flatten(2))
        result: Tensor = x + self.mlp(x)
        return result


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_SPREAD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
