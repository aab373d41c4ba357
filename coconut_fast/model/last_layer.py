"""The last layer, computed only for the tokens whose final hidden state is used.

The loss and the thoughts use one final hidden state of a question, that of its last token. The layers below need all
tokens for the keys and values of the layer above; the last layer has none above it. There, queries, their attention
(model/attention.py), output projection and MLP run for the used tokens only: that saves 7% of GPT-2's matrix products,
and 5 in 12 of a model with two layers. The final hidden states of the other tokens are then meaningless.
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
    """The model's list of layers, in any architecture: the first with as many modules as the config has layers."""
    count = hf.config.get_text_config().num_hidden_layers
    lists = (m for m in hf.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return next(lists, None)


def token_wise(layer: nn.Module) -> list[nn.Module]:
    """The token-wise parts of a decoder layer: query projection, output projection and MLP."""
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
    """Within the block, the token-wise parts of the last layer run only for the tokens of `used`; others get zeros."""
    layers = decoder_layers(hf) if used is not None else None
    if used is None or layers is None:
        yield
        return
    ours: dict[nn.Module, Callable[..., torch.Tensor]] = {}
    for module in token_wise(layers[-1]):
        ours[module] = functools.partial(_read, module.forward, used.at)
    for module in joint_projections(layers[-1]):
        ours[module] = functools.partial(_read_queries, module, used.at)
    own = {module: vars(module).get("forward") for module in ours}  # a forward that a user or a library has replaced
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
    """x W + b, with the first third of the columns for the tokens `at` only."""
    x_TD = x_1TD[0]
    widths = [joint.nx, 2 * joint.nx]
    weight_q, weight_kv = joint.weight.split(widths, dim=1)  # looked up here, where FSDP has gathered the weight
    bias_q, bias_kv = joint.bias.split(widths)
    query_RD = torch.addmm(bias_q, x_TD.index_select(0, at), weight_q)
    return torch.cat([_spread(query_RD[None], at, len(x_TD)), torch.addmm(bias_kv, x_TD, weight_kv)[None]], dim=-1)


def _spread(y_1RD: torch.Tensor, at: torch.Tensor, count: int) -> torch.Tensor:
    """(1, R, D) of the tokens `at` -> (1, count, D), zero for all others."""
    return y_1RD.new_zeros(1, count, y_1RD.shape[2]).index_copy(1, at, y_1RD)
