"""Symbolic graph problems: the format, the frontiers, and the small graphs of the demonstration."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from coconut_fast.data.curriculum import CurriculumConfig
from coconut_fast.data.examples import Example, read_examples, write_examples
from coconut_fast.data.graphs import (
    ANSWER,
    EDGE,
    EOS,
    QUESTION,
    ROOT,
    TOKENS,
    VOCABULARY,
    Graph,
    graph_of,
    layered_trees,
    symbolic_examples,
    symbolic_record,
)
from coconut_fast.data.prosqa import generate_prosqa
from coconut_fast.evaluate.recipe import evaluate_recipe
from coconut_fast.model.loading import load
from coconut_fast.train.problems import DataSet, graphs_of
from coconut_fast.train.rows import StageRows
from coconut_fast.train.run import run
from tests.runs import tiny

#     0 -> 2 -> 4 -> 6      6 is three hops from 0, by two shortest paths; 5 is a dead end; 1 -> 3 is the other part
#     0 -> 2 -> 5 -> 6 -> 7
DIAMOND = Graph(9, ((0, 2), (2, 4), (2, 5), (4, 6), (5, 6), (6, 7), (2, 8), (1, 3)), root=0, target=6, neg_target=3)


def test_frontiers_and_paths():
    assert DIAMOND.frontiers() == [[0], [2], [4, 5], [6]]
    assert DIAMOND.frontiers("all") == [[0], [2], [4, 5, 8], [6]]
    paths = Counter(tuple(DIAMOND.shortest_path(random.Random(seed))) for seed in range(100))
    assert set(paths) == {(0, 2, 4, 6), (0, 2, 5, 6)} and min(paths.values()) > 25
    assert DIAMOND.hops(6, backwards=True) == {6: 0, 4: 1, 5: 1, 2: 2, 0: 3}
    with pytest.raises(ValueError, match="frontier: found 'some', expected one of shortest_paths, all"):
        DIAMOND.frontiers("some")


def _read(path):
    return graphs_of(read_examples(path), str(path))


def test_frontiers_are_those_of_the_published_data(prosqa_sets):
    for name in ("valid", "test"):
        records = json.loads((prosqa_sets / f"graph4_{name}.json").read_text())
        graphs = _read(prosqa_sets / f"graph4_{name}.json")
        assert len(records) == len(graphs) > 200
        for record, graph in zip(records, graphs, strict=True):
            expected = {int(hop): sorted(nodes) for hop, nodes in record["neighbor_k"].items()}
            assert dict(enumerate(graph.frontiers())) == expected


def test_vocabulary():
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 40
    assert [VOCABULARY[i] for i in (EDGE, QUESTION, ROOT, ANSWER, EOS)] == ["|", "[Q]", "[R]", "[A]", "<eos>"]
    assert [VOCABULARY[i] for i in (30, TOKENS.start, TOKENS.end, TOKENS.thought, 39)] == [
        "30",
        "<|start-latent|>",
        "<|end-latent|>",
        "<|latent|>",
        "<|no-answer|>",
    ]


def parsed(ids: list[int]) -> tuple[list[tuple[int, int]], set[int], int]:
    """Edges, options and root of a question."""
    at = ids.index(QUESTION)
    edges = [i for i in ids[:at] if i not in (EDGE, EOS)]
    assert ids[at + 3] == ROOT and len(ids) == at + 5
    return list(zip(edges[::2], edges[1::2], strict=True)), set(ids[at + 1 : at + 3]), ids[-1]


def test_symbolic_format():
    example = symbolic_examples([DIAMOND])[0]
    ids = example.question_ids
    assert ids[0] == EOS and ids[3 : ids.index(QUESTION) : 3] == [EDGE] * 7
    edges, options, root = parsed(ids)
    assert sorted(edges) == sorted(DIAMOND.edges) and options == {6, 3} and root == 0
    assert example.steps_ids in ([[2], [4], [6]], [[2], [5], [6]])
    assert example.answer_ids == [ANSWER, 6, EOS] and example.cue == 1
    assert example.frontiers == [[2], [4, 5], [6]]
    assert symbolic_examples([DIAMOND], frontier="all")[0].frontiers == [[2], [4, 5, 8], [6]]
    bare = symbolic_examples([DIAMOND], separators=False)[0].question_ids
    assert EOS not in bare and EDGE not in bare and parsed(bare) == (parsed(bare)[0], {6, 3}, 0)


def test_every_epoch_has_its_own_order():
    graphs = [DIAMOND] * 50
    first = symbolic_examples(graphs, seed=1, epoch=0)
    assert symbolic_examples(graphs, seed=1, epoch=0) == first
    assert symbolic_examples(graphs[:10], seed=1, epoch=0) == first[:10]
    orders = {tuple(e.question_ids) for e in first}
    assert len(orders) > 45
    for other in ((1, 1), (2, 0)):
        again = symbolic_examples(graphs, seed=other[0], epoch=other[1])
        assert sum(a.question_ids == b.question_ids for a, b in zip(first, again, strict=True)) < 3
    target_first = [e.question_ids[e.question_ids.index(QUESTION) + 1] == 6 for e in first]
    assert 10 < sum(target_first) < 40


def test_rows_are_of_the_graphs_of_their_epoch():
    examples = [symbolic_record(graph) for graph in layered_trees(3)]
    for idx in range(3):
        seen = set()
        for seed in (0, 1):
            data = DataSet(examples, None, {"frontier": "all", "relabel": True, "separators": True}, seed)
            assert data.fixed[idx] == data.at(idx, 0)
            rows = StageRows(data, CurriculumConfig("cot"), TOKENS, seed)
            for epoch in (0, 1):
                question = data.at(idx, epoch).question_ids
                assert rows[idx, epoch, 0][1][: len(question)] == question
                seen.add(tuple(question))
        assert len(seen) == 4


def test_relabeled_graphs_are_the_same_graphs():
    example = symbolic_examples([DIAMOND], relabel=True)[0]
    edges, options, root = parsed(example.question_ids)
    target = example.answer_ids[1]
    graph = Graph(31, tuple(edges), root, target, (options - {target}).pop())
    assert [len(f) for f in graph.frontiers()] == [1, 1, 2, 1] and graph.frontiers()[1:] == example.frontiers
    assert sorted(n for e in edges for n in e) != sorted(n for e in DIAMOND.edges for n in e)


def test_prosqa_problems_as_symbols():
    problems = generate_prosqa(100, hops=(3, 4))
    graphs = [graph_of(problem) for problem in problems]
    for problem, example in zip(problems, symbolic_examples(graphs), strict=True):
        assert len(example.steps_ids) == len(problem.steps) == len(example.frontiers)
        assert all(step[0] in frontier for step, frontier in zip(example.steps_ids, example.frontiers, strict=True))
        assert example.answer_ids[1] == problem.extra["target"]


@pytest.mark.parametrize("depth, width, extra_edges", [(1, 1, 0), (3, 2, 0), (3, 2, 5), (2, 5, 20), (7, 2, 3)])
def test_layered_trees(depth, width, extra_edges):
    graphs = layered_trees(40, depth=depth, width=width, extra_edges=extra_edges)
    assert layered_trees(60, depth=depth, width=width, extra_edges=extra_edges)[:40] == graphs
    assert layered_trees(40, depth=depth, width=width, extra_edges=extra_edges, split="test") != graphs
    for graph in graphs:
        assert graph.num_nodes == 2 + 2 * depth * width
        assert len(set(graph.edges)) == len(graph.edges) == 2 * depth * width + extra_edges
        # layer k is the frontier after k hops
        assert [len(f) for f in graph.frontiers("all")] == [1] + [width] * depth
        assert graph.hops(graph.root)[graph.target] == depth
        heads = set(range(graph.num_nodes)) - {d for _, d in graph.edges}
        assert len(heads) == 2 and graph.root in heads
        other = graph.hops((heads - {graph.root}).pop())
        assert other[graph.neg_target] == depth and not set(other) & set(graph.hops(graph.root))
    if width > 1:
        assert len({graph.root for graph in graphs}) > 2  # numbered at random


def test_the_demonstration_graphs():
    example = symbolic_examples(layered_trees(1), separators=False, frontier="all")[0]
    assert len(example.question_ids) == 2 * 12 + 5
    assert [len(f) for f in example.frontiers] == [2, 2, 2]


def test_a_record_holds_the_graph(tmp_path):
    graph = layered_trees(1, extra_edges=3)[0]
    record = symbolic_record(graph)
    assert record.question.split()[0] == "<eos>" and record.question.split()[-2:] == ["[R]", str(graph.root)]
    assert len(record.steps) == 3 and record.answer == record.steps[-1] == str(graph.target)
    write_examples(tmp_path / "graphs.json", [record])
    read = _read(tmp_path / "graphs.json")[0]
    assert read.edges == graph.edges and read.frontiers() == graph.frontiers()


GOOD = {"edges": [[0, 1], [2, 3]], "root": 0, "target": 1, "neg_target": 3}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"edges": None}, "record 1: expected edges as a list"),
        ({"edges": [[0, 1, 2]]}, "record 1: expected edges as a list"),
        ({"edges": [[0, "1"]]}, "all whole numbers"),
        ({"root": 0.5}, "all whole numbers"),
        ({"target": 9, "idx_to_symbol": ["a", "b", "c", "d"]}, "record 1: node: found 9, expected 0 to 3"),
        ({"target": 3, "neg_target": 1}, "record 1: target: node 3 cannot be reached from root 0"),
        ({"neg_target": 1}, "record 1: neg_target: node 1 can be reached from root 0"),
        ({"idx_to_symbol": 7}, "record 1: idx_to_symbol: found 7, expected a list of a name for each node"),
        ({"edges": [[0, 1], [2, 34]]}, "record 1: found 35 nodes, expected at most the 31 that have a symbol"),
    ],
)
def test_a_broken_graph_is_one_clear_error(tmp_path, change, message):
    path = tmp_path / "graphs.json"
    write_examples(path, [Example("q", [], "a", GOOD)])
    assert _read(path)[0].num_nodes == 4
    write_examples(path, [Example("q", [], "a", {**GOOD, **change})])
    with pytest.raises(ValueError, match=message) as caught:
        _read(path)
    assert str(path) in str(caught.value)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="the field 'root' is missing"):
        graph_of(Example("q", [], "a", {"edges": []}))
    big = Graph(40, ((0, 39), (1, 2)), 0, 39, 2)
    with pytest.raises(ValueError, match="graph 0: found 40 nodes, the vocabulary has 31"):
        symbolic_examples([big])
    with pytest.raises(ValueError, match="depth, width: found 8, 2"):
        layered_trees(1, depth=8, width=2)
    with pytest.raises(ValueError, match="extra_edges: found 9, expected 0 to 8"):
        layered_trees(1, extra_edges=9)


def test_a_model_of_graphs_is_trained_on_and_evaluated_by_another_recipe(tmp_path):
    """Graphs are written as the recipe says where it says tokenizer: symbols, else as the model knows them."""
    path = tmp_path / "graphs.json"
    write_examples(path, [symbolic_record(g, i) for i, g in enumerate(layered_trees(16, depth=1))])
    data = {"train_path": str(path), "val_path": str(path), "markers": False, "num_epochs": 1}
    first = run(tiny(tmp_path, tokenizer="symbols", separators=False, relabel=True, **data))
    written = load(first).settings.symbols
    assert written == {"frontier": "shortest_paths", "relabel": True, "separators": False}
    own, recipes = {"tokenizer": None}, {"tokenizer": "symbols"}
    for name, changes in (
        ("a", {**own, "model": str(first)}),
        ("b", {**own, "load_model_path": str(first)}),
        ("c", {**recipes, "model": str(first)}),
        ("d", {**recipes, "load_model_path": str(first)}),
    ):
        again = run(tiny(tmp_path, name=name, **{**data, **changes}))
        assert load(again).settings.symbols == (
            written if changes["tokenizer"] is None else {**written, "relabel": False, "separators": True}
        )
        if name == "a":  # resumed
            assert load(run(tiny(tmp_path, name=name, **{**data, **changes, "num_epochs": 2}))).settings.stage == 1
        assert len(evaluate_recipe(tiny(tmp_path, only_eval=True, **data, **changes)).predictions) == 16
    (first / "coconut.json").unlink()
    bare = tiny(tmp_path, only_eval=True, **data, **recipes, load_model_path=str(first), num_thoughts=2)
    assert evaluate_recipe(bare).mean_thoughts == 2
