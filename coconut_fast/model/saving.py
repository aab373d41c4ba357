"""Saving a model, as a directory that appears whole or not at all and that model/loading.py reads.

It is an ordinary Hugging Face model (config.json, model.safetensors, tokenizer files) plus `coconut.json` (special
tokens, settings, the feedback's name), `feedback.safetensors` if the feedback has weights, and `added.safetensors` if
training added modules to the model (an auxiliary decoder, say).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from coconut_fast.files import REPLACING, UNFINISHED, check_folder, not_written, reserve, sync, sync_folder
from coconut_fast.model.feedback import name_of
from coconut_fast.tokens import check_same_tokens

if TYPE_CHECKING:
    from coconut_fast.model.coconut import Coconut

COCONUT_JSON = "coconut.json"
FEEDBACK_WEIGHTS = "feedback.safetensors"
ADDED_WEIGHTS = "added.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
)  # every tokenizer has one
# What a saved model may consist of: none of an older model's stays, or it would be loaded with the newer one.
OURS = (
    FEEDBACK_WEIGHTS, ADDED_WEIGHTS, "model.safetensors", "model.safetensors.index.json",
    "model-?????-of-?????.safetensors", *TOKENIZER_FILES, "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "additional_chat_templates",
)  # fmt: skip


def save(model: Coconut, directory: str | Path) -> None:
    """See Coconut.save_pretrained. The directory appears whole: written elsewhere, synced, then renamed."""
    check_folder(directory, "directory")
    check_same_tokens(model.tokens, model.tokenizer, "model")
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Within a run's directory, whose next start removes what a killed process left under this name.
    place = target if target.is_dir() else target.parent
    temporary = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=place))
    names: list[str] = []
    try:
        write(model, temporary)
        sync(temporary)
        os.chmod(temporary, 0o755)
        names = [file.name for file in temporary.iterdir()]
        if not _renamed(temporary, target):
            # Other files (a trainer's state, say) stay; each of ours is replaced atomically. By this name `load`
            # recognises a directory that mixes files of two models.
            with reserve(temporary, "directory"):
                temporary = temporary.rename(target / temporary.name.replace(UNFINISHED, REPLACING))
                for name in names:
                    if (target / name).is_dir():  # of chat templates
                        shutil.rmtree(target / name)
                    os.replace(temporary / name, target / name)
            for path in [found for pattern in OURS for found in target.glob(pattern) if found.name not in names]:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            sync_folder(target)
            for marker in target.glob(f"{REPLACING}*"):  # those of killed processes, but not of others that save here
                with suppress(ValueError, OSError), reserve(marker, "directory"):
                    shutil.rmtree(marker, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise not_written(target, error) from error
    finally:
        if all((temporary / name).exists() for name in names):  # else the directory mixes two models, as its name says
            shutil.rmtree(temporary, ignore_errors=True)


def _renamed(temporary: Path, target: Path) -> bool:
    """Renames a directory to `target`; False where there is one, perhaps since a moment ago, of another process."""
    try:
        if not target.is_dir():
            os.rename(temporary, target)
            sync_folder(target.parent)
            return True
    except OSError:
        if not target.is_dir():
            raise
    return False


def write(model: Coconut, directory: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Writes the files of a saved model to an existing directory. state: its weights, if those in it are sharded."""
    state = model.state_dict() if state is None else state
    hf_state = {k.removeprefix("hf."): v for k, v in state.items() if k.startswith("hf.")}
    check_merged(model)
    model.hf.save_pretrained(directory, state_dict=hf_state)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(directory)
    others = {  # copies, as safetensors refuses tensors that share memory (tied weights)
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
        for k, v in state.items()
        if not k.startswith("hf.")
    }
    weights = {k.removeprefix("feedback."): v for k, v in others.items() if k.startswith("feedback.")}
    added = {k: v for k, v in others.items() if not k.startswith("feedback.")}
    if weights:
        save_file(weights, directory / FEEDBACK_WEIGHTS)
    if added:
        save_file(added, directory / ADDED_WEIGHTS)
    saved = {
        "format": 1,
        "tokens": asdict(model.tokens),
        "settings": asdict(model.settings),
        "feedback": name_of(model.feedback),
    }
    (directory / COCONUT_JSON).write_text(json.dumps(saved, indent=2) + "\n", "utf-8")
    for file in directory.glob("*.safetensors"):  # since 0.8 safetensors lets only their owner read them
        shutil.copymode(directory / COCONUT_JSON, file)


def check_merged(model: Coconut) -> None:
    """ValueError for a model with adapters (peft's), whose weights are split as in no plain model."""
    if any(name.endswith(".base_layer") for name, _ in model.hf.named_modules()):
        raise ValueError(
            "hf: the model has adapters, which a saved model cannot hold; merge them first (merge_and_unload() of peft)"
        )
