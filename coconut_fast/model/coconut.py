"""Coconut: a Hugging Face causal language model that thinks.

The model code stays Hugging Face's; its attention runs ragged over our cache (model/attention.py). A forward is one
pass over everything before the first thoughts, then one pass per thought; between passes the last hidden state goes
through the feedback and becomes the next input embedding (arXiv 2412.06769, section 3).
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import NewGELUActivation

from coconut_fast import ops
from coconut_fast.model import attention
from coconut_fast.model.batch import RaggedBatch, check_range, from_padded
from coconut_fast.model.cache import KVCache, Ragged, Storage
from coconut_fast.model.deferred import DeferredWeightGradients
from coconut_fast.model.feedback import make_feedback
from coconut_fast.model.last_layer import only_used
from coconut_fast.model.parallel import refine
from coconut_fast.model.saving import save
from coconut_fast.model.weight import has_own_products
from coconut_fast.tokens import LatentTokens, check_tokens


@dataclass
class SavedSettings:
    """What a checkpoint remembers of its training, in coconut.json; the run's settings are in train/arguments.py."""

    num_thoughts: int | None = None  # thoughts a prompt without `<|latent|>` tokens gets; None: it is run as it is
    markers: bool = True  # whether `<|start-latent|>` and `<|end-latent|>` frame the thoughts
    suffix: str = "\n"  # what follows the question's text
    method: str = "coconut"
    stage: int | None = None
    curriculum: dict[str, Any] | None = None  # the CurriculumConfig of its training, where it differs from the default
    symbols: dict[str, Any] | None = None  # how graph problems were written as symbols, if they were
    parallel_rounds: int | None = None  # number of rounds that refine all thoughts in parallel; None: one by one

    def __post_init__(self) -> None:
        """ValueError for settings that cannot be used, as in a coconut.json edited by hand."""
        for names, kind in (
            (("num_thoughts", "stage", "parallel_rounds"), int | None),
            (("markers",), bool),
            (("suffix", "method"), str),
            (("curriculum", "symbols"), dict | None),
        ):
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind) or (isinstance(value, int) and value < 0):
                    raise ValueError(f"{name}: found {value!r}")
        known = {"frontier": str, "relabel": bool, "separators": bool}
        for name, value in (self.symbols or {}).items():
            if not isinstance(value, known.get(name, ())):
                raise ValueError(f"symbols: found {name}: {value!r}")


@dataclass
class CoconutOutput:
    """loss: () mean cross-entropy of the labelled tokens, or None without labels. The rest is computed on demand.

    Raises ValueError for logits after a forward with `loss_only`, which computes only the final hidden states that
    labels and thoughts need.
    """

    loss: torch.Tensor | None
    model: Coconut = field(repr=False)
    batch: RaggedBatch = field(repr=False)
    hidden_TD: tuple[torch.Tensor, ...] = field(repr=False)  # one per pass
    embeds_TD: tuple[torch.Tensor, ...] = field(repr=False)
    loss_only: bool = False

    def __post_init__(self) -> None:
        self._with_grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    @functools.cached_property
    def logits(self) -> torch.Tensor:
        """(B, T, V) in the padded layout, zero on pads. Computed when first read, with the weights of then."""
        if self.loss_only:
            raise ValueError("logits: this forward had loss_only=True, so most of its last hidden states do not exist")
        with_grad = self._with_grad and torch.is_grad_enabled()  # first: inference_mode(False) enables gradients
        with torch.inference_mode(self._inference), torch.set_grad_enabled(with_grad):
            return self.batch.padded(self.model.head(torch.cat(self.hidden_TD)))

    def __getitem__(self, place: int | str | slice) -> Any:
        """The loss (0) or the logits (1), for code that indexes outputs as transformers.Trainer does; or by name."""
        if isinstance(place, str):
            return getattr(self, place)
        if isinstance(place, slice):
            return tuple(self[i] for i in range(*place.indices(2)))
        return (lambda: self.loss, lambda: self.logits)[place]()

    @functools.cached_property
    def inputs_embeds(self) -> torch.Tensor:
        """(B, T, D) with every thought filled in; zero on pads."""
        return self.batch.padded(torch.cat(self.embeds_TD))


class Coconut(nn.Module):
    """A Hugging Face causal language model that thinks: `hf`, `tokens`, `feedback`, `tokenizer` and `settings`.

    Training also depends on `detach_after` (gradients through the last n thoughts of a row only; None: through all, as
    parallel rounds require), `checkpoint_passes` (keep only the inputs of a pass and recompute it in backward) and
    `defer_weight_gradients` (one weight gradient for all passes, model/deferred.py). `settings` are saved with the
    model.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokens: LatentTokens,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        feedback: nn.Module | str | None = None,
        settings: SavedSettings | None = None,
    ) -> None:
        """hf: a model whose layers are attention. That it runs ragged is checked by `load`, not here (model/checks.py).

        tokens: its special tokens. tokenizer: for text prompts. feedback: a module hidden (B, D) -> next input (B, D),
        or one of model/feedback.py by name; None: identity. settings: None: those of an untrained model.
        """
        super().__init__()
        if not isinstance(hf, nn.Module):
            raise ValueError(f"hf: found {hf!r}, expected a model of transformers; `coconut_fast.load` takes a path")
        hf = getattr(hf, "get_base_model", lambda: hf)()  # unwraps peft's model: the adapters are inside
        hf.set_attn_implementation(attention.NAME)
        if hf.config.get_text_config()._attn_implementation != attention.NAME:
            raise ValueError(
                f"hf: {type(hf).__name__} cannot run ragged: its attention does not go through transformers' interface"
            )
        _fuse_gelu(hf)
        self.hf = hf
        self.training = hf.training
        if feedback is None or isinstance(feedback, str):
            feedback = make_feedback(feedback or "identity", hf.get_input_embeddings())
        if not isinstance(feedback, nn.Module):
            raise ValueError(f"feedback: found {feedback!r}, expected a name or a module (hidden_BD) -> embeds_BD")
        self.feedback: nn.Module = feedback
        self.tokens = check_tokens(tokens, hf.get_input_embeddings().weight.shape[0])
        self.tokenizer: Any = tokenizer
        self.settings = settings or SavedSettings()
        self.detach_after: int | None = None
        self.defer_weight_gradients = True
        self.checkpoint_passes = False

    @property
    def config(self) -> PreTrainedConfig:
        """The Hugging Face configuration."""
        return self.hf.config

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def num_layers(self) -> int:
        return self.hf.config.get_text_config().num_hidden_layers

    @property
    def max_positions(self) -> int | None:
        """Positions a row may have; None if the configuration has no limit.

        longrope ends at its original length: for a longer row, all rows of the call would be rotated by other
        frequencies than their cached keys.
        """
        config = self.hf.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        for part in (rope, *rope.values()):  # some models have rope parameters by layer type
            if isinstance(part, dict) and part.get("rope_type") == "longrope":
                original = part["original_max_position_embeddings"]
                limit = min(limit or original, original)
        return limit

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(T,) ids -> (T, D) token embeddings."""
        return self.hf.get_input_embeddings()(input_ids)

    def body(self, embeds_TD: torch.Tensor, position_ids_T: torch.Tensor, ragged: Ragged) -> torch.Tensor:
        """(T, D) input embeddings of a ragged batch -> (T, D) hidden states after the final norm; no LM head."""
        if self.checkpoint_passes and torch.is_grad_enabled():
            return checkpoint(self._body, embeds_TD, position_ids_T, ragged, use_reentrant=False)
        return self._body(embeds_TD, position_ids_T, ragged)

    def _body(self, embeds_TD: torch.Tensor, position_ids_T: torch.Tensor, ragged: Ragged) -> torch.Tensor:
        found = self.hf.config.get_text_config()._attn_implementation
        if found != attention.NAME:  # any other one would silently treat the batch as one long row
            raise ValueError(
                f"hf: its attention is {found!r}, expected {attention.NAME!r}; "
                f"model.hf.set_attn_implementation({attention.NAME!r}) sets it back"
            )
        with only_used(self.hf, ragged.used):
            output = self.hf.base_model(
                inputs_embeds=embeds_TD[None],
                position_ids=position_ids_T[None],
                use_cache=False,
                ragged=ragged,
            )
        return output.last_hidden_state.squeeze(0)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Activation checkpointing per pass. Called by transformers' Trainer, whose options are about layers."""
        self.checkpoint_passes = True

    gradient_checkpointing_enable = activation_checkpointing_enable  # the name in earlier releases of transformers

    def head(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """(N, D) hidden states after the final norm -> (N, V) logits, scaled and capped as the model does it."""
        logits_NV = self.hf.get_output_embeddings()(hidden_ND)
        scale, softcap = self.logits_scale, self.logits_softcap
        if scale != 1.0:
            logits_NV = logits_NV * scale
        return softcap * torch.tanh(logits_NV / softcap) if softcap else logits_NV

    @property
    def logits_scale(self) -> float:
        """The factor of the logits (Granite divides them by `logits_scaling`, Cohere has `logit_scale`)."""
        config = self.hf.config.get_text_config()
        return getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    @property
    def logits_softcap(self) -> float:
        """Cap c of c * tanh(logits / c), as Gemma 2 has it; 0 for none."""
        return getattr(self.hf.config.get_text_config(), "final_logit_softcapping", None) or 0.0

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        batch: RaggedBatch | None = None,
        num_items: torch.Tensor | int | None = None,
        loss_only: bool = False,
    ) -> CoconutOutput:
        """Padded (B, T) tensors, pads left or right, or a ragged `batch`; rows may have any number of thoughts.

        The loss is the cross-entropy of the labelled tokens, summed and divided by `num_items` (default: their number);
        labels are not shifted; -100 marks tokens without one. Positions count from a row's first token. A row's result
        does not depend on other rows. loss_only: the last layer computes only what the loss and the thoughts need, as
        in training; the output then has no logits.
        Raises ValueError for tensors of another shape, for ids, labels or positions outside the model's range, and for
        tensors beside a `batch`, which holds its own.
        """
        tensors = {"input_ids": input_ids, "attention_mask": attention_mask}
        tensors |= {"position_ids": position_ids, "labels": labels}
        beside = [name for name, tensor in tensors.items() if tensor is not None]
        if batch is not None and beside:
            raise ValueError(f"batch: found {', '.join(beside)} beside it, expected the batch alone")
        if batch is None:
            if input_ids is None:
                raise ValueError("forward: expected input_ids or batch, found neither")
            batch = from_padded(input_ids, self.tokens.thought, attention_mask, position_ids, labels)
            check_range(batch, self.hf.get_input_embeddings().weight.shape[0], self.max_positions)
            batch = batch.to(self.device)
        # Not with activation checkpointing (recomputation runs outside this mode) nor FSDP (weights are resharded when
        # the deferred gradient is due).
        deferred = self.defer_weight_gradients and torch.is_grad_enabled() and not self.checkpoint_passes
        deferred = deferred and not any(isinstance(p, DTensor) for p in self.parameters())
        with DeferredWeightGradients() if deferred else nullcontext() as mode:
            hidden, embeds = self._passes(batch, loss_only)
        head = self.hf.get_output_embeddings()
        weight = head.weight if mode is None else mode.alias(head.weight)
        loss = None
        if batch.num_targets or labels is not None:  # labels that are all -100 give a loss of 0, with zero gradients
            loss = self._loss(batch, hidden, weight, getattr(head, "bias", None), num_items)
        return CoconutOutput(loss, self, batch, hidden, embeds, loss_only)

    def _passes(self, batch: RaggedBatch, loss_only: bool) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Hidden states and input embeddings of every pass, (T of the pass, D) each."""
        device = batch.input_ids.device
        seeds_L = None
        if self.training:  # drawn on the device: no host sync, and a captured graph draws new seeds at each replay.
            layers_L = torch.arange(1, self.num_layers + 1, device=device)
            seeds_L = (torch.randint(2**31, (), device=device) + 0x9E3779B1 * layers_L) & 0x7FFFFFFF
        if self.settings.parallel_rounds is not None:
            return self._rounds(batch, seeds_L, loss_only)
        cache = Storage(self.num_layers, num_slots=batch.num_slots, page_table=batch.page_table)
        # By `split`, whose backward is one concatenation; that of a slice makes a whole (T, D) of zeros for every pass.
        pieces = self.embed(batch.input_ids).split([p.stop - p.start for p in batch.passes])
        hidden: list[torch.Tensor] = []
        embeds: list[torch.Tensor] = []
        num_joined = attention.num_joined(batch, loss_only)
        first_B = batch.passes[0].lengths  # pass 0 has all rows
        for i, (p, x_TD) in enumerate(zip(batch.passes, pieces, strict=True)):
            if hidden:
                thoughts_BD = self.feedback(self._detached(hidden[-1].index_select(0, p.source), p.thoughts_after))
                x_TD = x_TD.index_copy(0, p.thought_at, thoughts_BD.to(x_TD.dtype))
            ragged = Ragged(
                cache=cache,
                rows=p.rows_R,
                row_offsets=p.row_offsets,
                lengths=p.lengths,
                slots=p.slots,
                max_query=p.max_query,
                max_length=p.max_length,
                seeds=seeds_L,
                used=p.used if loss_only else None,
                joined=first_B[p.rows_R] if 1 <= i <= num_joined else None,
            )
            embeds.append(x_TD)
            hidden.append(self.body(x_TD, batch.position_ids[p.start : p.stop], ragged))
        cache.seal()
        return tuple(hidden), tuple(embeds)

    def _rounds(
        self, batch: RaggedBatch, seeds_L: torch.Tensor | None, loss_only: bool
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """`_passes` where all thoughts are refined together (model/parallel.py)."""
        if self.detach_after is not None:
            raise ValueError(
                f"detach_after: found {self.detach_after} with parallel_rounds, whose gradients reach all thoughts"
            )
        cache = KVCache(
            self.num_layers,
            num_slots=batch.num_slots,
            max_rows=len(batch.lengths),
            max_length=max(batch.lengths),
            device=batch.input_ids.device,
        )
        refined = refine(self, batch, cache, cache.alloc(len(batch.lengths)), seeds_L, loss_only)
        cache.seal()
        return refined

    def _detached(self, thoughts_BD: torch.Tensor, thoughts_after_B: torch.Tensor) -> torch.Tensor:
        if self.detach_after is None:
            return thoughts_BD
        return torch.where((thoughts_after_B >= self.detach_after)[:, None], thoughts_BD.detach(), thoughts_BD)

    def _loss(
        self,
        batch: RaggedBatch,
        hidden: tuple[torch.Tensor, ...],
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        num_items: torch.Tensor | int | None,
    ) -> torch.Tensor:
        # Only labelled positions reach the head: labels are -100 on questions and thoughts, most of a row.
        # index_select, not h[index], whose backward sorts the indices on a GPU; duplicates occur only where the
        # gradient is 0.
        labelled_ND = torch.cat([h.index_select(0, p.loss_index) for h, p in zip(hidden, batch.passes, strict=True)])
        targets_N = torch.cat([p.targets for p in batch.passes])
        total = ops.linear_cross_entropy(
            labelled_ND,
            weight_VD,
            bias_V,
            targets_N,
            scale=self.logits_scale,
            softcap=self.logits_softcap,
            weight_gradient=ops.weight_gradient if has_own_products(weight_VD, weight_VD.dtype) else None,
        )
        return total / (max(1, batch.num_targets) if num_items is None else num_items)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a directory that `coconut_fast.load` restores exactly and plain transformers reads as a model."""
        save(self, directory)


def _fuse_gelu(hf: PreTrainedModel) -> None:
    """Replaces GPT-2's tanh GELU, eight element-wise ops in transformers, by the same function in one PyTorch kernel.

    On a CPU the eight are a third of a training step: each one streams a (T, 4 D) tensor through memory.
    """
    for module in hf.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
