"""Feedbacks: what each of them computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from coconut_fast import Coconut, generate, ops
from coconut_fast.model.feedback import make_feedback
from coconut_fast.train.run import run
from coconut_fast.train.trainer import CoconutTrainer
from tests.families import TOKENS, VOCAB, make_hf
from tests.runs import tiny


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_rescale_gives_the_mean_norm_of_the_embeddings(family: str) -> None:
    """As they enter the body: Gemma's embedding module multiplies the rows of its table by sqrt(D)."""
    embedding = make_hf(family).get_input_embeddings()
    feedback = make_feedback("rescale", embedding)
    expected = embedding(torch.arange(VOCAB)).norm(dim=-1).mean().detach()
    assert (expected / embedding.weight.norm(dim=-1).mean() > 5) == (family != "gpt2")
    for dtype in (torch.float32, torch.float64):
        norm = feedback(torch.randn(5, 32, dtype=dtype) * 40).norm(dim=-1)
        torch.testing.assert_close(norm, expected.expand(5).to(dtype), rtol=1e-6, atol=0.0)
    beyond = feedback(torch.full((1, 32), 3e4, dtype=torch.float16))  # of a norm that is no fp16
    torch.testing.assert_close(beyond.float().norm(), expected, rtol=1e-3, atol=0.0)


def test_projection_is_linear_gelu_linear_norm() -> None:
    projection, hidden_BD = make_feedback("projection", make_hf("gpt2").get_input_embeddings()), torch.randn(3, 32)
    with torch.no_grad():
        for p in projection.parameters():
            p.copy_(torch.randn_like(p))
    first, _, second, norm = projection
    inner_BD = functional.linear(hidden_BD, first.weight, first.bias)
    outer_BD = functional.linear(functional.gelu(inner_BD), second.weight, second.bias)
    expected = functional.layer_norm(outer_BD, (32,), norm.weight, norm.bias)
    torch.testing.assert_close(projection(hidden_BD), expected, rtol=1e-5, atol=1e-5)
    narrow = make_feedback("projection", make_hf("gpt2", torch.bfloat16).get_input_embeddings())
    assert narrow(hidden_BD.bfloat16()).dtype == torch.bfloat16, "of a bf16 model"


def test_pause_is_one_embedding_that_begins_as_their_mean() -> None:
    embedding = make_hf("gpt2").get_input_embeddings()
    found = make_feedback("pause", embedding)(torch.randn(3, 32))
    torch.testing.assert_close(found, embedding.weight.mean(0).expand(3, 32))


def test_a_feedback_may_compute_in_fp32() -> None:
    class Wide(nn.Module):
        def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
            return hidden_BD.float()

    with ops.use("torch"):
        found, expected = (
            generate(
                Coconut(make_hf("llama", torch.bfloat16), TOKENS, feedback=feedback),
                [[4, 5, *[TOKENS.thought] * 3, 6]],
                max_new_tokens=4,
            )
            for feedback in (Wide(), "identity")
        )
    assert found.token_ids == expected.token_ids


def test_a_run_refuses_a_feedback_that_its_checkpoints_could_not_be_loaded_with(tmp_path) -> None:
    class Own(CoconutTrainer):
        def __init__(self, model: Coconut, *arguments: Any) -> None:
            model.feedback = nn.Linear(16, 16)
            super().__init__(model, *arguments)

    with pytest.raises(ValueError, match="feedback: found a Linear, which no checkpoint could be loaded with again"):
        run(tiny(tmp_path), Own)
    assert not list((tmp_path / "runs" / "tiny").glob("checkpoint-*"))
