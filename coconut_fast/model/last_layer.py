"""The last layer without what nobody reads.

Of a question's tokens the loss and the thoughts read one last hidden state, that of the last token. The layers below
need all tokens for the keys and values of the layer above; the last layer has none above it. There queries
(model/attention.py) and the MLP run for the tokens that are read alone: of GPT-2's matrix products 5% less, of a model
with two layers a third. What the last hidden states of the other tokens hold is then meaningless.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from coconut_fast.data.batch import Reads


def decoder_layers(hf: PreTrainedModel) -> nn.ModuleList | None:
    """The model's list of layers, in any architecture: the first that has as many modules as its configuration says."""
    count = hf.config.get_text_config().num_hidden_layers
    lists = (m for m in hf.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return next(lists, None)


@contextmanager
def only_reads(hf: PreTrainedModel, reads: Reads | None) -> Iterator[None]:
    """Within the block the last layer's `mlp` runs for the tokens of `reads` and gives zeros for all others."""
    layers = decoder_layers(hf) if reads is not None else None
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if reads is None or mlp is None:
        yield
        return
    whole = mlp.forward

    def forward(x_1TD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y_1RD = whole(x_1TD.index_select(1, reads.at), *args, **kwargs)
        return y_1RD.new_zeros(1, x_1TD.shape[1], y_1RD.shape[2]).index_copy(1, reads.at, y_1RD)

    mlp.forward = forward
    try:
        yield
    finally:
        del mlp.forward
