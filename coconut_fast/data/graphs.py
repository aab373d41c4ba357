"""Graph problems in symbols: one token per node, as in "Reasoning by Superposition" (arXiv 2505.12514).

    <eos> s d | s d | ... | s d [Q] a b [R] root     then thoughts, then     [A] target <eos>

The vocabulary has 40 tokens: nodes 0 to 30, the latent markers, "|", [Q], [R], [A], <eos> and <|no-answer|>. Edges and
the two options are reshuffled in every epoch. A problem's frontiers (the nodes k hops away) can be the
training targets; see `target` in curriculum.py.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from tqdm import tqdm

from coconut_fast.data.examples import Example, TokenizedExample
from coconut_fast.tokens import END_LATENT, LATENT, START_LATENT, LatentTokens

NUM_NODES = 31
EDGE, QUESTION, ROOT, ANSWER, EOS = 34, 35, 36, 37, 38
VOCABULARY = [
    *map(str, range(NUM_NODES)),
    START_LATENT,
    END_LATENT,
    LATENT,
    "|",
    "[Q]",
    "[R]",
    "[A]",
    "<eos>",
    "<|no-answer|>",
]
TOKENS = LatentTokens(start=31, end=32, thought=33, eos=EOS)
FRONTIERS = ("shortest_paths", "all")


@dataclass(frozen=True)
class Graph:
    """A directed graph and its question: which of `target` and `neg_target` can be reached from `root`?

    ValueError where a node is not in 0..num_nodes - 1, the target cannot be reached, or the other option can.
    """

    num_nodes: int
    edges: tuple[tuple[int, int], ...]
    root: int
    target: int
    neg_target: int

    def __post_init__(self) -> None:
        named = {node for edge in self.edges for node in edge} | {self.root, self.target, self.neg_target}
        wrong = [node for node in named if not 0 <= node < self.num_nodes]
        if wrong:
            raise ValueError(f"node: found {wrong[0]}, expected 0 to {self.num_nodes - 1}")
        hops = self.hops(self.root)
        if self.target not in hops:
            raise ValueError(f"target: node {self.target} cannot be reached from root {self.root}")
        if self.neg_target in hops:
            raise ValueError(f"neg_target: node {self.neg_target} can be reached from root {self.root}")

    def hops(self, start: int, *, backwards: bool = False) -> dict[int, int]:
        """Hops from `start` to every node it reaches (or, backwards, from every node that reaches it)."""
        follow: dict[int, list[int]] = {}
        for source, destination in self.edges:
            if backwards:
                source, destination = destination, source
            follow.setdefault(source, []).append(destination)
        hops, queue = {start: 0}, [start]
        for node in queue:
            for neighbor in follow.get(node, ()):
                if neighbor not in hops:
                    hops[neighbor] = hops[node] + 1
                    queue.append(neighbor)
        return hops

    def frontiers(self, kind: str = "shortest_paths") -> list[list[int]]:
        """frontiers[k]: the nodes k hops from the root, k = 0 to the target's hops, each list in ascending order.

        kind: "shortest_paths": those on a shortest path to the target (`neighbor_k` of the paper's data); "all": all.
        """
        if kind not in FRONTIERS:
            raise ValueError(f"frontier: found {kind!r}, expected one of {', '.join(FRONTIERS)}")
        return self._frontiers[kind]

    @functools.cached_property  # used in every epoch; uncached it took a quarter of a small model's step
    def _frontiers(self) -> dict[str, list[list[int]]]:
        hops, back = self.hops(self.root), self.hops(self.target, backwards=True)
        length = hops[self.target]
        found: dict[str, list[list[int]]] = {kind: [[] for _ in range(length + 1)] for kind in FRONTIERS}
        for node, hop in sorted(hops.items()):
            if hop <= length:
                found["all"][hop].append(node)
                if hop + back.get(node, length + 1) == length:
                    found["shortest_paths"][hop].append(node)
        return found

    def shortest_path(self, rng: random.Random) -> list[int]:
        """A shortest path from root to target, its nodes drawn one after the other among those that lead there."""
        path, edges = [self.root], self._edge_set
        for frontier in self.frontiers()[1:]:
            path.append(rng.choice([node for node in frontier if (path[-1], node) in edges]))
        return path

    @functools.cached_property
    def _edge_set(self) -> frozenset[tuple[int, int]]:
        return frozenset(self.edges)

    def relabeled(self, new: Sequence[int], num_nodes: int) -> Graph:
        """The same graph with node n called new[n]."""
        edges = tuple((new[source], new[destination]) for source, destination in self.edges)
        return Graph(num_nodes, edges, new[self.root], new[self.target], new[self.neg_target])


def graph_of(example: Example, where: str = "the record") -> Graph:
    """The graph of a ProsQA record. ValueError, starting with `where`, if a key is missing or makes no sense."""
    extra = example.extra
    missing = [name for name in ("edges", "root", "target", "neg_target") if name not in extra]
    if missing:
        raise ValueError(
            f"{where}: the field {missing[0]!r} is missing; expected a problem with its graph, as in ProsQA"
        )
    edges, ends = extra["edges"], [extra["root"], extra["target"], extra["neg_target"]]
    pairs = isinstance(edges, list) and all(isinstance(edge, list) and len(edge) == 2 for edge in edges)
    if not pairs or not all(type(node) is int for node in chain(ends, *edges)):
        raise ValueError(
            f"{where}: expected edges as a list of [from, to], root, target and neg_target as nodes, all whole numbers"
        )
    symbols = extra.get("idx_to_symbol")
    if not isinstance(symbols, list | None):
        raise ValueError(f"{where}: idx_to_symbol: found {symbols!r}, expected a list of a name for each node")
    num_nodes = len(symbols) if symbols else 1 + max(chain(ends, *edges))
    try:
        return Graph(num_nodes, tuple((source, destination) for source, destination in edges), *ends)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def symbolic_examples(
    graphs: Sequence[Graph],
    *,
    seed: int = 0,
    epoch: int = 0,
    frontier: str = "shortest_paths",
    relabel: bool = False,
    separators: bool = True,
) -> list[TokenizedExample]:
    """Token ids of each graph for one epoch: edges and options in a new order, a new shortest path as the chain.

    A pure function of its arguments; graph i depends on (seed, epoch, i) alone.
    frontier: what `frontiers` holds, "shortest_paths" or "all" (see Graph.frontiers).
    relabel: give the nodes new numbers, drawn from all 31 (ProsQA's own numbers give the order of the nodes away).
    separators: False leaves out <eos> at the start and "|" between edges: a third fewer tokens.
    ValueError where a graph has more than 31 nodes.
    """
    return [
        symbolic_example(graph, idx, seed=seed, epoch=epoch, frontier=frontier, relabel=relabel, separators=separators)
        for idx, graph in enumerate(graphs)
    ]


def symbolic_example(
    graph: Graph, idx: int, *, seed: int, epoch: int, frontier: str, relabel: bool, separators: bool
) -> TokenizedExample:
    """Problem `idx` of symbolic_examples by itself."""
    if graph.num_nodes > NUM_NODES:
        raise ValueError(f"graph {idx}: found {graph.num_nodes} nodes, the vocabulary has {NUM_NODES}")
    rng = random.Random(f"symbols/{seed}/{epoch}/{idx}")
    if relabel:
        graph = graph.relabeled(rng.sample(range(NUM_NODES), graph.num_nodes), NUM_NODES)
    return TokenizedExample(
        question_ids=_question_ids(graph, rng, separators),
        steps_ids=[[node] for node in graph.shortest_path(rng)[1:]],
        answer_ids=[ANSWER, graph.target, EOS],
        idx=idx,
        frontiers=graph.frontiers(frontier)[1:],
        cue=1,
    )


def _question_ids(graph: Graph, rng: random.Random, separators: bool) -> list[int]:
    edges, options = list(graph.edges), [graph.target, graph.neg_target]
    rng.shuffle(edges)
    rng.shuffle(options)
    ids = [EOS] if separators else []
    for number, edge in enumerate(edges):
        if separators and number:
            ids.append(EDGE)
        ids.extend(edge)
    return [*ids, QUESTION, *options, ROOT, graph.root]


def symbolic_record(graph: Graph, seed: int = 0) -> Example:
    """The problem as text, for a file: the question in the symbols above, the graph under ProsQA's keys."""
    rng = random.Random(f"record/{seed}")
    return Example(
        question=" ".join(VOCABULARY[token] for token in _question_ids(graph, rng, True)),
        steps=[str(node) for node in graph.shortest_path(rng)[1:]],
        answer=str(graph.target),
        extra={
            "edges": [list(edge) for edge in graph.edges],
            "root": graph.root,
            "target": graph.target,
            "neg_target": graph.neg_target,
            "neighbor_k": {str(hop): nodes for hop, nodes in enumerate(graph.frontiers())},
        },
    )


def layered_trees(
    count: int, *, depth: int = 3, width: int = 2, extra_edges: int = 0, seed: int = 0, split: str = "train"
) -> list[Graph]:
    """Small problems for a demonstration: two random trees, `depth` layers of `width` nodes below each root.

    Every node has one parent in the layer above; `extra_edges` more edges between neighbouring layers of a tree give
    nodes more parents, so that trees become DAGs and targets have several shortest paths. Layer k is the frontier after
    k hops. The root is that of either tree, the target a node in its last layer, the other option one in the other
    tree's.
    Nodes are numbered at random. 2 + 2 * depth * width nodes, at most 31.
    """
    num_nodes = 2 + 2 * depth * width
    most = 2 * (depth - 1) * width * (width - 1)
    if depth < 1 or width < 1 or num_nodes > NUM_NODES:
        raise ValueError(f"depth, width: found {depth}, {width}, expected 1 or more and 2 + 2 * depth * width <= 31")
    if not 0 <= extra_edges <= most:
        raise ValueError(f"extra_edges: found {extra_edges}, expected 0 to {most} for depth {depth}, width {width}")
    graphs = []
    for number in tqdm(range(count), desc="graphs", unit="problem", delay=2):
        rng = random.Random(f"layered/{seed}/{split}/{number}")
        edges: list[tuple[int, int]] = []
        spare: list[tuple[int, int]] = []  # edges that may be added
        last: list[list[int]] = []
        for tree in range(2):
            above = [tree]
            for layer in range(depth):
                first = 2 + (tree * depth + layer) * width
                nodes = list(range(first, first + width))
                for node in nodes:
                    parent = rng.choice(above)
                    edges.append((parent, node))
                    spare.extend((other, node) for other in above if other != parent)
                above = nodes
            last.append(above)
        edges.extend(rng.sample(spare, extra_edges))
        rng.shuffle(edges)
        root = rng.randrange(2)
        graph = Graph(num_nodes, tuple(edges), root, rng.choice(last[root]), rng.choice(last[1 - root]))
        graphs.append(graph.relabeled(rng.sample(range(num_nodes), num_nodes), num_nodes))
    return graphs
