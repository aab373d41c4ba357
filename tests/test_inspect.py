"""Reading thoughts, placing them on a graph, and drawing that."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure

from coconut_fast.data.graphs import VOCABULARY, Graph, layered_trees
from coconut_fast.inspect.probe import decode_thoughts
from coconut_fast.inspect.report import draw_learning_curves, draw_thoughts, mark_stages
from coconut_fast.inspect.tree import SearchTree
from coconut_fast.model.coconut import Coconut
from coconut_fast.train.build import build
from coconut_fast.train.reports import draw_curve
from tests.runs import MODEL, tiny

#   0 -> 1 -> 2 -> 5        3 -> 4 is the other component; 6 is isolated
#        1 -> 5
GRAPH = Graph(7, ((0, 1), (1, 2), (2, 5), (1, 5), (3, 4)), root=0, target=5, neg_target=4)
NAMES = ("$_$", *"bcdefg")


@pytest.fixture
def model(tmp_path: Path) -> Coconut:
    settings = tiny(tmp_path, tokenizer="symbols", model={**MODEL, "initializer_range": 0.3})
    return build(settings, []).eval()


def test_a_decoded_thought_is_the_head_of_the_fed_back_state(model: Coconut):
    prompts, counts = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8]], [2, 0, 3]
    decoded = decode_thoughts(model, prompts, num_thoughts=counts)
    assert [tuple(p.shape) for p in decoded] == [(2, len(VOCABULARY)), (0, len(VOCABULARY)), (3, len(VOCABULARY))]
    for prompt, count, probabilities_KV in zip(prompts, counts, decoded, strict=True):
        if not count:
            continue
        row = [*prompt, *(model.settings.markers * [model.tokens.start]), *[model.tokens.thought] * count]
        fed_back = model(torch.tensor([row])).inputs_embeds[0, -count:]  # the feedback is the identity
        torch.testing.assert_close(probabilities_KV, model.head(fed_back).softmax(-1).detach())
        alone = decode_thoughts(model, [prompt], num_thoughts=count)[0]
        torch.testing.assert_close(alone, probabilities_KV)
    assert decode_thoughts(model, []) == [] and not decoded[0].is_inference(), "probes may train on them"
    assert decode_thoughts(model.to(torch.bfloat16), prompts, num_thoughts=1)[0].dtype == torch.float32


def test_mass_by_hops():
    values = torch.tensor([[0.1, 0.5, 0.2, 0.0, 0.0, 0.1, 0.05], [0.0, 0.0, 0.4, 0.1, 0.1, 0.4, 0.0]])
    mass = SearchTree(GRAPH, values, NAMES).mass_by_hops(1)
    torch.testing.assert_close(mass, torch.tensor([[0.1, 0.5, 0.4], [0.0, 0.0, 1.0]]))
    mass = SearchTree(GRAPH, values, NAMES).mass_by_hops(3)  # columns: hops 0, 1, 2, 3, anything else
    torch.testing.assert_close(mass, torch.tensor([[0.1, 0.5, 0.3, 0.0, 0.1], [0.0, 0.0, 0.8, 0.0, 0.2]]))


@pytest.mark.parametrize("graph", [GRAPH, layered_trees(1, depth=3, width=3, extra_edges=4)[0]], ids=["odd", "layered"])
def test_nodes_stand_at_their_depth_and_trees_apart(graph: Graph):
    places = SearchTree(graph, torch.zeros(1, graph.num_nodes), ("",) * graph.num_nodes).layout()
    assert set(places) == set(range(graph.num_nodes)) and len(set(places.values())) == graph.num_nodes
    hops = graph.hops(graph.root)
    for node, hop in hops.items():
        assert places[node][1] == -hop
    others = [places[node][0] for node in places if node not in hops]
    assert min(others) - max(places[node][0] for node in hops) >= 1
    for source, destination in graph.edges:
        assert places[source][1] >= places[destination][1]


def test_layout_of_a_circle_that_nothing_leads_to():
    graph = Graph(6, ((0, 1), (2, 3), (3, 2), (3, 4)), root=0, target=1, neg_target=4)
    places = SearchTree(graph, torch.zeros(1, 6), ("",) * 6).layout()
    assert set(places) == set(range(6)) and len(set(places.values())) == 6
    assert {places[node][1] for node in (2, 3, 4, 5)} == {0.0}


def test_layout_unties_edges():
    graph = Graph(8, ((0, 1), (0, 2), (1, 4), (2, 3), (5, 6), (5, 7)), root=0, target=3, neg_target=7)
    places = SearchTree(graph, torch.zeros(1, 8), ("",) * 8).layout()
    assert (places[1][0] < places[2][0]) == (places[4][0] < places[3][0])


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 6)])
def test_wrong_values_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"values: found shape .*, expected \(thoughts, 7 nodes\)"):
        SearchTree(GRAPH, torch.zeros(shape), NAMES)
    with pytest.raises(ValueError, match="names: found 2, expected one for each of 7 nodes"):
        SearchTree(GRAPH, torch.zeros(1, 7), ("a", "b"))


def test_thoughts_are_drawn(tmp_path: Path):
    values = torch.rand(3, 7) / 7
    tree = SearchTree(GRAPH, values, NAMES)
    one = draw_thoughts(tree, tmp_path / "a" / "one.png", title="from a: f or e?")
    two = draw_thoughts(tree, tmp_path / "two.png", title="from a: f or e?", mass=tree.mass_by_hops(3), caption="$_$")
    one_picture, two_picture = (matplotlib.image.imread(path) for path in (one, two))
    assert two_picture.shape[0] > one_picture.shape[0] > 300
    assert two_picture[..., :3].std() > 0.05


def test_learning_curves_are_drawn(tmp_path: Path):
    for name in ("thinks", "$_writes$"):
        records = [
            *({"step": step, "stage": step // 20, "loss": 10 / step} for step in range(10, 60, 10)),
            {"step": 50, "stage": 2, "eval_accuracy": 0.5},
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    runs = {name: tmp_path / name for name in ("thinks", "$_writes$")}
    picture = draw_learning_curves(runs, tmp_path / "curves.png", title="two runs: $_$", chance=0.5)
    assert matplotlib.image.imread(picture)[..., :3].std() > 0.02
    with pytest.raises(ValueError, match=r"has no metrics.jsonl, expected the directory of a training run"):
        draw_learning_curves({"nothing": tmp_path / "nothing"}, tmp_path / "curves.png", title="")


@pytest.mark.parametrize("skipped", [float("inf"), float("nan")])
def test_a_run_with_a_skipped_step_has_its_curve(tmp_path: Path, skipped: float):
    records = [{"step": step, "epoch": 1, "stage": 0, "loss": loss} for step, loss in enumerate((skipped, 2.0, 1.0), 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert matplotlib.image.imread(draw_curve(tmp_path))[..., :3].std() > 0.02


@pytest.mark.parametrize(
    ("ends", "names"),
    [
        ([40, 60, 80, 100], ["stage 0", "stage 1", "stage 2", "stage 3"]),
        ([60, 70, 80, 100], ["stage 0", "1", "2", "stage 3"]),
        ([1, 2, 3, 4, 100], ["stage 0", "stage 4"]),
    ],
)
def test_names_of_stages_have_room(ends: list[int], names: list[str]):
    axes = Figure().subplots()
    mark_stages(axes, [(start, stage) for stage, start in enumerate([0, *ends[:-1]])], ends[-1])
    assert [text.get_text() for text in axes.texts] == names


def test_thoughts_of_a_path_are_those_of_its_model(model: Coconut, tmp_path: Path):
    model.save_pretrained(tmp_path / "model")
    prompts = [[1, 2, 3], [4, 5], [6]]
    from_path = decode_thoughts(tmp_path / "model", prompts, num_thoughts=[3, 0, 2])
    assert [len(x) for x in from_path] == [3, 0, 2]
    for ours, theirs in zip(from_path, decode_thoughts(model, prompts, num_thoughts=[3, 0, 2]), strict=True):
        assert torch.equal(ours, theirs) and ours.untyped_storage().nbytes() == ours.numel() * 4
