"""The model of a run: from a hub id, a directory, an official checkpoint, or a fresh configuration."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from coconut_fast.data.curriculum import METHODS
from coconut_fast.data.examples import Example
from coconut_fast.data.graphs import EOS, VOCABULARY
from coconut_fast.data.tokenizer import symbolic_tokenizer, word_tokenizer
from coconut_fast.model.checks import check_ragged, check_vocabulary
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.feedback import Identity
from coconut_fast.model.loading import add_latent_tokens, load, reason_of, start_rows
from coconut_fast.tokens import PAUSE
from coconut_fast.train.arguments import CoconutArguments

MULTIPASS = "pause_as_thought_multipass"  # the method that feeds back a learned embedding
# Sizes in a configuration that must not be 0, though transformers does build a model without layers.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")


def build(settings: CoconutArguments, examples: Sequence[Example]) -> Coconut:
    """The model that training starts from, in the precision its weights are kept in, on the CPU.

    examples: the training problems, from which a word-level tokenizer is made where the settings ask for one.
    ValueError, naming the setting, where the model cannot be made.
    """
    torch.manual_seed(settings.seed)
    dtype = torch.bfloat16 if settings.precision == "bf16_weights" else torch.float32
    feedback = "pause" if settings.method == MULTIPASS else settings.feedback
    brings_own = settings.load_model_path is not None or isinstance(settings.model, str)
    if brings_own and settings.tokenizer not in (None, "symbols"):
        raise ValueError(
            f"tokenizer: found {settings.tokenizer!r}, expected none (or 'symbols') for a model that brings its own"
        )
    if settings.load_model_path is not None:
        model = _load_weights(settings, dtype, feedback)
    elif isinstance(settings.model, dict):
        model = _from_config(settings, examples, dtype, feedback)
    else:
        model = load(settings.model, dtype=dtype, feedback=_asked(feedback))
    if settings.tokenizer == "symbols":
        _check_symbols(model)
        names = ("frontier", "relabel", "separators")
        model.settings.symbols = {name: getattr(settings, name) for name in names}
    if not settings.only_eval:
        _start_unused(model, settings.method)
        if model.settings.method == MULTIPASS != settings.method and settings.feedback == "identity":
            model.feedback = Identity()  # that of the model was its method's, nobody's choice
    if METHODS[settings.method].slot == "pause" and model.tokens.pause is None:
        _add_pause(model)
    check_vocabulary(model)
    return model


def _load_weights(settings: CoconutArguments, dtype: torch.dtype, feedback: str) -> Coconut:
    path = Path(settings.load_model_path or "")
    if not path.exists():
        raise ValueError(f"load_model_path: no such file or directory: {path}")
    base = None if isinstance(settings.model, dict) or path.is_dir() else settings.model
    return load(path, dtype=dtype, feedback=_asked(feedback), base=base)


def _check_symbols(model: Coconut) -> None:
    """ValueError for a model with other tokens than those of graph problems."""
    found = [] if model.tokenizer is None else model.tokenizer.convert_tokens_to_ids(VOCABULARY)
    if found != [*range(len(VOCABULARY))] or model.tokens.eos != EOS:
        raise ValueError(
            "tokenizer: found 'symbols', expected none, because the model's own tokenizer is not that of graph problems"
        )


def _asked(feedback: str) -> str | None:
    """None where the setting is the default: a saved model then keeps the feedback it was saved with."""
    return None if feedback == "identity" else feedback


def _from_config(settings: CoconutArguments, examples: Sequence[Example], dtype: torch.dtype, feedback: str) -> Coconut:
    tokenizer = make_tokenizer(settings.tokenizer, examples)
    assert isinstance(settings.model, dict)
    config = make_config(settings.model, tokenizer)
    try:
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, LookupError) as error:  # LookupError: an unknown activation
        raise ValueError(f"model: {reason_of(error)}") from error
    tokens = add_latent_tokens(hf, tokenizer, trained=True)  # random rows, like all others
    if PAUSE in tokenizer.get_vocab():
        tokens = dataclasses.replace(tokens, pause=tokenizer.convert_tokens_to_ids(PAUSE))
    model = Coconut(hf, tokens, tokenizer=tokenizer, feedback=feedback)
    check_ragged(model.eval(), "model")
    return model


def _start_unused(model: Coconut, method: str) -> None:
    """Special tokens that the model's last run did not use start from `<<`, as the official code adds them after CoT.

    Here a CoT run's model has them too, and each step pushed them away as wrong answers, by AdamW's full step: also
    those that an earlier run had trained.
    """
    saved, tokens = model.settings, model.tokens
    if saved.curriculum is None or METHODS[method].slot is None:
        return
    marks = [] if saved.markers else [tokens.start, tokens.end]
    thought = [] if METHODS[saved.method].slot == "thought" else [tokens.thought]
    new = [token for token in (*marks, *thought) if token is not None]
    vocabulary = {} if model.tokenizer is None else model.tokenizer.get_vocab()
    known = torch.ones(model.hf.get_input_embeddings().weight.shape[0], dtype=torch.bool)
    known[new] = False
    start_rows(model.hf, new, vocabulary.get("<<"), known)


def make_tokenizer(name: str | None, examples: Sequence[Example]) -> Any:
    """ "words": made from the problems; "symbols": graph problems; else a hub id or a directory."""
    if name is None:
        raise ValueError(
            "tokenizer: found none, expected 'words', 'symbols', a hub id or a directory for a fresh model"
        )
    if name == "words":
        return word_tokenizer(examples)
    if name == "symbols":
        return symbolic_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"tokenizer: {name} does not load: {reason_of(error)}") from error


def make_config(model: dict[str, Any], tokenizer: Any) -> PreTrainedConfig:
    """{from_config: gpt2, n_layer: 2, ...} -> a configuration with the tokenizer's vocabulary."""
    wanted = dict(model)
    family = wanted.pop("from_config")
    try:
        known = AutoConfig.for_model(family)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"model: found from_config {family!r}, expected a family transformers has (gpt2, llama, qwen3, ...)"
        ) from error
    names = sorted({*known.to_dict(), *known.attribute_map})
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise ValueError(f"model: {family} has no setting {name!r}; the nearest it has is {near!r}")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = AutoConfig.for_model(family, **{"vocab_size": len(tokenizer), **special, **wanted})
    except Exception as error:  # transformers' checks of values raise their own classes
        raise ValueError(f"model: {' '.join(str(error).split())}") from error
    for name in SIZES:
        found = getattr(config, name, None)
        if found is not None and found < 1:
            raise ValueError(f"model: found {config.attribute_map.get(name, name)} {found}, expected 1 or more")
    return config


def _add_pause(model: Coconut) -> None:
    """Adds a pause token, whose embedding starts as a copy of the thought token's."""
    if model.tokenizer is None:
        raise ValueError("method: the pause methods need a tokenizer to add a token to, the model has none")
    model.tokenizer.add_tokens([PAUSE])
    pause = model.tokenizer.convert_tokens_to_ids(PAUSE)
    if len(model.tokenizer) > model.hf.get_input_embeddings().weight.shape[0]:
        model.hf.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    with torch.no_grad():
        for table in {model.hf.get_input_embeddings(), model.hf.get_output_embeddings()}:
            table.weight[pause] = table.weight[model.tokens.thought]
    model.tokens = dataclasses.replace(model.tokens, pause=pause)
