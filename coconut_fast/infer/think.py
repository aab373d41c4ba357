"""Think: the chain of latent passes. Hidden state -> feedback -> next input, no token, no head, no host sync."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coconut_fast.model.cache import KVCache
from coconut_fast.model.coconut import Coconut


@torch.inference_mode()
def think(
    model: Coconut,
    cache: KVCache,
    rows: Sequence[int],
    hidden_BD: torch.Tensor,
    counts: Sequence[int],
    thoughts: list[list[torch.Tensor]] | None = None,
) -> torch.Tensor:
    """`counts[i]` latent passes of `rows[i]`, from its last hidden state -> its last hidden state after them, (B, D).

    thoughts: where given, every hidden state that is fed back is appended to its row's list, (D,) each.
    """
    if len(counts) != len(rows) or min(counts, default=0) < 0:
        raise ValueError(f"counts: found {list(counts)}, expected 0 or more for each of {len(rows)} rows")
    last_BD = hidden_BD.clone()
    for step in range(max(counts, default=0)):
        members = [i for i, count in enumerate(counts) if step < count]
        index = torch.tensor(members, device=cache.device)
        thoughts_BD = last_BD[index]
        if thoughts is not None:
            for i, thought_D in zip(members, thoughts_BD, strict=True):
                thoughts[i].append(thought_D)
        ragged = cache.append([rows[i] for i in members], [1] * len(members))
        embeds_BD = model.feedback(thoughts_BD).to(hidden_BD.dtype)
        last_BD[index] = model.body(embeds_BD, ragged.lengths.long() - 1, ragged)
    return last_BD
