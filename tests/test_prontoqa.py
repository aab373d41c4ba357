"""The ProntoQA generator: the form of the authors' problems, proofs that hold, and their shares."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter

import pytest

from coconut_fast.data.prontoqa import (
    _NEGATED,
    _NEGATED_AT_THE_END,
    _NEGATED_ON_THE_WAY,
    CONCEPTS,
    ENTITIES,
    PROPERTIES,
    generate_prontoqa,
)

COUNT = 2000
FAMILY = {adjective: number for number, family in enumerate(PROPERTIES) for adjective in family}


def parse(sentence: str) -> tuple[str, bool, str]:
    """(subject, negated, concept or adjective), singular, whatever the wording; fails on any other sentence."""
    found = re.fullmatch(r"(?:(Each|Every) )?(\w+) (is|are) (not )?(an? )?(\w+)\.", sentence)
    assert found, sentence
    quantifier, subject, verb, negated, article, what = found.groups()
    if verb == "are":
        assert quantifier is None and subject.endswith("es") and not article
        subject, what = subject[:-2].lower(), what.removesuffix("es") if what.removesuffix("es") in CONCEPTS else what
    else:
        assert (quantifier is None) == (subject in ENTITIES)
        assert (article is not None) == (what in CONCEPTS)
        assert article is None or (article == "an ") == (what[0] in "aeiou")
    assert subject in CONCEPTS or subject in ENTITIES
    assert what in CONCEPTS or what in FAMILY
    return subject, negated is not None, what


def sentences(text: str) -> list[str]:
    return re.findall(r"[^.]+\.", text.replace(". ", "."))


def check(example, hops: int) -> dict:
    """Checks all that must hold for one problem; returns what the shares are computed from."""
    assert example.extra == {} and len(example.steps) == hops + 1
    context, query = example.question.split(" True or false: ")
    context = sentences(context)
    rules, facts = [parse(s) for s in context[:-2]], [parse(s) for s in context[-2:]]
    assert len(set(rules)) == len(rules) == 4 * hops + 3
    proof = [sentence for step in example.steps for sentence in sentences(step)]
    assert [len(sentences(step)) for step in example.steps] == [2] * hops + [1]

    # the proof: a fact of the context, then rule and conclusion in turn
    entity, _, concept = parse(proof[0])
    assert proof[0] in context[-2:] and entity in ENTITIES
    for rule, conclusion in zip(proof[1::2], proof[2::2], strict=True):
        assert rule in context[:-2]
        subject, negated, what = parse(rule)
        assert subject == concept
        assert parse(conclusion) == (entity, negated, what)
        concept = what
    final = parse(proof[-1])
    assert parse(query)[::2] == final[::2]
    assert example.answer == str(parse(query) == final)

    # each rule on the way has a sibling that leads nowhere; two properties share a family, all others have their own
    chain = [parse(s)[2] for s in proof[0:-1:2]]
    up = {c: [what for subject, _, what in rules if subject == c and what in CONCEPTS] for c in CONCEPTS}
    for concept in chain:
        assert len(up[concept]) == 2 and sum(bool(up[parent]) for parent in up[concept]) == (concept != chain[-1])
    properties = [(subject, negated, what) for subject, negated, what in rules if what in FAMILY]
    assert sorted(Counter(FAMILY[what] for _, _, what in properties).values()) == [1] * (2 * hops) + [2]
    opposite = [p for p in properties if p[2] == final[2] and p[0] != chain[-1]]
    assert len(opposite) == 1 and opposite[0][1] != final[1] and opposite[0][0] not in chain
    other = next(what for _, _, what in facts if what != chain[0])
    assert len(up[other]) == 1 and not up[up[other][0]]
    signs = {subject: negated for subject, negated, what in properties}
    return {
        "true": example.answer == "True",
        "conclusion negated": final[1],
        "way negated": sum(signs[c] for c in chain[:-1]),
        "elsewhere negated": sum(
            signs[c] for c in [other, *(p for c in chain for p in up[c] if p in signs)] if c not in chain
        ),
        "plural": sum(" are " in s for s in context[:-2]),
        "each": sum(s.startswith("Each") for s in context[:-2]),
        "fact first": parse(context[-2]) == parse(proof[0]),
        "entity": entity,
        "place": context.index(proof[1]) / (len(rules) - 1),
    }


def test_every_problem_holds_and_shares_are_right():
    found = [check(example, hops=5) for example in generate_prontoqa(COUNT)]
    expected = {
        "true": (1, 0.5),
        "conclusion negated": (1, _NEGATED_AT_THE_END),
        "way negated": (4, _NEGATED_ON_THE_WAY),
        "elsewhere negated": (6, _NEGATED),
        "plural": (23, 0.5),
        "each": (23, 0.25),
        "fact first": (1, 0.5),
    }
    for name, (trials, p) in expected.items():
        share = sum(f[name] for f in found) / COUNT / trials
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / COUNT / trials), f"{name}: {share:.4f}, expected {p:.4f}"
    # in 600 problems of the authors' generator, 299 conclusions and 2432 of 7200 properties were negated
    assert abs(_NEGATED_AT_THE_END - 299 / 600) < 4 * math.sqrt(0.25 / 600)
    properties = (2 * _NEGATED * 3 + 4 * _NEGATED_ON_THE_WAY + 1) / 12
    assert abs(properties - 2432 / 7200) < 4 * math.sqrt(0.25 / 7200)
    entities = Counter(f["entity"] for f in found)
    assert set(entities) == set(ENTITIES)
    assert max(abs(n - COUNT / 9) for n in entities.values()) < 4 * math.sqrt(COUNT * 8 / 81)
    assert abs(sum(f["place"] for f in found) / COUNT - 0.5) < 4 * math.sqrt(1 / 12 / COUNT)


@pytest.mark.parametrize("hops", [1, 2, 6])
def test_other_numbers_of_hops(hops):
    for example in generate_prontoqa(50, hops=hops):
        check(example, hops)


def test_same_seed_same_problems_and_independent_splits():
    first = generate_prontoqa(20, seed=3)
    assert generate_prontoqa(40, seed=3)[:20] == first
    for other in ({"seed": 4}, {"seed": 3, "split": "test"}):
        assert not {e.question for e in generate_prontoqa(20, **other)} & {e.question for e in first}
    digest = hashlib.sha256(json.dumps([e.record() for e in first]).encode()).hexdigest()
    assert digest.startswith("c7dacd396e098321")  # problems must not change from version to version


def test_too_many_hops_are_refused():
    with pytest.raises(ValueError, match="hops: found 7, expected 1 to 6"):
        generate_prontoqa(1, hops=7)
