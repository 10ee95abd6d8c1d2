"""Toy backbones that differ in how tokens follow the latents: input for the probe's tests."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 8


class Block(nn.Module):
    """Self-attention of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = self.mix(hidden_states)[:, None]
        return hidden_states + F.scaled_dot_product_attention(x, x, x)[:, 0]


class VideoModel(nn.Module):
    """(B, C, F, H, W): cubes of 1 x 2 x 2, frame by frame."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, WIDTH, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.embed(hidden_states).flatten(2).transpose(1, 2)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class ColumnsFirstModel(VideoModel):
    """As `VideoModel`, but its stream runs over the frames fastest."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.embed(hidden_states).permute(0, 4, 3, 2, 1).flatten(1, 3)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class OverlapModel(VideoModel):
    """As `VideoModel`, but a token sees its neighbours' latents: no rows of their own."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.avg_pool3d(hidden_states, 3, 1, 1)
        hidden_states = self.embed(hidden_states).flatten(2).transpose(1, 2)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class AudioModel(nn.Module):
    """(B, C, T) with two tokens of its own before those of the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.memory = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = self.embed(hidden_states.transpose(1, 2))
        x = torch.cat([self.memory.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x
