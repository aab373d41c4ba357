"""Checks of a model that is loaded: finite weights, a feedback that fits, and code that can run ragged.

Any architecture may be asked for, and some would be silently wrong: rows are concatenated on one token axis, and only
attention knows where one ends. Convolutions and recurrences run across these ends; attention that does not go through
transformers' interface sees all rows as one; some models compute positions themselves.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from coconut_fast import ops
from coconut_fast.model.cache import KVCache
from coconut_fast.model.coconut import Coconut


def check_finite(model: Coconut, what: str) -> None:
    """ValueError, starting with `what`, that names the first weight with a NaN or infinite value."""
    for name, tensor in model.named_parameters():
        if not tensor.numel() or tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            continue
        # 30 times as fast as isfinite of every value, which takes half a second for GPT-2.
        low, high = torch.aminmax(tensor.detach())
        if not torch.isfinite(low) or not torch.isfinite(high):
            raise ValueError(f"{what}: the weight {name.removeprefix('hf.')} holds NaN or infinite values")


def check_vocabulary(model: Coconut) -> None:
    """ValueError for a tokenizer with more tokens than the model has embeddings."""
    rows = model.hf.get_input_embeddings().weight.shape[0]
    if model.tokenizer is not None and len(model.tokenizer) > rows:
        raise ValueError(
            f"model: its tokenizer has {len(model.tokenizer)} tokens, expected at most its {rows} embeddings"
        )


@torch.no_grad()
def check_ragged(model: Coconut, what: str) -> None:
    """ValueError, starting with `what`, for a model that computes rows of a batch differently from each row alone.

    Two rows in one call and the same rows alone, one of them in two pieces, must give the same hidden states, with
    every layer calling our attention once; and our head must turn them into the model's own logits.
    """
    name = type(model.hf).__name__
    if model.num_layers < 1:
        raise ValueError(f"{what}: {name} has {model.num_layers} layers, expected some")
    try:
        calls: list[tuple[int, int | None]] = []
        together_TD, theirs_TV = _run_together(model, calls)
        alone_TD = _run_alone(model)
    except (torch.OutOfMemoryError, ops.BackendError):
        raise
    except Exception as error:  # a model's code may raise anything for arguments it does not know
        raise ValueError(f"{what}: {name} cannot run ragged: {error}") from error
    if sorted(layer for layer, _ in calls) != list(range(model.num_layers)):
        raise ValueError(f"{what}: {name} cannot run ragged: it has layers without attention, or with their own")
    for made, values in ((alone_TD, "hidden states"), (theirs_TV, "logits")):
        if not made.isfinite().all():
            raise ValueError(
                f"{what}: the {values} of {name} are NaN or infinite in {model.dtype}, expected finite ones"
                + ("; dtype='bfloat16' and 'float32' have a wider range" if model.dtype == torch.float16 else "")
            )
    exact = together_TD.dtype in (torch.float32, torch.float64)
    if not _is_close(together_TD, alone_TD, 1e-3 if exact else 0.1):
        raise ValueError(f"{what}: {name} cannot run ragged: a row depends on the rows beside it")
    if _has_window(model) and not any(window for _, window in calls):
        raise ValueError(f"{what}: {name} cannot run ragged: it does not tell attention of its sliding window")
    if not _is_close(model.head(together_TD), theirs_TV, 0.02):
        raise ValueError(
            f"{what}: {name} computes its logits in a way that is not known here; "
            "models are supported whose logits are head(hidden), scaled or soft-capped by their configuration"
        )


@torch.no_grad()
def check_feedback(model: Coconut) -> None:
    """ValueError for a feedback that does not map hidden states (B, D) of the model's dtype to embeddings (B, D)."""
    name = type(model.feedback).__name__
    hidden_BD = _inputs(model)[0]
    expected = f"a map of {tuple(hidden_BD.shape)} {model.dtype} on {model.device} to the same shape"
    try:
        embeds_BD = model.feedback(hidden_BD)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a user's module may raise anything
        raise ValueError(f"feedback: {name} raised {error!r}, expected {expected}") from error
    found = tuple(embeds_BD.shape) if isinstance(embeds_BD, torch.Tensor) else type(embeds_BD).__name__
    if found != tuple(hidden_BD.shape):
        raise ValueError(f"feedback: {name} returned {found}, expected {expected}")


def _inputs(model: Coconut) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (5, D) and positions (5,) of two rows, of three tokens and two; one is, like a thought, no token."""
    ids = torch.tensor([model.tokens.thought, 0, 1, 1, 0], device=model.device)
    x_TD = model.embed(ids)
    x_TD[1] = (x_TD[0] + x_TD[2]) / 2
    return x_TD, torch.tensor([0, 1, 2, 0, 1], device=model.device)


def _run_together(model: Coconut, calls: list[tuple[int, int | None]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (5, D), and logits (5, V) as the model's own code computes them; records every attention call."""
    cache = KVCache(model.num_layers, num_slots=64, max_rows=4, device=model.device)
    x_TD, positions_T = _inputs(model)
    hidden_TD = model.body(x_TD, positions_T, replace(cache.append(cache.alloc(2), [3, 2]), calls=calls))
    ragged = cache.append(cache.alloc(2), [3, 2])
    output = model.hf(inputs_embeds=x_TD[None], position_ids=positions_T[None], use_cache=False, ragged=ragged)
    return hidden_TD, output.logits[0]


def _run_alone(model: Coconut) -> torch.Tensor:
    """The same hidden states, (5, D)."""
    cache = KVCache(model.num_layers, num_slots=32, max_rows=2, device=model.device)
    x_TD, positions_T = _inputs(model)
    first, second = cache.alloc(2)
    pieces = ((first, slice(0, 2)), (first, slice(2, 3)), (second, slice(3, 5)))
    return torch.cat(
        [model.body(x_TD[at], positions_T[at], cache.append([row], [at.stop - at.start])) for row, at in pieces]
    )


def _is_close(ours: torch.Tensor, theirs: torch.Tensor, bound: float) -> bool:
    return float((ours - theirs).float().norm()) <= bound * float(theirs.float().norm())


def _has_window(model: Coconut) -> bool:
    """Whether some layer attends to fewer positions than the model has."""
    config = model.hf.config.get_text_config()
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if not window or (model.max_positions and window >= model.max_positions):
        return False
    return kinds is None or "sliding_attention" in kinds
