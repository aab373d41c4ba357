"""Loading: Hugging Face directories and hub ids, output of model/saving.py, and the official code's checkpoints."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from coconut_fast.files import REPLACING
from coconut_fast.model.checks import check_feedback, check_finite, check_ragged
from coconut_fast.model.coconut import Coconut, SavedSettings
from coconut_fast.model.feedback import FEEDBACKS, make_feedback, name_of
from coconut_fast.model.saving import ADDED_WEIGHTS, COCONUT_JSON, FEEDBACK_WEIGHTS, TOKENIZER_FILES
from coconut_fast.tokens import END_LATENT, LATENT, START_LATENT, LatentTokens, check_same_tokens

REFERENCE_PREFIX = "base_causallm."
HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # gpt2, Qwen/Qwen2.5-0.5B
_KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # in safetensors


def load(
    path_or_id: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    tokens: LatentTokens | None = None,
    feedback: str | nn.Module | None = None,
    base: str | Path | None = None,
) -> Coconut:
    """A Coconut model, in evaluation mode, from any of:

    - a Hugging Face directory or hub id. With a tokenizer, the three special tokens are added if missing, and their
      rows start from the embedding of `<<` where the tokenizer has it, else from the mean embedding;
    - a directory written by `Coconut.save_pretrained`;
    - a reference checkpoint: a torch file with `base_causallm.*` keys, beside a `config.json`.

    device: default the CPU. dtype: a torch.dtype or its name, default (or "auto") the checkpoint's. tokens: for models
    without a tokenizer. feedback: a name (see FEEDBACKS) or a module, default that of the checkpoint. base: the
    directory or hub id that has the configuration and tokenizer of a torch file, default the file's folder.
    Raises ValueError for a path that is none of these, a pickle that holds more than tensors, weights that are missing
    or of another shape (in a torch file also unexpected ones; a Hugging Face directory may hold more than a language
    model), weights that are NaN or infinite, special tokens that cannot be determined, a model that cannot run ragged,
    and a feedback that does not map hidden states to embeddings (see model/checks.py).
    """
    path_or_id = check_path(path_or_id)
    device, dtype = _check_arguments(device, dtype, tokens)
    path = Path(path_or_id)
    trained_tokens = False
    if os.path.isfile(path):
        home: Path | str = path.parent if base is None else Path(base) if Path(base).is_dir() else str(base)
        hf, trained_tokens = _read_reference(path, home, dtype)
    else:
        hf = _read_hugging_face(path_or_id, dtype)
        home = path if os.path.isdir(path) else path_or_id

    saved = _read_coconut_json(home)
    tokenizer = _read_tokenizer(home)
    if tokens is None and saved is not None:
        tokens = saved["tokens"]
        check_same_tokens(tokens, tokenizer, str(home))
    if tokens is None:
        if tokenizer is None:
            raise ValueError(
                f"tokens: {path_or_id} has no tokenizer to take the special tokens from; expected one beside "
                "the weights, or tokens=LatentTokens(start=..., thought=..., end=..., eos=...)"
            )
        rows = hf.get_input_embeddings().weight.shape[0]
        tokens = add_latent_tokens(hf, tokenizer, trained=trained_tokens)
        if trained_tokens and len(tokenizer) > rows:
            raise ValueError(f"{path} has {rows} embeddings, expected one for each of the {len(tokenizer)} tokens")

    module = _read_feedback(feedback, saved, home, hf)
    if saved and _find(home, ADDED_WEIGHTS):
        warnings.warn(f"{path_or_id}: {ADDED_WEIGHTS} is left out, modules that its training added", stacklevel=2)
    model = Coconut(hf, tokens, tokenizer=tokenizer, feedback=module, settings=saved["settings"] if saved else None)
    model = model.to(device).eval()
    check_finite(model, path_or_id)
    check_ragged(model, path_or_id)
    check_feedback(model)
    return model


def check_path(path_or_id: str | os.PathLike[str]) -> str:
    """The path or hub id as text. ValueError if there is nothing that `load` could read; whether the hub has such an id
    is not asked."""
    if not isinstance(path_or_id, str | os.PathLike) or not os.fspath(path_or_id):
        raise ValueError(f"path_or_id: found {path_or_id!r}, expected a path or a hub id")
    path_or_id = os.fsdecode(path_or_id)
    path = Path(path_or_id)
    # If the parent folder exists, a mistyped run is not taken for a hub id, which would mean a slow request. (os.path's
    # tests, as pathlib's raise for a name that is too long, such as a prompt in a model's place, and for a folder
    # without access.)
    here = path.parent != Path(".") and os.path.isdir(path.parent)
    if not os.path.exists(path) and (here or not HUB_ID.fullmatch(path_or_id)):
        raise ValueError(f"no such file or directory: {path_or_id}")
    if os.path.isdir(path):
        if not os.access(path, os.R_OK | os.X_OK):
            raise ValueError(f"{path} may not be read, expected a model directory or a checkpoint file")
        if any(path.glob(f"{REPLACING}*")):
            raise ValueError(f"{path}: a process ended while it saved a model over another one here; save it again")
        if not os.path.isfile(path / "config.json"):
            raise ValueError(f"{path} has no config.json; expected a model directory or a checkpoint file")
    elif os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is a device, expected a model directory or a checkpoint file")
    return path_or_id


def _check_arguments(
    device: torch.device | str | None, dtype: torch.dtype | str | None, tokens: LatentTokens | None
) -> tuple[torch.device, torch.dtype | None]:
    """The device and the dtype; ValueError for arguments that `load` cannot use, before it reads a model."""
    kind = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    kind = None if kind == "auto" else kind
    if kind not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: found {dtype!r}, expected float64, float32, bfloat16 or float16, or 'auto'")
    if tokens is not None and not isinstance(tokens, LatentTokens):
        raise ValueError(f"tokens: found {tokens!r}, expected LatentTokens(thought=..., ...)")
    try:
        place = torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device: {device} cannot be used here ({str(error).splitlines()[0]})") from error
    if place.type == "meta":
        raise ValueError("device: meta cannot be used here (it has no memory)")
    return place, kind


def add_latent_tokens(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, trained: bool) -> LatentTokens:
    """Adds those of the three special tokens that are missing, and initialises their rows as the paper's code does.

    trained: the model has rows for them already, and only the tokenizer lacks them (official checkpoints).
    """
    vocabulary, rows = tokenizer.get_vocab(), hf.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens([t for t in (START_LATENT, END_LATENT, LATENT) if t not in vocabulary])
    if len(tokenizer) > rows:
        hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids([START_LATENT, LATENT, END_LATENT])
    if not trained:
        named = zip((START_LATENT, LATENT, END_LATENT), ids, strict=True)
        new = [i for name, i in named if name not in vocabulary or i >= rows]
        known = slice(min(len(vocabulary), rows))
        start_rows(hf, range(rows, hf.get_input_embeddings().weight.shape[0]), None, known)  # new to the model as well
        start_rows(hf, new, like if (like := vocabulary.get("<<", rows)) < rows else None, known)
    start, thought, end = ids
    return LatentTokens(start=start, thought=thought, end=end, eos=tokenizer.eos_token_id)


def start_rows(hf: PreTrainedModel, ids: Iterable[int], like: int | None, known: slice | torch.Tensor) -> None:
    """The embeddings of tokens `ids`, also in the head, start as that of `like`; None: as the mean of `known` ones."""
    with torch.no_grad():
        for weight in (hf.get_input_embeddings().weight, hf.get_output_embeddings().weight):  # tied: the same again
            weight[[*ids]] = weight[known].mean(0) if like is None else weight[like].clone()


def _read_hugging_face(path_or_id: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """Raises if weights are missing or do not fit; transformers would draw them at random, with a warning at most.

    The dtype is passed to transformers: `Module.to` would round buffers as well, such as rotary frequencies.
    """
    try:
        hf, found = AutoModelForCausalLM.from_pretrained(
            path_or_id, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # a configuration that makes no sense fails anywhere in transformers
        where = "" if os.path.isdir(path_or_id) else "no directory of that name is here, and from the hub it "
        torn = _torn(path_or_id) if isinstance(error, SafetensorError) else ""
        raise ValueError(
            f"{path_or_id}: {where}does not load as a causal language model: {torn}{reason_of(error)}"
        ) from error
    unfit = None
    if found["mismatched_keys"]:
        name, shape, expected = min(found["mismatched_keys"])
        unfit = f"{name} has shape {tuple(shape)}, expected {tuple(expected)}"
    elif found["missing_keys"]:
        unfit = _difference(sorted(found["missing_keys"]), sorted(found["unexpected_keys"]))
    if unfit:
        raise ValueError(f"{path_or_id}: the weights do not fit config.json: {unfit}")
    if getattr(hf.config, "quantization_config", None) is None:
        for file in _weight_files(Path(path_or_id)):
            with safe_open(file, "pt") as stored:
                names = stored.keys()
                _check_floating(hf, {name: stored.get_slice(name).get_dtype() for name in names}, file)
    return hf


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors that transformers reads from a directory; none for a hub id or weights in another format."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    return sorted({directory / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})


def _check_floating(hf: PreTrainedModel, kinds: dict[str, str], file: Path) -> None:
    """ValueError for a weight that is stored as integers, say of a quantised model: its parameter would take them as
    they are. kinds: by name, as safetensors writes them."""
    names = {name for name, _ in hf.named_parameters(remove_duplicate=False)}
    names |= {name.removeprefix(f"{hf.base_model_prefix}.") for name in names}
    for name, kind in kinds.items():
        if name in names and kind not in _KINDS.values():
            raise ValueError(f"{file}: {name} is stored as {kind}, expected {', '.join(_KINDS.values())}")


def _difference(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    return f"missing {list(missing)[:3] or 'nothing'}, unexpected {list(unexpected)[:3] or 'nothing'}"


def reason_of(error: Exception) -> str:
    """The first line of a library's error; the next ones are advice on how to call that library."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    kind = f"{type(error).__name__}: " if isinstance(error, LookupError) else ""  # its text is only the key
    return kind + " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1])


def _torn(directory: str) -> str:
    """The first weight file that does not open (broken download), as a prefix for the reason; else empty."""
    for file in sorted(Path(directory).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            return f"{file.name}: "
    return ""


def _read_reference(path: Path, home: Path | str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, bool]:
    """Reads a state dict of the reference's Coconut module or a plain model (its CoT checkpoints), config from `home`.

    The second value says whether the rows for the special tokens are trained: they are in the former, and if there are
    more rows than in the configuration (the official code's runs without thoughts).
    """
    if isinstance(home, Path) and not (home / "config.json").is_file():
        raise ValueError(
            f"{path} needs the model's config.json beside it, or base=... (--base), a directory or hub id that has it; "
            f"there is none in {home}"
        )
    state = {_unwrapped(k): v for k, v in _read_pickle(path).items()}
    is_coconut = any(k.startswith(REFERENCE_PREFIX) for k in state)
    if is_coconut:
        # `embedding.weight` is the same tensor as the model's own table.
        state = {k.removeprefix(REFERENCE_PREFIX): v for k, v in state.items() if k.startswith(REFERENCE_PREFIX)}
    if dtype is None:
        dtype = next((v.dtype for v in state.values() if v.is_floating_point()), None)
    try:
        config = AutoConfig.from_pretrained(home)
        with no_init_weights():  # all are loaded below; initialising them took two thirds of the time
            hf = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # a configuration that makes no sense fails anywhere in transformers
        raise ValueError(f"the configuration of {home} does not load: {reason_of(error)}") from error
    hf.tie_weights()  # skipped with the initialisation; a tied head need not be in the file
    _check_floating(hf, {name: _KINDS.get(tensor.dtype, str(tensor.dtype)) for name, tensor in state.items()}, path)
    has_more_rows = _load_state(hf, state, path, home)
    return hf, is_coconut or has_more_rows


def _load_state(hf: PreTrainedModel, state: dict[str, torch.Tensor], path: Path, home: Path | str) -> bool:
    """Loads weights by name, with as many rows of embeddings as there are; whether these are more than `hf` had.

    ValueError for weights that are missing, unexpected or of another shape, or that differ where `hf` ties them.
    """
    names = [k for k, p in hf.named_parameters(remove_duplicate=False) if p is hf.get_input_embeddings().weight]
    table = next((k for k in names if k in state and state[k].dim() == 2), None)
    rows = hf.get_input_embeddings().weight.shape[0]
    has_more_rows = table is not None and state[table].shape[0] > rows
    if table is not None and state[table].shape[0] != rows:
        hf.resize_token_embeddings(state[table].shape[0], mean_resizing=False)
    try:
        missing, unexpected = hf.load_state_dict(state, strict=False)
    except RuntimeError as error:
        wrong = [line.strip() for line in str(error).splitlines()[1:]]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{path} does not fit {home}: {wrong[0] if wrong else error}{more}") from error
    # Old releases of transformers saved constant buffers; a tied head is not saved twice.
    unexpected = [k for k in unexpected if not k.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"))]
    missing = [k for k in missing if k not in names or table is None]
    if missing or unexpected:
        raise ValueError(f"{path} does not fit {home}: {_difference(missing, unexpected)}")
    for name in names:  # one of them would be silently dropped
        if name in state and table is not None and not _same(state[name], state[table]):
            raise ValueError(f"{path} does not fit {home}: {name} differs from {table}, which config.json ties it to")
    return has_more_rows


def _unwrapped(name: str) -> str:
    """A weight's name without those of wrappers around the model that was saved (DDP, torch.compile)."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:  # bytes that are no pickle make the unpickler fail in many ways
        with open(path, "rb") as file:
            pickled = file.read(1) in (b"\x80", b"P")  # a bare pickle, or one in a zip file
        if pickled and isinstance(error, pickle.UnpicklingError):
            raise ValueError(f"{path} is refused: it holds more than tensors, and loading it could run code") from error
        reason = reason_of(error) if pickled else "it is none at all" if path.stat().st_size else "it is empty"
        raise ValueError(f"{path} is not a whole torch checkpoint: {reason}") from error
    tensors = isinstance(state, dict) and all(isinstance(v, torch.Tensor) for v in state.values())
    if not tensors or not all(isinstance(k, str) for k in state):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    return state


def _read_tokenizer(home: Path | str) -> PreTrainedTokenizerBase | None:
    if not any(_find(home, f) for f in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(home)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"the tokenizer of {home} does not load: {error}") from error


def _find(home: Path | str, name: str) -> Path | None:
    """A file of a model's directory or of its repository on the hub; None if it is not there."""
    if isinstance(home, Path):
        return home / name if (home / name).is_file() else None
    from transformers.utils import cached_file

    found = cached_file(home, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _read_coconut_json(home: Path | str) -> dict[str, Any] | None:
    """tokens (LatentTokens), settings (SavedSettings) and the feedback's name; None without the file."""
    file = _find(home, COCONUT_JSON)
    if file is None:
        return None
    try:
        saved = json.loads(file.read_text("utf-8"))
        known = {f.name for f in fields(SavedSettings)}
        saved["settings"] = SavedSettings(**{k: v for k, v in saved["settings"].items() if k in known})
        saved["tokens"] = LatentTokens(**saved["tokens"])
        if not isinstance(saved["feedback"], str):
            raise TypeError(f"feedback: found {saved['feedback']!r}, expected its name")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{file}: expected tokens, settings and feedback as JSON, found {error!r}") from error
    return saved


def _read_feedback(
    asked: str | nn.Module | None, saved: dict[str, Any] | None, home: Path | str, hf: PreTrainedModel
) -> nn.Module:
    if isinstance(asked, nn.Module):
        module, name = asked, name_of(asked)
    else:
        name = asked or (saved["feedback"] if saved else "identity")
        if asked is None and name not in FEEDBACKS:
            raise ValueError(f"feedback: {home} was saved with a module of its own, {name!r}; expected feedback=module")
        module = make_feedback(name, hf.get_input_embeddings())
    if saved and saved["feedback"] != name and _find(home, FEEDBACK_WEIGHTS):
        warnings.warn(
            f"feedback: {home} was saved with {saved['feedback']!r}, whose weights are left out; {name!r} starts as it "
            "is. To wrap a trained feedback, load it first and then set model.feedback",
            stacklevel=3,
        )
    if saved and saved["feedback"] == name and module.state_dict():
        weights = _find(home, FEEDBACK_WEIGHTS)
        if weights is None:
            raise ValueError(f"{home} has no {FEEDBACK_WEIGHTS}, the weights of its feedback {name!r}")
        try:
            module.load_state_dict(load_file(weights))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{weights} does not load as a feedback {name!r}: {reason}") from error
    return module
