"""The search tree of a graph problem: how far every node is from the root, and its probability in each thought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from coconut_fast.data.graphs import Graph

SWEEPS = 8  # of the ordering that untangles edges; small graphs settle after two or three


@dataclass(frozen=True)
class SearchTree:
    """A graph and, per thought, the probability of each of its nodes.

    values: (k, num_nodes); a row may sum to less than 1: the rest is on tokens that are no node of this graph.
    names: what the nodes are called. ValueError where shapes do not agree.
    """

    graph: Graph
    values: torch.Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        if len(shape) != 2 or shape[0] == 0 or shape[1] != self.graph.num_nodes:
            raise ValueError(f"values: found shape {shape}, expected (thoughts, {self.graph.num_nodes} nodes)")
        if len(self.names) != self.graph.num_nodes:
            raise ValueError(f"names: found {len(self.names)}, expected one for each of {self.graph.num_nodes} nodes")

    def mass_by_hops(self, most: int) -> torch.Tensor:
        """(k, most + 2): the probability each thought puts on the nodes 0, 1, ..., `most` hops below the root.

        The last column is everything else: nodes that cannot be reached or lie deeper, and tokens that are no node.
        """
        hops = self.graph.hops(self.graph.root)
        column = torch.tensor([min(hops.get(node, most + 1), most + 1) for node in range(self.graph.num_nodes)])
        mass = torch.zeros(len(self.values), most + 2, dtype=self.values.dtype).index_add_(1, column, self.values)
        mass[:, -1] += 1 - self.values.sum(1)
        return mass

    def layout(self) -> dict[int, tuple[float, float]]:
        """node -> (x, y): nodes the root reaches on the left, the rest on the right, one layer per hop from the top.

        Within a layer, nodes are ordered by the mean x of their neighbours, in a few sweeps down and up.
        """
        hops = self.graph.hops(self.graph.root)
        others = set(range(self.graph.num_nodes)) - set(hops)
        left = self._places(hops)
        right = self._places(self._depths(others))
        width = max((x for x, _ in left.values()), default=0.0) + 1.0
        shift = width - min((x for x, _ in right.values()), default=0.0)
        return left | {node: (x + shift, y) for node, (x, y) in right.items()}

    def _depths(self, nodes: set[int]) -> dict[int, int]:
        """Hops of each node from the nearest of `nodes` that has no parent among them; 0 if only cycles lead to it."""
        edges = [(s, d) for s, d in self.graph.edges if s in nodes and d in nodes]
        depth = dict.fromkeys(nodes - {d for _, d in edges}, 0)
        queue = list(depth)
        for node in queue:
            for source, destination in edges:
                if source == node and destination not in depth:
                    depth[destination] = depth[node] + 1
                    queue.append(destination)
        return {node: depth.get(node, 0) for node in nodes}

    def _places(self, depth: dict[int, int]) -> dict[int, tuple[float, float]]:
        if not depth:
            return {}
        ordered = sorted(depth, key=lambda node: (depth[node], node))
        layers = [list(nodes) for _, nodes in groupby(ordered, key=depth.__getitem__)]
        neighbours: dict[int, list[int]] = {node: [] for node in depth}
        for source, destination in self.graph.edges:
            if source in depth and destination in depth:
                neighbours[source].append(destination)
                neighbours[destination].append(source)
        x = {node: _centred(i, layer) for layer in layers for i, node in enumerate(layer)}
        for sweep in range(SWEEPS):
            for layer in layers if sweep % 2 == 0 else reversed(layers):
                layer.sort(key=lambda node: (_mean([x[other] for other in neighbours[node]], x[node]), x[node]))
                x.update({node: _centred(i, layer) for i, node in enumerate(layer)})
        leftmost = min(x.values())
        return {node: (x[node] - leftmost, -float(depth[node])) for node in depth}


def _centred(i: int, layer: Sequence[int]) -> float:
    return i - (len(layer) - 1) / 2


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
