"""The last layer without what nobody reads.

Of a question's tokens the loss and the thoughts read one last hidden state, that of the last token. The layers below
need all tokens for the keys and values of the layer above; the last layer has none above it. There queries, their
attention (model/attention.py), output projection and MLP run for the tokens that are read alone: of GPT-2's matrix
products 7% less, of a model with two layers 5 in 12. What the last hidden states of the other tokens hold is then
meaningless.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coconut_fast.model.batch import UsedPositions


def decoder_layers(hf: PreTrainedModel) -> nn.ModuleList | None:
    """The model's list of layers, in any architecture: the first that has as many modules as its configuration says."""
    count = hf.config.get_text_config().num_hidden_layers
    lists = (m for m in hf.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return next(lists, None)


def token_wise(layer: nn.Module) -> list[nn.Module]:
    """What of a decoder layer knows one token at a time: projection of the queries, that of the output, and MLP."""
    attention = [m for m in layer.children() if hasattr(m, "layer_idx")]
    names = ("q_proj", "o_proj", "c_proj", "dense", "out_proj")
    parts = [getattr(m, name, None) for m in attention for name in names]
    return [m for m in (*parts, getattr(layer, "mlp", None)) if m is not None]


def joint_projections(layer: nn.Module) -> list[Conv1D]:
    """GPT-2's projections of queries, keys and values, in this order, in one matrix."""
    joint = [getattr(m, "c_attn", None) for m in layer.children() if hasattr(m, "layer_idx")]
    plain = [m for m in joint if isinstance(m, Conv1D) and getattr(m.forward, "__func__", None) is Conv1D.forward]
    return [m for m in plain if m.nf == 3 * m.nx]


@contextmanager
def only_used(hf: PreTrainedModel, used: UsedPositions | None) -> Iterator[None]:
    """Within the block that part of the last layer runs for the tokens of `used` and gives zeros for all others."""
    layers = decoder_layers(hf) if used is not None else None
    if used is None or layers is None:
        yield
        return
    ours: dict[nn.Module, Callable[..., torch.Tensor]] = {}
    for module in token_wise(layers[-1]):
        ours[module] = functools.partial(_read, module.forward, used.at)
    for module in joint_projections(layers[-1]):
        ours[module] = functools.partial(_read_queries, module, used.at)
    own = {module: vars(module).get("forward") for module in ours}  # a user's or a library's
    for module, forward in ours.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in own.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _read(whole: Callable[..., torch.Tensor], at: torch.Tensor, x_1TD: torch.Tensor, *args: Any) -> torch.Tensor:
    return _spread(whole(x_1TD.index_select(1, at), *args), at, x_1TD.shape[1])


def _read_queries(joint: Conv1D, at: torch.Tensor, x_1TD: torch.Tensor) -> torch.Tensor:
    """x W + b, but the first third of the columns for the tokens `at` alone."""
    x_TD = x_1TD[0]
    widths = [joint.nx, 2 * joint.nx]
    weight_q, weight_kv = joint.weight.split(widths, dim=1)  # looked up here: FSDP puts the whole one there by now
    bias_q, bias_kv = joint.bias.split(widths)
    query_RD = torch.addmm(bias_q, x_TD.index_select(0, at), weight_q)
    return torch.cat([_spread(query_RD[None], at, len(x_TD)), torch.addmm(bias_kv, x_TD, weight_kv)[None]], dim=-1)


def _spread(y_1RD: torch.Tensor, at: torch.Tensor, count: int) -> torch.Tensor:
    """(1, R, D) of the tokens `at` -> (1, count, D), zero for all others."""
    return y_1RD.new_zeros(1, count, y_1RD.shape[2]).index_copy(1, at, y_1RD)
