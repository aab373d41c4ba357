"""Every family against the oracle that recomputes everything: forward, gradients, greedy tokens; and independence."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch

from coconut_fast import generate, reference
from coconut_fast.model import attention, coconut
from coconut_fast.model.batch import collate
from coconut_fast.model.cache import KVCache
from coconut_fast.model.last_layer import decoder_layers, joint_projections, token_wise
from coconut_fast.model.weight import Weight
from coconut_fast.tokens import IGNORE
from tests.compare import assert_as_good_as_torch
from tests.families import FAMILIES, TOKENS, make_pair, make_row

# (question, thoughts, tail): ragged prompts, ragged thought counts, none, and rows longer than every window
SHAPES = [(5, 3, 4), (17, 0, 3), (3, 1, 6), (11, 6, 2)]


def _batch() -> tuple[list[list[int]], list[list[int]]]:
    rows = [make_row(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    rows.append(rows[0][:4])  # no special token at all
    labels = [[IGNORE] * (len(r) - 3) + r[-3:] for r in rows]
    return rows, labels


def _oracle(model: torch.nn.Module, rows: list, labels: list) -> tuple[torch.Tensor, list, list, dict]:
    model.zero_grad()
    each = [
        reference.forward(model, torch.tensor(r), torch.tensor(y), TOKENS.thought)
        for r, y in zip(rows, labels, strict=True)
    ]
    loss = sum(e[0] for e in each) / sum(t != IGNORE for y in labels for t in y[1:])
    loss.backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), [e[1].detach() for e in each], [e[2].detach() for e in each], gradients


# Only GPT-2 is fp64 throughout: the others' norms and rotations compute in fp32 whatever the model's dtype.
EVERY = [(family, torch.float32) for family in FAMILIES] + [("gpt2", torch.float64)]


@pytest.mark.parametrize("loss_only", [False, True], ids=["whole", "loss_only"])
@pytest.mark.parametrize(("family", "dtype"), EVERY)
def test_forward_and_gradients_agree_with_the_oracle(family: str, dtype: torch.dtype, loss_only: bool) -> None:
    ours, plain = make_pair(family, dtype)
    rows, labels = _batch()
    tokens: list[int] = []
    last = decoder_layers(ours.hf)[-1]
    narrowed = 2 if family in ("phi3", "gpt_neox") else 3
    assert len(token_wise(last) + joint_projections(last)) == narrowed, "output projection, MLP, and mostly queries"
    first_product = next(last.mlp.children())
    first_product.register_forward_hook(lambda module, args, output: tokens.append(args[0].shape[1]))
    output = ours(batch=collate(rows, TOKENS.thought, labels), loss_only=loss_only)
    assert tokens[0] == (11 if loss_only else 48), "tokens of the first pass in the last MLP"
    output.loss.backward()
    gradients = {k: p.grad for k, p in ours.hf.named_parameters() if p.grad is not None}
    of_plain = _oracle(plain, rows, labels)
    of_truth = _oracle(plain.double(), rows, labels)
    assert_as_good_as_torch(output.loss.detach(), of_plain[0], of_truth[0], what="loss")
    if loss_only:
        with pytest.raises(ValueError, match="loss_only"):
            _ = output.logits
    for b, row in enumerate(rows):
        for name, i in (("inputs_embeds", 2),) if loss_only else (("logits", 1), ("inputs_embeds", 2)):
            got = getattr(output, name)[b, : len(row)].detach()
            assert_as_good_as_torch(got, of_plain[i][b], of_truth[i][b], what=f"{name} of row {b}")
    assert gradients.keys() == of_plain[3].keys()
    for name, gradient in gradients.items():
        assert_as_good_as_torch(gradient, of_plain[3][name], of_truth[3][name], what=f"gradient of {name}", ulps=32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_as_good_as_torch(family: str, dtype: torch.dtype) -> None:
    ours, plain = make_pair(family, dtype)
    rows, labels = _batch()
    with torch.no_grad():
        logits = ours(batch=collate(rows, TOKENS.thought, labels)).logits
        for b, row in enumerate(rows):
            args = (torch.tensor(row), torch.tensor(labels[b]), TOKENS.thought)
            of_plain = reference.forward(plain, *args)[1]
            of_truth = reference.forward(make_pair(family, dtype)[1].double(), *args)[1]
            assert_as_good_as_torch(logits[b, : len(row)], of_plain, of_truth, what=f"logits of row {b}")


@pytest.mark.usefixtures("runner")
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_the_oracle(family: str) -> None:
    ours, plain = make_pair(family)
    prompts = [make_row(n, k, 0, seed=i) for i, (n, k, _) in enumerate(SHAPES)] + [make_row(4, 0, 0, 9)[:3]]
    expected = [
        reference.generate(plain, torch.tensor(p), TOKENS.thought, TOKENS.eos, max_new_tokens=12) for p in prompts
    ]
    assert generate(ours, prompts, max_new_tokens=12).token_ids == expected
    assert generate(ours, prompts[::-1], max_new_tokens=12, batch_size=2).token_ids == expected[::-1]


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    ours, _ = make_pair("gpt2", torch.float64)
    rows, labels = _batch()
    together = ours(batch=collate(rows, TOKENS.thought, labels)).logits
    for b, row in enumerate(rows):
        alone = ours(batch=collate([row], TOKENS.thought, [labels[b]])).logits[0]
        torch.testing.assert_close(together[b, : len(row)], alone, rtol=1e-13, atol=1e-13)


def test_gradcheck_through_the_cache() -> None:
    """Three passes of two rows, by finite differences: every query, key and value, whichever pass reads them."""
    counts, rng = [[3, 1], [1, 0], [2, 2]], torch.Generator().manual_seed(0)
    shapes = [(heads, sum(c)) for c in counts for heads in (2, 1, 1)]
    inputs = [torch.randn(1, *s, 3, generator=rng, dtype=torch.float64, requires_grad=True) for s in shapes]
    layer = torch.nn.Module()
    layer.layer_idx = 0

    def passes(*tensors: torch.Tensor) -> torch.Tensor:
        cache = KVCache(1, num_slots=32, max_rows=2)
        rows, outputs = cache.alloc(2), []
        for i, count in enumerate(counts):
            live = [(row, n) for row, n in zip(rows, count, strict=True) if n]
            ragged = cache.append([row for row, _ in live], [n for _, n in live])
            outputs.append(attention.attend(layer, *tensors[3 * i : 3 * i + 3], None, ragged=ragged)[0])
        cache.seal()
        return torch.cat(outputs, dim=1)

    assert torch.autograd.gradcheck(passes, inputs)


def test_200_steps_stay_with_the_oracle() -> None:
    """fp32, AdamW, the same seed: rounding may grow over the steps, but the losses stay within 1e-4."""
    ours, plain = make_pair("gpt2")
    rows = [make_row(4, 2, 3, seed=i) for i in range(2)]
    labels = [[IGNORE] * (len(r) - 3) + r[-3:] for r in rows]
    batch = collate(rows, TOKENS.thought, labels)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.01) for m in (ours, plain)]
    history: list[tuple[float, float]] = []
    for _ in range(200):
        of_ours = ours(batch=batch).loss
        each = [
            reference.forward(plain, torch.tensor(r), torch.tensor(y), TOKENS.thought)[0]
            for r, y in zip(rows, labels, strict=True)
        ]
        losses = (of_ours, torch.stack(each).sum() / batch.num_targets)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        history.append((losses[0].item(), losses[1].item()))
    assert history[-1][0] < 0.1 * history[0][0], "nothing was learned, so nothing was compared"
    assert max(abs(a - b) for a, b in history) < 1e-4


def test_gradients_flow_from_the_tail_to_the_thoughts() -> None:
    """The tail reads the thoughts' keys and values from the cache; a cache that drops their gradient trains nothing."""
    ours, _ = make_pair("gpt2", torch.float64)
    row = make_row(5, 3, 4, seed=1)
    batch = collate([row], TOKENS.thought, [[IGNORE] * (len(row) - 1) + row[-1:]])
    output = ours(batch=batch)
    thoughts = list(output.hidden_TD[:-1])
    for h in thoughts:
        h.retain_grad()
    output.loss.backward()
    assert all(h.grad[-1].abs().max() > 1e-6 for h in thoughts)


@pytest.mark.parametrize("detach_after", [0, 1, 2, 9])
def test_detach_after_cuts_the_feedback_only(detach_after: int) -> None:
    """Against the oracle with the same cut; detached thoughts still pass gradients through keys and values."""
    ours, plain = make_pair("gpt2", torch.float64)
    rows = [make_row(5, 4, 3, seed=1), make_row(9, 2, 3, seed=2)]
    labels = [[IGNORE] * (len(r) - 3) + r[-3:] for r in rows]
    ours.detach_after = detach_after
    ours(batch=collate(rows, TOKENS.thought, labels)).loss.backward()
    total = 0
    for row, label in zip(rows, labels, strict=True):
        ids, count = torch.tensor(row), row.count(TOKENS.thought)
        calls = iter(range(count, 0, -1))  # this thought is the n-th from the end
        cut = lambda h: h.detach() if next(calls) > detach_after else h  # noqa: B023, E731
        total = total + reference.forward(plain, ids, torch.tensor(label), TOKENS.thought, cut)[0]
    (total / 6).backward()
    for (name, p), q in zip(ours.hf.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-13, msg=name)


def test_a_second_backward_gives_the_same_gradients() -> None:
    ours, _ = make_pair("gpt2", torch.float64)
    rows, labels = _batch()
    loss = ours(batch=collate(rows, TOKENS.thought, labels)).loss
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(ours.parameters(), first, strict=True))


@pytest.mark.parametrize("rounds", [None, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointed_passes_give_the_same_gradients(dropout: float, rounds: int | None) -> None:
    ours, _ = make_pair("gpt2", attn_pdrop=dropout, resid_pdrop=dropout)
    ours.train()
    ours.settings.parallel_rounds, ours.defer_weight_gradients = rounds, False
    rows, labels = _batch()
    gradients = []
    for ours.checkpoint_passes in (False, True):
        torch.manual_seed(4)
        ours.zero_grad()
        ours(batch=collate(rows, TOKENS.thought, labels)).loss.backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("rounds", [None, 3])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_leaves_nothing_behind(checkpointed: bool, rounds: int | None, monkeypatch) -> None:
    """The cache and the autograd graph refer to each other in forward; Python's collector cannot see through that."""
    caches = []
    kind = "Storage" if rounds is None else "KVCache"
    make = getattr(coconut, kind)
    monkeypatch.setattr(coconut, kind, lambda *a, **k: caches.append(weakref.ref(c := make(*a, **k))) or c)
    ours, _ = make_pair("gpt2")
    ours.checkpoint_passes, ours.settings.parallel_rounds = checkpointed, rounds
    rows, labels = _batch()
    for _ in range(2):
        ours(batch=collate(rows, TOKENS.thought, labels)).loss.backward()
    gc.collect()
    assert [c() for c in caches] == [None, None]


def test_another_attention_is_refused_with_advice() -> None:
    """It would silently treat all rows of a batch as one."""
    ours, _ = make_pair("gemma3_text")
    ours.hf.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"^hf: its attention is 'sdpa', expected 'coconut_fast'; model\.hf\.set_attn"):
        ours(torch.tensor([[4, 5, 6]]))
    with pytest.raises(ValueError, match="^hf: its attention is 'sdpa'"):
        generate(ours, [[4, 5, 6]])
    ours.hf.set_attn_implementation("coconut_fast")
    assert generate(ours, [[4, 5, 6]], max_new_tokens=1).token_ids


def test_the_hugging_face_model_by_itself_is_refused_with_advice() -> None:
    ours, _ = make_pair("gpt2")
    with pytest.raises(ValueError, match="set_attn_implementation"):
        ours.hf(torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"input_ids": [[1, 96]]}, "input_ids: found 96, expected 0 to 95"),
        ({"input_ids": [[1, -1]]}, "input_ids: found -1, expected 0 to 95"),
        ({"input_ids": [[1, 2]], "labels": [[-100, 97]]}, "labels: found 97, expected 0 to 95"),
        ({"input_ids": [[1, 2]], "position_ids": [[0, 256]]}, "position_ids: found 256, expected 0 to 255"),
        ({"input_ids": [[1] * 257]}, "position_ids: found 256, expected 0 to 255"),
        ({"input_ids": [[1.0, 2.0]]}, "input_ids: expected integers, found torch.float32"),
    ],
)
def test_what_the_model_has_not_is_refused(keywords, message):
    model, _ = make_pair("llama")
    with pytest.raises(ValueError, match=message):
        model(**{name: torch.tensor(value) for name, value in keywords.items()})


@pytest.mark.parametrize(
    ("family", "made"),
    [
        ("gpt2", {(48, 96): 1, (48, 64): 1, (11, 32): 3, (48, 32): 2}),  # fused; keys and values; queries and outputs
        ("llama", {(48, 16): 4, (11, 32): 3, (48, 32): 3}),  # keys and values; queries and outputs
    ],
)
def test_queries_that_nobody_reads_are_not_made(family: str, made: dict, monkeypatch) -> None:
    """Products of the first pass by rows and width: 48 tokens, of which 11 are used."""
    products: Counter[tuple[int, int]] = Counter()
    times = Weight.times

    def counted(self: Weight, x: torch.Tensor) -> torch.Tensor:
        products[len(x), self.matrix.shape[1]] += 1
        return times(self, x)

    monkeypatch.setattr(Weight, "times", counted)
    ours, _ = make_pair(family)
    rows, labels = _batch()
    ours(batch=collate(rows, TOKENS.thought, labels), loss_only=True)
    assert {kind: products[kind] for kind in made} == made


def test_the_last_layer_takes_the_weights_that_are_there_when_it_runs():
    """FSDP puts the unsharded weights into a layer when its forward begins."""
    model, _ = make_pair("gpt2")
    rows, labels = _batch()
    batch = collate(rows, TOKENS.thought, labels)
    expected = model(batch=batch, loss_only=True).loss
    last = model.hf.transformer.h[-1]
    joint, whole = last.attn.c_attn, last.attn.c_attn.weight
    joint.weight = torch.nn.Parameter(torch.zeros_like(whole))
    last.register_forward_pre_hook(lambda *_: setattr(joint, "weight", whole))
    assert torch.equal(model(batch=batch, loss_only=True).loss, expected)


def test_a_replaced_forward_in_the_last_layer_is_kept():
    """accelerate's hooks and others' patches are attributes of the instance."""
    model, _ = make_pair("gpt2")
    mlp = model.hf.transformer.h[-1].mlp
    plain = mlp.forward
    mlp.forward = patched = lambda x: 2 * plain(x)
    ids = torch.tensor([make_row(20, 3, 2, 1)])
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    whole = model(ids, labels=labels).loss
    assert torch.allclose(model(ids, labels=labels, loss_only=True).loss, whole)
    assert vars(mlp)["forward"] is patched


def test_a_result_may_be_written_in_place():
    """Gemma 3n multiplies the output of a projection in place."""
    model, _ = make_pair("llama")
    for layer in model.hf.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, inputs, y: y.mul_(2.0))
    ids = torch.tensor([make_row(9, 2, 2, 1)])
    model(ids, labels=ids).loss.backward()
    deferred = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.defer_weight_gradients = False
    model(ids, labels=ids).loss.backward()
    for p, grad in zip(model.parameters(), deferred, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


def test_labels_of_which_none_counts_have_a_loss():
    model, _ = make_pair("llama")
    ids = torch.tensor([make_row(9, 2, 2, 1)])
    output = model(ids, labels=torch.full_like(ids, IGNORE))
    assert output.loss.item() == 0 and model(ids).loss is None
    output.loss.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_second_derivatives_are_refused():
    """They would miss what goes through attention and the cache."""
    model, _ = make_pair("gpt2")
    ids = torch.tensor([make_row(9, 2, 2, 1)])
    grads = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in grads).backward()


def test_dropout_of_attention_differs_from_step_to_step_and_layer_to_layer(monkeypatch) -> None:
    """One mask for a whole run, or for all layers, would train as well as any and regularise less."""
    ours, _ = make_pair("gpt2", attn_pdrop=0.5)  # and no other dropout
    ours.train()
    rows, labels = _batch()
    batch = collate(rows, TOKENS.thought, labels)
    seeds: list[list[int]] = []
    body = type(ours).body

    def hear(self, embeds_TD, positions_T, ragged):
        seeds.append(ragged.seeds.tolist())
        return body(self, embeds_TD, positions_T, ragged)

    monkeypatch.setattr(type(ours), "body", hear)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses += [ours(batch=batch).loss.item() for _ in range(2)]
    assert losses[:2] == losses[2:4] and len(set(losses)) == 4
    assert all(len(set(of)) == ours.num_layers for of in seeds), "a seed for every layer"
    assert len({tuple(of) for of in seeds[: 2 * len(batch.passes)]}) == 2, "one for all passes of a step"
    states = []
    for changed in (0, 1):  # the second layer's seed only

        def other(self, embeds_TD, positions_T, ragged):
            ragged.seeds[1] += changed  # noqa: B023
            return body(self, embeds_TD, positions_T, ragged)

        monkeypatch.setattr(type(ours), "body", other)
        torch.manual_seed(1)
        hook = ours.hf.transformer.h[1].register_forward_pre_hook(lambda _, x: states.append(x[0].detach()))
        states.append(ours(batch=batch).hidden_TD[0])
        hook.remove()
    half = len(states) // 2
    assert torch.equal(states[0], states[half]) and not torch.equal(states[half - 1], states[-1])
