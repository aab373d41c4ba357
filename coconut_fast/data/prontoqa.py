"""ProntoQA problems (arXiv 2210.01240) as Coconut uses them: is a statement about an entity true, by a chain of rules?

A problem of h hops has concepts c_0 .. c_h. It lists the rules in random order, then the two facts in random order:

    every c_i is a c_(i+1)                      the chain to follow, i = 0 .. h - 1
    every c_i is a d_i                          a distractor at every hop, which leads nowhere
    every c_i is P_i, every d_i is Q_i          properties, each perhaps negated
    every x_0 is a x_1, every x_0 is R          another ontology
    every y is (not) P_(h-1)                    a rule with the opposite of the conclusion
    E is a c_0; E is a x_0                      the facts

The conclusion is that E has P_(h-1) (negated or not); the query states it or its opposite. All 600 problems drawn from
the authors' generator with the official settings (5 hops, fictional ontology, random order, relevant distractors) have
this form, and the probabilities below are the generator's.
"""

from __future__ import annotations

import random
from itertools import pairwise

from tqdm import tqdm

from coconut_fast.data.examples import Example

CONCEPTS = (  # noqa: SIM905
    "wumpus yumpus zumpus dumpus rompus numpus tumpus vumpus impus jompus gorpus shumpus lempus sterpus grimpus "
    "lorpus brimpus"
).split()
ENTITIES = "Fae Rex Sally Max Alex Sam Polly Stella Wren".split()  # noqa: SIM905
PROPERTIES = [
    family.split()
    for family in (
        "blue red brown orange",
        "small large",
        "metallic wooden luminous liquid",
        "transparent opaque",
        "nervous happy feisty shy",
        "bright dull",
        "sweet sour spicy bitter",
        "floral fruity earthy",
        "hot cold temperate",
        "kind mean angry amenable aggressive",
        "melodic muffled discordant loud",
        "slow moderate fast",
        "windy sunny overcast rainy snowy",
    )
]
# The probability that a property is negated: a third, but the authors' proof is more likely to stop at a concept whose
# property is negated (odds 0.7 : 1) than at another (0.3 : 1), so negation is rarer on the way and more common at the
# end.
_NEGATED = 1 / 3
_NEGATED_ON_THE_WAY = (1 / 3 / 1.7) / (1 / 3 / 1.7 + 2 / 3 / 1.3)
_NEGATED_AT_THE_END = (1 / 3 * 0.7 / 1.7) / (1 / 3 * 0.7 / 1.7 + 2 / 3 * 0.3 / 1.3)


def generate_prontoqa(count: int, *, seed: int = 0, split: str = "train", hops: int = 5) -> list[Example]:
    """`count` problems; the same arguments give the same problems, and a problem does not depend on `count`.

    The question ends with "True or false: ..."; steps are the written proof in pairs of sentences, as the official
    preprocessing pairs them (so hops + 1 steps, the last with the conclusion alone); the answer is "True" or "False".
    hops: rules applied, 1 to 6 (there are 13 families of properties and 17 concepts).
    """
    if not 1 <= hops <= 6:
        raise ValueError(f"hops: found {hops}, expected 1 to 6")
    numbers = tqdm(range(count), desc="prontoqa", unit="problem", delay=2)
    return [_problem(random.Random(f"prontoqa/{seed}/{split}/{number}"), hops) for number in numbers]


def _problem(rng: random.Random, hops: int) -> Example:
    names = rng.sample(CONCEPTS, 2 * hops + 4)
    chain, aside = names[: hops + 1], names[hops + 1 : 2 * hops + 1]
    other, other_parent, opposite = names[2 * hops + 1 :]
    properties = [rng.choice(family) for family in rng.sample(PROPERTIES, 2 * hops + 1)]
    entity = rng.choice(ENTITIES)

    way = [_rule(rng, child, f"a {parent}") for child, parent in pairwise(chain)]
    rules = way + [_rule(rng, child, f"a {parent}") for child, parent in zip(chain, aside, strict=False)]
    for concept, adjective in zip([*chain[: hops - 1], *aside, other], properties, strict=False):
        chance = _NEGATED_ON_THE_WAY if concept in chain else _NEGATED
        rules.append(_rule(rng, concept, _signed(adjective, rng.random() < chance)))
    negated = rng.random() < _NEGATED_AT_THE_END
    end = _rule(rng, chain[hops - 1], _signed(properties[-1], negated))
    rules += [end, _rule(rng, opposite, _signed(properties[-1], not negated)), _rule(rng, other, f"a {other_parent}")]
    rng.shuffle(rules)
    facts = [_sentence(entity, "is", f"a {chain[0]}"), _sentence(entity, "is", f"a {other}")]
    rng.shuffle(facts)

    true = rng.random() < 0.5
    query = _sentence(entity, "is", _signed(properties[-1], negated == true))
    known = [_sentence(entity, "is", f"a {concept}") for concept in chain[:hops]]
    conclusion = _sentence(entity, "is", _signed(properties[-1], negated))
    steps = [f"{fact} {rule}" for fact, rule in zip(known, [*way[: hops - 1], end], strict=True)]
    return Example(
        question=f"{' '.join(rules)} {' '.join(facts)} True or false: {query}",
        steps=[*steps, conclusion],
        answer=str(true),
    )


def _signed(adjective: str, negated: bool) -> str:
    return f"not {adjective}" if negated else adjective


def _rule(rng: random.Random, concept: str, what: str) -> str:
    """One wording of "every `concept` is `what`": half are plural."""
    if rng.random() < 0.5:
        return _sentence(f"{concept.capitalize()}es", "are", f"{what[2:]}es" if what.startswith("a ") else what)
    return _sentence(f"{rng.choice(('Each', 'Every'))} {concept}", "is", what)


def _sentence(subject: str, verb: str, what: str) -> str:
    if what.startswith("a ") and what[2] in "aeiou":
        what = f"an {what[2:]}"
    return f"{subject} {verb} {what}."
