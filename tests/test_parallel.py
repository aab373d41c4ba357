"""Jacobi rounds: equal to sequential thinking from as many rounds as thoughts on, and to their definition before."""

from __future__ import annotations

import pytest
import torch

from coconut_fast import generate, load
from coconut_fast.model.batch import collate
from coconut_fast.tokens import IGNORE
from tests.families import TOKENS, make_pair, make_row

ROWS = [make_row(5, 4, 3, 1), make_row(17, 0, 3, 2), make_row(9, 2, 5, 3), [7, 94, 8, 94, 94, 6, 5, 4]]
BATCH = collate(ROWS, TOKENS.thought, [[IGNORE] * (len(r) - 3) + r[-3:] for r in ROWS])


def _run(model, rounds: int | None, loss_only: bool = False) -> tuple:
    model.zero_grad()
    model.settings.parallel_rounds = rounds
    output = model(batch=BATCH, loss_only=loss_only)
    output.loss.backward()
    return output, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("rounds", [4, 7])
def test_enough_rounds_equal_sequential_thinking(rounds: int) -> None:
    model, _ = make_pair("gpt2", torch.float64)
    expected, gradients = _run(model, None)
    found, found_gradients = _run(model, rounds)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.inputs_embeds, expected.inputs_embeds, rtol=1e-12, atol=1e-12)
    for name, a, b in zip(dict(model.named_parameters()), found_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_fewer_rounds_follow_the_definition(rounds: int) -> None:
    """Against rounds written out on an independent model, recomputing everything, gradients included."""
    model, plain = make_pair("gpt2", torch.float64)
    found, gradients = _run(model, rounds)
    total = 0
    for row in ROWS:
        ids = torch.tensor(row)
        words = plain.get_input_embeddings()(ids)
        at = (ids == TOKENS.thought).nonzero().flatten().tolist()
        x = words
        for r in range(rounds):
            cut = at[0] if at and r == 0 else len(row)  # the first thought is exact before any round
            hidden = plain.base_model(inputs_embeds=x[None, :cut], use_cache=False).last_hidden_state[0]
            fed = {t: hidden[t - 1] for t in at if t - 1 < cut}
            x = torch.stack([fed.get(t, words[t]) for t in range(len(row))])
        logits = plain(inputs_embeds=x[None], use_cache=False).logits[0]
        targets = torch.tensor([IGNORE] * (len(row) - 3) + row[-3:])
        total = total + torch.nn.functional.cross_entropy(logits[:-1], targets[1:], reduction="sum")
    loss = total / BATCH.num_targets
    loss.backward()
    torch.testing.assert_close(found.loss, loss, rtol=1e-12, atol=1e-12)
    for (name, p), g in zip(plain.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_training_step_computes_only_what_loss_and_thoughts_need(rounds: int) -> None:
    model, _ = make_pair("gpt2", torch.float64)
    expected, gradients = _run(model, rounds)
    counts: list[int] = []
    model.hf.transformer.h[-1].mlp.c_fc.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[1]))
    found, found_gradients = _run(model, rounds, loss_only=True)
    used = BATCH.passes[0].used
    assert used is not None and counts[0] == used.at.numel()
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-12)
    for name, a, b in zip(dict(model.named_parameters()), found_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


def test_a_second_backward_gives_the_same_gradients() -> None:
    model, _ = make_pair("gpt2", torch.float64)
    model.settings.parallel_rounds = 3
    loss = model(batch=BATCH).loss
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), first, strict=True))


def test_detached_thoughts_are_refused() -> None:
    """The gradients of parallel rounds reach all thoughts, so the setting would do nothing."""
    model, _ = make_pair("gpt2")
    model.settings.parallel_rounds, model.detach_after = 3, 1
    with pytest.raises(ValueError, match="^detach_after: found 1 with parallel_rounds, whose gradients reach all"):
        model(batch=BATCH)


@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_a_model_answers_by_the_rounds_it_was_trained_with(family: str, rounds: int, tmp_path) -> None:
    """Against the forward of training, token by token; alone and together, after saving and loading."""
    model, _ = make_pair(family)
    model.settings.parallel_rounds = rounds
    model.save_pretrained(tmp_path)
    model = load(tmp_path)
    prompts = [row[:-3] for row in ROWS]
    found = generate(model, prompts, max_new_tokens=4, return_thoughts=True)
    assert found.stats.backend == "parallel" and f"in {rounds} rounds" in found.stats.reason
    assert found.prompt_ids == prompts
    assert (found.stats.latent_passes, found.stats.thoughts) == (rounds, 9)
    for prompt, answer, thoughts_KD in zip(prompts, found.token_ids, found.thoughts, strict=True):
        row = list(prompt)
        for token in answer:
            output = model(torch.tensor([row]))
            assert output.logits[0, -1].argmax() == token
            row.append(token)
        at = [t for t, token in enumerate(prompt) if token == TOKENS.thought]
        states_TD = model(torch.tensor([prompt])).hidden_TD
        flat_TD = torch.cat(states_TD)[model_order(prompt)]
        torch.testing.assert_close(thoughts_KD, flat_TD[[t - 1 for t in at]].detach(), rtol=1e-4, atol=1e-5)
        assert generate(model, [prompt], max_new_tokens=4).token_ids == [answer]
    model.settings.parallel_rounds = None
    same = generate(model, prompts, max_new_tokens=4).token_ids == found.token_ids
    assert same == (rounds == 5), "so few rounds are an approximation, which this model shows"


def model_order(prompt: list[int]) -> torch.Tensor:
    return collate([prompt], TOKENS.thought).padded_at.argsort()
