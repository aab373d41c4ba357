"""One ragged forward over given tokens: a prompt, the tokens after thoughts, or (decode.py) the token just chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coconut_fast.model.cache import KVCache
from coconut_fast.model.coconut import Coconut

PREFILL_TOKENS = 16384  # per forward, about: prompts are grouped up to this many, and none is split


@torch.inference_mode()
def prefill(
    model: Coconut,
    cache: KVCache,
    rows: Sequence[int],
    tokens: Sequence[Sequence[int]],
    thoughts_BD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs `tokens[i]` at the end of `rows[i]` -> hidden state of each row's last position, (B, D).

    With `thoughts_BD` each row's thought is fed before its tokens, in the same pass.
    """
    counts = [len(t) + (thoughts_BD is not None) for t in tokens]
    if 0 in counts:
        raise ValueError(f"tokens: row {counts.index(0)} of the call has none, expected one at least")
    ragged = cache.append(rows, counts)
    ids = torch.tensor([t for row in tokens for t in row], dtype=torch.int64, device=cache.device)
    embeds_TD = model.embed(ids)
    if thoughts_BD is not None:
        fed_BD = model.feedback(thoughts_BD).to(embeds_TD.dtype)
        parts = zip(fed_BD.split(1), embeds_TD.split([len(t) for t in tokens]), strict=True)
        embeds_TD = torch.cat([x for pair in parts for x in pair])
    ends_B = ragged.row_offsets[1:].long()
    starts_T = torch.repeat_interleave(ragged.lengths.long() - ends_B, ends_B - ragged.row_offsets[:-1])
    positions_T = torch.arange(len(embeds_TD), device=cache.device) + starts_T
    return model.body(embeds_TD, positions_T, ragged)[ends_B - 1]
