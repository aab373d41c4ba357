"""ProsQA problems: which of two concepts an entity is, in a directed acyclic graph of "is a" sentences.

Both ways to draw the graph have the shape of Algorithm 1 of the paper (arXiv 2412.06769): nodes 0 and 1 are roots;
every later node draws a Poisson(1.5) number of parents from a pool of earlier nodes, with weight 1.5 * depth + 1, and
is labelled by the roots it descends from (1, 2, both: 3, none: 0). Nodes without parents are entities, others concepts.

"printed"     Algorithm 1 to the letter. Pools: labels {0, 1} with probability .35, {0, 2} with .35, all with .3. The
              root is node 0, the target a leaf of label 1, the other option a leaf of label 2.
"calibrated"  what the released sets were drawn with, as far as their statistics tell (docs/decisions.md): 28 nodes, and
              those without any edge are dropped, which leaves 22.8 on average. Pools: label 1 with probability .35,
              2 with .65 * .7, all with the rest; nodes of label 3 weigh 1. The target is a deepest leaf of label 1 or
              2, so the root is node 1 in 63% of the problems; the other option is any leaf of the other label.

Every record has its own generator, seeded by (seed, split, number): the first 100 records of 10,000 equal those of a
set of 100, and splits are independent.
"""

from __future__ import annotations

import random
from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import exp, factorial
from numbers import Integral
from typing import Any

from tqdm import tqdm

from coconut_fast.data.examples import Example

# The names of the released sets.
ENTITIES = (  # noqa: SIM905
    "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren"
).split()
CONCEPTS = (  # noqa: SIM905
    "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus impus jelpus jompus "
    "kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus sterpus storpus terpus timpus tumpus "
    "vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus"
).split()

# algorithm -> nodes drawn, allowed hops from root to target (other graphs are redrawn)
ALGORITHMS = {"calibrated": (28, (3, 6)), "printed": (23, (1, 40))}

_POISSON = list(accumulate(exp(-1.5) * 1.5**k / factorial(k) for k in range(24)))
_MOST_DRAWS = 50_000
_FAR = 1000  # this deep or deeper below a root means: not below it


@dataclass
class _Pool:
    """Nodes to draw parents from, by weight."""

    nodes: list[int]
    sums: list[float]

    def add(self, node: int, weight: float) -> None:
        self.nodes.append(node)
        self.sums.append((self.sums[-1] if self.sums else 0.0) + weight)

    def draw(self, count: int, rng: random.Random) -> list[int]:
        """`count` different nodes, or all there are; redrawing duplicates equals drawing without replacement."""
        count = min(count, len(self.nodes))
        drawn: list[int] = []
        while len(drawn) < count:
            place = bisect(self.sums, rng.random() * self.sums[-1])
            node = self.nodes[min(place, len(self.nodes) - 1)]
            if node not in drawn:
                drawn.append(node)
        return drawn


@dataclass
class _Drawn:
    """Per node: its parents in the order drawn, its depth below root 0 and 1, its number of children."""

    parents: list[list[int]]
    depths: tuple[list[int], list[int]]
    children: list[int]

    def label(self, node: int) -> int:
        return (self.depths[0][node] < _FAR) + 2 * (self.depths[1][node] < _FAR)

    def leaves(self, label: int) -> list[int]:
        return [n for n in range(2, len(self.parents)) if not self.children[n] and self.label(n) == label]


def generate_prosqa(
    count: int,
    *,
    seed: int = 0,
    split: str = "train",
    algorithm: str = "calibrated",
    nodes: int | None = None,
    hops: tuple[int, int] | None = None,
) -> list[Example]:
    """`count` problems with the keys of the released sets; the same arguments give the same problems.

    nodes: nodes drawn per graph, 4 to 40 (there are 38 names of concepts); None: the algorithm's own.
    hops: fewest and most hops from root to target; None: the algorithm's own (calibrated: 3 to 6). Narrow bounds far
        from the usual 3 to 5 cost many draws per graph; ValueError where none of 50,000 fits.
    """
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 0:
        raise ValueError(f"count: found {count!r}, expected a whole number of 0 or more")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: found {algorithm!r}, expected one of {', '.join(ALGORITHMS)}")
    nodes = ALGORITHMS[algorithm][0] if nodes is None else nodes
    low, high = ALGORITHMS[algorithm][1] if hops is None else hops
    if not 4 <= nodes <= 40:
        raise ValueError(f"nodes: found {nodes}, expected 4 to 40")
    if not 1 <= low <= high or low > nodes - 3:
        raise ValueError(f"hops: found {low} to {high}, expected 1 <= fewest <= most, and fewest at most nodes - 3")
    examples = []
    for number in tqdm(range(count), desc="prosqa", unit="problem", delay=2):
        rng = random.Random(f"prosqa/{algorithm}/{seed}/{split}/{number}")
        examples.append(_problem(rng, algorithm == "calibrated", nodes, low, high))
    return examples


def _problem(rng: random.Random, calibrated: bool, nodes: int, low: int, high: int) -> Example:
    for _ in range(_MOST_DRAWS):
        graph = _draw(rng, calibrated, nodes)
        entities = sum(1 for parents in graph.parents if not parents)
        leaves = (graph.leaves(1), graph.leaves(2))
        if entities > len(ENTITIES) or not leaves[0] or not leaves[1]:
            continue
        if calibrated:
            deepest = max(graph.depths[root][leaf] for root in (0, 1) for leaf in leaves[root])
            equals = [(r, leaf) for r in (0, 1) for leaf in leaves[r] if graph.depths[r][leaf] == deepest]
            root, target = rng.choice(equals)
        else:
            root, target = 0, rng.choice(leaves[0])
        if low <= graph.depths[root][target] <= high:
            return _write(rng, graph, root, target, rng.choice(leaves[1 - root]))
    raise ValueError(f"hops: none of {_MOST_DRAWS} graphs of {nodes} nodes has a target {low} to {high} hops away")


def _draw(rng: random.Random, calibrated: bool, nodes: int) -> _Drawn:
    graph = _Drawn([[], []], ([0, _FAR], [_FAR, 0]), [0, 0])
    pools = [_Pool([0], [1.0]), _Pool([1], [1.0]), _Pool([0, 1], [1.0, 2.0])]
    second = 0.35 + (0.65 * 0.7 if calibrated else 0.35)
    depth = [0, 0]  # hops from the nearest node without parents
    for node in range(2, nodes):
        count = bisect(_POISSON, rng.random())
        r = rng.random()
        parents = pools[0 if r <= 0.35 else 1 if r <= second else 2].draw(count, rng)
        graph.parents.append(parents)
        graph.children.append(0)
        for parent in parents:
            graph.children[parent] += 1
        for depths in graph.depths:
            depths.append(min([depths[parent] + 1 for parent in parents], default=_FAR))
        depth.append(min([depth[parent] + 1 for parent in parents], default=0))
        label = graph.label(node)
        weight = 1.0 if calibrated and label == 3 else 1.5 * depth[node] + 1.0
        pools[2].add(node, weight)
        if label in (1, 2):
            pools[label - 1].add(node, weight)
        elif label == 0 and not calibrated:
            pools[0].add(node, weight)
            pools[1].add(node, weight)
    if calibrated:
        _drop_isolated(graph)
    return graph


def _drop_isolated(graph: _Drawn) -> None:
    """Drop later nodes that have neither parents nor children, and close the gaps in the numbers."""
    kept = [n for n, parents in enumerate(graph.parents) if n < 2 or parents or graph.children[n]]
    new = {node: place for place, node in enumerate(kept)}
    graph.parents = [[new[p] for p in graph.parents[n]] for n in kept]
    graph.children = [graph.children[n] for n in kept]
    graph.depths = ([graph.depths[0][n] for n in kept], [graph.depths[1][n] for n in kept])


def _write(rng: random.Random, graph: _Drawn, root: int, target: int, neg_target: int) -> Example:
    """The problem in words. Edges are listed by child, a child's parents in the order drawn; sentences are shuffled."""
    total = len(graph.parents)
    entities = iter(rng.sample(ENTITIES, sum(1 for parents in graph.parents if not parents)))
    concepts = iter(rng.sample(CONCEPTS, sum(1 for parents in graph.parents if parents)))
    symbols = [next(concepts) if graph.parents[n] else next(entities) for n in range(total)]
    edges = [[parent, child] for child in range(total) for parent in graph.parents[child]]
    path = _shortest_path(rng, graph, root, target)

    def sentence(parent: int, child: int) -> str:
        return f"{'Every ' if graph.parents[parent] else ''}{symbols[parent]} is a {symbols[child]}."

    sentences = [sentence(parent, child) for parent, child in edges]
    rng.shuffle(sentences)
    options = [symbols[target], symbols[neg_target]]
    rng.shuffle(options)
    extra: dict[str, Any] = {"idx_to_symbol": symbols, "edges": edges}
    extra |= {"root": root, "target": target, "neg_target": neg_target}
    return Example(
        question=f"{' '.join(sentences)} Is {symbols[root]} a {options[0]} or {options[1]}?",
        steps=[sentence(parent, child) for parent, child in pairwise(path)],
        answer=f"{symbols[root]} is a {symbols[target]}.",
        extra=extra,
    )


def _shortest_path(rng: random.Random, graph: _Drawn, root: int, target: int) -> list[int]:
    """A shortest path from root to target, each as likely as any other."""
    depths = graph.depths[root]
    paths = [0] * (target + 1)
    paths[root] = 1
    for node in range(2, target + 1):
        paths[node] = sum(paths[p] for p in graph.parents[node] if depths[p] + 1 == depths[node])
    path = [target]
    while path[-1] != root:
        before = [p for p in graph.parents[path[-1]] if depths[p] + 1 == depths[path[-1]]]
        path.append(rng.choices(before, [paths[p] for p in before])[0])
    return path[::-1]
