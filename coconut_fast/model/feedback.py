"""Feedback: the map from a hidden state to the next input embedding. Identity in the paper; others by name.

A feedback is an nn.Module (hidden_BD) -> embeds_BD, chosen by name or a user's own, and saved with the model. Those
with a name are built from the model's token embeddings (V, D), which give them their size, device and dtype.
"""

from __future__ import annotations

import torch
from torch import nn


class Identity(nn.Identity):
    """The hidden state itself (Coconut, arXiv 2412.06769, section 3)."""


class Rescale(nn.Module):
    """The hidden state scaled to the mean norm of the token embeddings.

    The last hidden states of larger models have far larger norms than their embeddings, which destabilises training.
    """

    mean_norm: torch.Tensor

    def __init__(self, weight_VD: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean_norm", torch.linalg.vector_norm(weight_VD.float(), dim=-1).mean())

    def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(hidden_BD.dtype, torch.float32)
        norm_B1 = torch.linalg.vector_norm(hidden_BD, dim=-1, keepdim=True, dtype=wide)
        scale_B1 = self.mean_norm.to(wide) / norm_B1.clamp_min(torch.finfo(torch.float32).tiny)
        return (hidden_BD * scale_B1).to(hidden_BD.dtype)


class Projection(nn.Sequential):
    """Linear, GELU, linear, LayerNorm (CODI, arXiv 2502.21074)."""

    def __init__(self, weight_VD: torch.Tensor) -> None:
        dim = weight_VD.shape[1]
        super().__init__(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.to(device=weight_VD.device, dtype=weight_VD.dtype)


class Pause(nn.Module):
    """One learned embedding, whatever the hidden state: the paper's "pause as thought", with Coconut's extra passes."""

    def __init__(self, weight_VD: torch.Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(weight_VD.mean(0))

    def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return self.embedding.to(hidden_BD.dtype).expand_as(hidden_BD)


FEEDBACKS: dict[str, type[nn.Module]] = {
    "identity": Identity,
    "rescale": Rescale,
    "projection": Projection,
    "pause": Pause,
}


def make_feedback(name: str, embedding: nn.Embedding) -> nn.Module:
    """A new feedback by name, made from the model's token embeddings as its body sees them (Gemma scales its table)."""
    if name not in FEEDBACKS:
        raise ValueError(f"feedback: expected one of {', '.join(FEEDBACKS)}, found {name!r}")
    table_VD = embedding.weight.detach()
    if type(embedding).forward is not nn.Embedding.forward:
        with torch.no_grad():
            table_VD = embedding(torch.arange(len(table_VD), device=table_VD.device))
    return FEEDBACKS[name](table_VD)


def name_of(feedback: nn.Module) -> str:
    """The name a feedback is saved under; a user's own module by its class name."""
    return next((n for n, c in FEEDBACKS.items() if type(feedback) is c), type(feedback).__name__)
