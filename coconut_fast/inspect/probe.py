"""What thoughts hold, read through the model's own LM head: each as a distribution over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from coconut_fast.infer.engine import generate
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.loading import load


def decode_thoughts(
    model: Coconut | str | Path,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    num_thoughts: int | Sequence[int] | None = None,
    batch_size: int | None = None,
) -> list[torch.Tensor]:
    """softmax(W h_t) of every thought h_t of every prompt: (k, V) fp32 on the CPU each (arXiv 2412.06769, section 5).

    Thought t is the hidden state that is fed back as the t-th continuous thought, so the first one is the hidden state
    of the prompt's last token. Six thoughts of GPT-2 are 1.2 MB. Arguments and errors as those of `generate`.
    """
    if not isinstance(model, Coconut):
        model = load(model)
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
    with torch.no_grad():  # not inference mode: probes may train on the results
        return [model.head(thought_KD).float().softmax(-1).cpu() for thought_KD in thoughts]
