"""Agreement with the official implementation: loss, logits, embeddings, gradients and greedy tokens."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coconut_fast import Coconut, LatentTokens, generate, load

ARCHITECTURES = ["gpt2", "llama", "qwen2"]
CASES = ["single_k0", "single_k1", "single_k6", "ragged_prompt_k3", "ragged_k", "mixed_with_no_latent", "no_markers"]
RELATIVE = 1e-5  # the contract's bar for fp32, relative to the largest value


@cache
def _golden(folder: Path) -> tuple[dict, dict, Coconut]:
    meta = json.loads((folder / "meta.json").read_text())
    ids = LatentTokens(start=meta["start_id"], thought=meta["latent_id"], end=meta["end_id"], eos=meta["eos_id"])
    return meta, load_file(folder / "expected.safetensors"), load(folder, tokens=ids)


def _agree(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= RELATIVE, f"{what}: off by {error:.2e} relative, {RELATIVE:.0e} is allowed"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_and_gradients(golden: Path, architecture: str, case: str) -> None:
    _, expected, model = _golden(golden / architecture)
    batch = {k: expected[f"{case}/{k}"] for k in ("input_ids", "attention_mask", "position_ids", "labels")}
    model.zero_grad()
    output = model(**batch)
    real = batch["attention_mask"].bool()
    _agree(output.loss, expected[f"{case}/loss"], "loss")
    _agree(output.logits[real], expected[f"{case}/logits"][real], "logits")
    _agree(output.inputs_embeds[real], expected[f"{case}/inputs_embeds"][real], "inputs_embeds")
    output.loss.backward()
    prefix = f"{case}/grad/"
    gradients = {k.removeprefix(prefix): v for k, v in expected.items() if k.startswith(prefix)}
    ours = {k: p.grad for k, p in model.hf.named_parameters()}
    for name, gradient in gradients.items():
        _agree(ours[name.removeprefix("base_causallm.")], gradient, f"gradient of {name}")
    assert bool(gradients) == (case in ("single_k6", "ragged_k", "mixed_with_no_latent"))


@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("runner")
def test_greedy_tokens(golden: Path, architecture: str, batch_size: int | None) -> None:
    """Every row of every case in one call, with mixed thought counts; the same for any batch size."""
    meta, _, model = _golden(golden / architecture)
    rows = [row for case in meta["cases"].values() for row in case["generate"]]
    answers = generate(model, [r["prompt"] for r in rows], max_new_tokens=24, batch_size=batch_size).token_ids
    for row, answer in zip(rows, answers, strict=True):
        expected = row["tokens"][len(row["prompt"]) :]
        # The official loop does not check the first new token: it continues after an end-of-text there. Our answers
        # end at an end-of-text wherever it comes.
        expected = expected[: expected.index(meta["eos_id"])] if meta["eos_id"] in expected else expected
        assert answer == expected


def test_reference_checkpoint_has_the_same_weights(golden: Path) -> None:
    _, _, model = _golden(golden / "gpt2")
    loaded = load(golden / "checkpoint" / "checkpoint_1", tokens=model.tokens)
    ours, theirs = loaded.hf.state_dict(), model.hf.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
