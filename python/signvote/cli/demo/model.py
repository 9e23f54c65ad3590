"""A small byte-level transformer: reads bytes, predicts the next one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

BYTES = 256


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm_feed = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width, bias=False)
        self.feed_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        query, key, value = self.query_key_value(self.norm_attention(x)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(rotate(query, turn), rotate(key, turn), value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden = functional.relu(self.feed_in(self.norm_feed(x)))
        y: Tensor = x + self.feed_out(hidden.square())
        return y


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding: turn each pair of features by an angle that grows with the position."""
    cos, sin = turn
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Transformer(nn.Module):
    """Logits for the byte after each byte."""

    cos: Tensor
    sin: Tensor

    def __init__(self, *, layers: int = 2, width: int = 128, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        blocks = [Block(width, heads) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        half = width // heads // 2
        angles = torch.arange(context)[:, None] * 1000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=width**-0.5)
        for block in blocks:  # each starts as the identity
            nn.init.zeros_(block.attention_out.weight)
            nn.init.zeros_(block.feed_out.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, (self.cos, self.sin))
        logits: Tensor = self.head(self.norm(x))
        return logits


def loss(model: nn.Module, pieces: Tensor) -> Tensor:
    """Mean nats per byte for predicting each next byte of `pieces`."""
    logits = model(pieces[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())
