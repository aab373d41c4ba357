"""The demo: a model learns to think on small graphs, is compared with written chains, and its thoughts are drawn.

    graphs -> train Coconut, CoT, No-CoT for as many steps -> accuracy on fresh graphs -> pictures -> one question

Everything goes through the public machinery: recipes/demo.yaml, train, evaluate, generate, inspect.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from coconut_fast.data.examples import Example, TokenizedExample, read_examples, write_examples
from coconut_fast.data.graphs import VOCABULARY, Graph, graph_of, layered_trees, symbolic_examples, symbolic_record
from coconut_fast.evaluate.accuracy import evaluate
from coconut_fast.evaluate.table import result_table, write_results
from coconut_fast.infer.scoring import Evaluation
from coconut_fast.inspect.probe import decode_thoughts
from coconut_fast.inspect.report import draw_learning_curves, draw_thoughts
from coconut_fast.inspect.tree import SearchTree
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.loading import load
from coconut_fast.train.arguments import CoconutArguments
from coconut_fast.train.recipe import parse_overrides, read_recipe
from coconut_fast.train.reports import METRICS, read_metrics
from coconut_fast.train.run import run as train

PROBLEMS = {"train": 16000, "valid": 200, "test": 1000}
GRAPHS = {"depth": 3, "width": 2, "extra_edges": 0}
# Name in the table -> changes to the recipe. Coconut comes first, and the others train for as many steps as it did.
# They have only one stage, so their learning rate decays over the whole run.
ONE_STAGE = ["lr_schedule=cosine"]
# What a run with one stage has not, whoever asks.
OF_STAGES = ["uniform_prob=0", "replay_prob=0", "advance_at=null", "final_epochs=null"]
RUNS = {
    "Coconut": ["method=coconut", "name=coconut"],
    "CoT": ["method=cot", "name=cot", *ONE_STAGE],
    "No-CoT": ["method=no_cot", "name=no_cot", *ONE_STAGE],
}
# Settings that no override may change -> why.
NOT_OVERRIDDEN = {
    "name": "names its runs",
    "save_path": "has --out for its folder",
    "seed": "has --seed, for its graphs as well",
    "debug": "needs the models of its runs",
    "only_eval": "trains",
    "resume": "trains all its models from scratch",
}
CURVES, THOUGHTS = "learning_curves.png", "thoughts.png"


def find_recipe() -> Path:
    """recipes/demo.yaml, of the installed package or of a checkout."""
    here = Path(__file__).parent
    for folder in (here / "recipes", here.parent / "recipes"):
        if (folder / "demo.yaml").is_file():
            return folder / "demo.yaml"
    raise FileNotFoundError(f"recipes/demo.yaml: neither in {here} nor beside it; install the package again")


def settings_of(changes: Sequence[str], overrides: Sequence[str]) -> CoconutArguments:
    """The settings of a run with these changes, which overrides may change again."""
    return read_recipe(find_recipe(), [*changes, *overrides, *(OF_STAGES if "method=coconut" not in changes else ())])


def make_graphs(folder: Path, sizes: Mapping[str, int], seed: int) -> dict[str, Path]:
    """Writes the problems of each split -> its file. Splits share no graph: each has its own random generator."""
    files = {}
    for split, count in sizes.items():
        files[split] = folder / f"{split}.json"
        graphs = layered_trees(count, seed=seed, split=split, **GRAPHS)
        write_examples(files[split], [symbolic_record(graph, number) for number, graph in enumerate(graphs)])
    return files


def run_demo(folder: Path, *, seed: int = 0, overrides: Sequence[str] = ()) -> dict[str, Evaluation]:
    """The whole demo, up to the question. Everything it writes is in `folder`; a stopped demo resumes.

    overrides: settings of all runs, "key=value" each. Returns the results on fresh graphs by name.
    """
    for key in parse_overrides(overrides):
        if key in NOT_OVERRIDDEN:
            raise ValueError(f"override: found {key}, expected another setting: the demo {NOT_OVERRIDDEN[key]}")
    for changes in RUNS.values():
        settings_of(changes, [f"seed={seed}", *overrides])  # wrong settings are refused before any work
    before = folder / settings_name(RUNS["Coconut"]) / "run.json"
    if before.is_file() and (other := json.loads(before.read_text("utf-8"))["seed"]) != seed:
        raise ValueError(f"--out: {folder} holds a demo of seed {other}, expected seed {seed} or another folder")
    print(f"1. {sum(PROBLEMS.values())} graphs, of which {PROBLEMS['test']} are kept for the end")
    files = make_graphs(folder / "data", PROBLEMS, seed)
    shared = [f"save_path={folder}", f"train_path={files['train']}", f"val_path={files['valid']}", f"seed={seed}"]
    models: dict[str, Coconut] = {}
    length: list[str] = []
    for number, (name, changes) in enumerate(RUNS.items(), 2):
        print(f"{number}. {name}: from scratch")
        run = train(settings_of(changes, [*shared, *overrides, *length]))
        models[name] = load(run)
        length = length or [f"num_epochs={finished_epochs(run)}"]

    test = read_examples(files["test"])
    results = {name: evaluate(model, test, max_new_tokens=8) for name, model in models.items()}
    print(f"\nAccuracy on {len(test)} graphs that no model has seen (a guess: 50%):\n")
    print(result_table(results))
    forced = accuracy_by_thoughts(models["Coconut"], test)
    print("\nThe same Coconut model, made to speak after fewer thoughts (it then writes the rest of the chain):\n")
    print("   ".join(f"{n} thought{'s' if n != 1 else ''} {100 * value:.1f}%" for n, value in enumerate(forced)))
    write_results(folder / "results", results, {"seed": seed, "accuracy_by_thoughts": forced})

    curves = {name: folder / settings_name(changes) for name, changes in RUNS.items()}
    title = "Learning to reason on graphs, in thoughts and in words"
    print(f"\nwrote {draw_learning_curves(curves, folder / CURVES, title=title, chance=0.5)}")
    print(f"wrote {draw_search(models['Coconut'], test, results['Coconut'], folder / THOUGHTS)}")
    return results


def finished_epochs(run: Path) -> int:
    """Number of epochs of a run: each ends with an evaluation."""
    return len({record["step"] for record in read_metrics(run / METRICS) if "eval_accuracy" in record})


def settings_name(changes: Sequence[str]) -> str:
    """The directory of a run: its `name=`."""
    return next(change.removeprefix("name=") for change in changes if change.startswith("name="))


def accuracy_by_thoughts(model: Coconut, examples: Sequence[Example]) -> list[float]:
    """Accuracy with 0, 1, ... thoughts, up to the number the model was trained with."""
    most = model.settings.num_thoughts or 0
    return [evaluate(model, examples, num_thoughts=n, max_new_tokens=8).accuracy for n in range(most + 1)]


def draw_search(model: Coconut, examples: Sequence[Example], result: Evaluation, path: Path) -> Path:
    """Draws what the thoughts search: one problem on its graph, and the mean over all problems."""
    graphs = [graph_of(example) for example in examples]
    prompts = [question.question_ids for question in write_questions(model, examples)]
    decoded = decode_thoughts(model, prompts, num_thoughts=model.settings.num_thoughts)
    trees = [
        SearchTree(graph, probabilities_KV[:, : graph.num_nodes], tuple(VOCABULARY[: graph.num_nodes]))
        for graph, probabilities_KV in zip(graphs, decoded, strict=True)
    ]
    hops = len(trees[0].values)
    mass = torch.stack([tree.mass_by_hops(hops) for tree in trees]).mean(0)
    shown = graphs[chosen_problem(graphs, result)]
    tree = trees[graphs.index(shown)]
    return draw_thoughts(
        tree,
        path,
        title=f"Which can be reached from {shown.root}: {shown.target} or {shown.neg_target}?",
        mass=mass,
        caption=f"where the thoughts look, mean over {len(trees)} fresh graphs",
    )


def write_questions(model: Coconut, examples: Sequence[Example]) -> list[TokenizedExample]:
    """Problems tokenized as in the model's training."""
    return symbolic_examples([graph_of(example) for example in examples], **(model.settings.symbols or {}))


def chosen_problem(graphs: Sequence[Graph], result: Evaluation) -> int:
    """A problem worth drawing: answered correctly, with the most inner nodes to search below the root."""

    def inner_nodes(number: int) -> int:
        graph = graphs[number]
        reached = graph.hops(graph.root)
        return len({source for source, _ in graph.edges if source in reached})

    right = [p.idx for p in result.predictions if p.correct] or [0]
    return max(right, key=inner_nodes)


def question_command(folder: Path) -> tuple[list[str], str]:
    """Arguments of `coconut-fast` that ask the trained model the first test problem, and the right answer."""
    run = folder / settings_name(RUNS["Coconut"])
    example = read_examples(folder / "data" / "test.json")[0]
    ids = write_questions(load(run), [example])[0].question_ids
    return ["generate", str(run), " ".join(VOCABULARY[token] for token in ids)], example.answer


def shown_command(arguments: Sequence[str]) -> str:
    """The command to type here, with the program's path where this one was started by it (`make demo`)."""
    program = sys.argv[0] if Path(sys.argv[0]).name == "coconut-fast" else "coconut-fast"
    return shlex.join([program, *arguments])
