"""The last layer without what nobody reads.

Of a question's tokens the loss and the thoughts read one last hidden state, that of the last token. The layers below
need all tokens for the keys and values of the layer above; the last layer has none above it. There queries
(model/attention.py), output projection and MLP run for the tokens that are read alone: of GPT-2's matrix products 6%
less, of a model with two layers 3 in 8. What the last hidden states of the other tokens hold is then meaningless.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from coconut_fast.model.batch import Reads


def decoder_layers(hf: PreTrainedModel) -> nn.ModuleList | None:
    """The model's list of layers, in any architecture: the first that has as many modules as its configuration says."""
    count = hf.config.get_text_config().num_hidden_layers
    lists = (m for m in hf.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return next(lists, None)


def token_wise(layer: nn.Module) -> list[nn.Module]:
    """What of a decoder layer stands behind the attention and knows one token at a time: output projection and MLP."""
    attention = (m for m in layer.children() if hasattr(m, "layer_idx"))
    parts = [getattr(m, name, None) for m in attention for name in ("o_proj", "c_proj", "dense", "out_proj")]
    return [m for m in (*parts, getattr(layer, "mlp", None)) if m is not None]


@contextmanager
def only_reads(hf: PreTrainedModel, reads: Reads | None) -> Iterator[None]:
    """Within the block that part of the last layer runs for the tokens of `reads` and gives zeros for all others."""
    layers = decoder_layers(hf) if reads is not None else None
    if reads is None or layers is None:
        yield
        return
    own = {module: vars(module).get("forward") for module in token_wise(layers[-1])}  # a user's or a library's
    for module in own:
        module.forward = functools.partial(_read, module.forward, reads.at)
    try:
        yield
    finally:
        for module, forward in own.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _read(whole: Callable[..., torch.Tensor], at: torch.Tensor, x_1TD: torch.Tensor, *args: Any) -> torch.Tensor:
    y_1RD = whole(x_1TD.index_select(1, at), *args)
    return y_1RD.new_zeros(1, x_1TD.shape[1], y_1RD.shape[2]).index_copy(1, at, y_1RD)
