"""What thoughts hold, read through the model's own head: the token that each of them would be if it had to be one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coconut_fast.infer.engine import generate
from coconut_fast.model.coconut import Coconut


def decode_thoughts(
    model: Coconut,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    num_thoughts: int | Sequence[int] | None = None,
    batch_size: int | None = None,
) -> list[torch.Tensor]:
    """softmax(W h_t) of every thought h_t of every prompt: (k, V) fp32 on the CPU each (arXiv 2412.06769, section 5).

    Thought t is the hidden state that is fed back as the t-th continuous thought, so the first one is the hidden state
    of the prompt's last token. Arguments and errors as those of `generate`.
    """
    output = generate(
        model,
        prompts,
        num_thoughts=num_thoughts,
        max_new_tokens=1,
        return_thoughts=True,
        batch_size=batch_size,
    )
    if output.stats.interrupted:
        raise KeyboardInterrupt
    thoughts = [thought_KD for thought_KD in output.thoughts or () if thought_KD is not None]
    if not thoughts:
        return []
    with torch.inference_mode():
        probabilities = [model.head(part).float().softmax(-1).cpu() for part in torch.cat(thoughts).split(1024)]
    return list(torch.cat(probabilities).split([len(thought_KD) for thought_KD in thoughts]))
