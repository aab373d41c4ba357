"""Evaluation: the stated extraction, what counts as a token, where the number of thoughts comes from, and results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from coconut_fast.cli import main
from coconut_fast.data.curriculum import CurriculumConfig, num_slots, question_row, row_rng, training_row
from coconut_fast.data.examples import Example, TokenizedExample, tokenize_examples
from coconut_fast.data.graphs import ANSWER, ROOT, TOKENS, graph_of, layered_trees, symbolic_examples, symbolic_record
from coconut_fast.data.prosqa import generate_prosqa
from coconut_fast.evaluate import accuracy
from coconut_fast.evaluate.accuracy import evaluate, trained_curriculum
from coconut_fast.evaluate.recipe import evaluate_recipe, fill_settings
from coconut_fast.evaluate.table import result_table, write_results
from coconut_fast.infer import scoring
from coconut_fast.infer.prompts import read_prompts
from coconut_fast.infer.scoring import Evaluation, Prediction, extract_answer, generate_and_score, make_problems
from coconut_fast.model.batch import collate
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.loading import load
from coconut_fast.train.build import build
from coconut_fast.train.callbacks import record_curriculum
from coconut_fast.train.problems import DataSet
from coconut_fast.train.reports import read_metrics
from coconut_fast.train.rows import StageRows
from coconut_fast.train.run import run
from coconut_fast.train.trainer import CoconutTrainer
from tests.runs import MODEL, chains, tiny


@pytest.fixture
def model(tmp_path: Path) -> Coconut:
    torch.set_num_threads(1)
    return build(tiny(tmp_path), chains(40)).eval()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ada to bo\n### bo", "bo"),
        ("### 1,234 ", "1234"),
        ("# a # b\n", "b"),
        ("no mark at all", "no mark at all"),
        ("", ""),
        ("### ", ""),
    ],
)
def test_the_answer_stands_behind_the_last_mark(text: str, expected: str) -> None:
    assert extract_answer(text) == expected


@pytest.mark.filterwarnings("ignore:.*tokenizer does not know")
def test_judgement_is_by_the_extracted_answer(model: Coconut, monkeypatch: pytest.MonkeyPatch) -> None:

    class Output:
        texts = ("cy to dee\n### dee", "### dee, dee", "### 1234")
        token_ids = ([5, 6, 7], [5], [])
        num_thoughts = (2, 2, 0)
        stats = type("Stats", (), {"interrupted": False})

    monkeypatch.setattr(scoring, "generate", lambda *args, **kwargs: Output)
    examples = [Example("go on from cy", [], "dee"), Example("go on from cy", [], "dee"), Example("go", [], "1,234")]
    result = evaluate(model, examples, num_thoughts=2)
    assert [p.correct for p in result.predictions] == [True, False, True]
    assert [p.new_tokens for p in result.predictions] == [5, 3, 0]
    assert (result.accuracy, result.correct) == (2 / 3, 2)
    named = evaluate(model, examples, num_thoughts=2, extract=lambda text: text.split()[-1])
    assert [p.answer for p in named.predictions] == ["dee", "dee", "1234"] and named.accuracy == 1
    assert result.mean_tokens == 8 / 3 and result.mean_thoughts == 4 / 3


def test_number_of_thoughts_is_said_or_remembered(model: Coconut) -> None:
    examples = chains(3)
    with pytest.raises(ValueError, match="num_thoughts: the checkpoint does not say how many thoughts"):
        evaluate(model, examples, max_new_tokens=2)
    assert evaluate(model, examples, num_thoughts=4, max_new_tokens=2).mean_thoughts == 4
    assert evaluate(model, examples, method="cot", max_new_tokens=2).mean_thoughts == 0
    with pytest.raises(ValueError, match="method: found 'magic'"):
        evaluate(model, examples, method="magic")
    model.settings.num_thoughts = 3  # all that some checkpoints say
    assert evaluate(model, examples, max_new_tokens=2).mean_thoughts == 3
    record_curriculum(model, CurriculumConfig(c_thought=2, max_latent_stage=3), stage=2)
    assert evaluate(model, examples, max_new_tokens=2).mean_thoughts == 4
    assert evaluate(model, examples, num_thoughts=1, max_new_tokens=2).mean_thoughts == 1
    assert evaluate(model, examples, method="cot", max_new_tokens=2).mean_thoughts == 0
    record_curriculum(model, CurriculumConfig(pad_latent_to_max=False), stage=9)
    counts = [p.num_thoughts for p in evaluate(model, examples, max_new_tokens=2).predictions]
    assert counts == [len(e.steps) for e in examples], "unpadded, every question gets its own number"


def test_questions_have_markers_where_the_checkpoint_has(model: Coconut) -> None:
    [ids] = tokenize_examples(chains(1), model.tokenizer)
    for model.settings.markers in (True, False):
        config, stage = trained_curriculum(model, num_thoughts=3)
        assert (model.tokens.start in question_row(ids, stage, config, model.tokens)) == model.settings.markers


def test_evaluate_hands_on_what_it_is_told(model: Coconut, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"num_thoughts": 1, "max_new_tokens": 3, "batch_size": 2, "weights": "int8", "where": "x", "extract": str}
    told = {}
    monkeypatch.setattr(accuracy, "generate_and_score", lambda *_, **keywords: told.update(keywords))
    evaluate(model, chains(2), **given)
    assert told == given


def test_answers_are_cut_to_the_positions_there_are(model: Coconut) -> None:
    model.tokens = replace(model.tokens, eos=None)
    long = [Example(" ".join(["go"] * count), [], "ada") for count in (55, 59)]  # 60 and 64 tokens with two thoughts
    found = evaluate(model, long, num_thoughts=2, max_new_tokens=100).predictions
    assert [p.new_tokens for p in found] == [2 + 5, 2 + 1], "of 64 positions; an answer's last token is never fed"
    record_curriculum(model, CurriculumConfig(), stage=0)  # without thoughts, in whose place 45 are asked for
    assert [p.num_thoughts for p in evaluate(model, chains(2), num_thoughts=45).predictions] == [45, 45]


def test_a_question_without_room_is_named(model: Coconut) -> None:
    examples = [*chains(2), Example(" ".join(["go"] * 70), [], "ada")]
    message = "^test.json: record 3: the question has 75 tokens with its thoughts, expected at most the 64 positions"
    with pytest.raises(ValueError, match=message):
        evaluate(model, examples, num_thoughts=2, where="test.json")


def test_nodes_of_a_frontier_are_right_answers(tmp_path: Path) -> None:
    settings = tiny(tmp_path, tokenizer="symbols")
    model = build(settings, []).eval()
    examples = [symbolic_record(g, i) for i, g in enumerate(layered_trees(4, depth=3, extra_edges=2))]
    tokenized = symbolic_examples([graph_of(e) for e in examples], frontier="all")
    config = CurriculumConfig(target="random_frontier", max_latent_stage=3, markers=False)
    early = make_problems(model, examples, tokenized, 1, config)
    assert [len(p.accepted) for p in early] == [len(t.frontiers[1]) for t in tokenized if t.frontiers]
    assert all(p.length == 1 and p.prompt[-1] == model.tokens.thought for p in early)
    for stage, last in ((3, 3), (2, 1)):  # behind the last step; past the last stage
        late = make_problems(model, examples, tokenized, stage, replace(config, max_latent_stage=last))
        assert [p.accepted for p in late] == [(e.answer,) for e in examples]
        assert all(p.length is None and p.prompt[-1] == 37 for p in late), "[A] is given"
    assert generate_and_score(model, early, max_new_tokens=9).mean_tokens == 2, "one thought, one node"


@pytest.mark.parametrize("relabel", [False, True])
@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("coconut", "chain"),
        ("coconut", "next_node"),
        ("coconut", "random_frontier"),
        ("cot", "chain"),
        ("no_cot", "chain"),
        ("no_cot", "next_node"),
        ("no_curriculum", "random_frontier"),
        ("pause", "next_node"),
    ],
)
def test_what_training_asks_for_of_a_graph_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, target: str, relabel: bool
) -> None:
    """ProsQA's own answers ("Tom is a lempus.") are none that a model of symbols could give."""
    settings = tiny(tmp_path, tokenizer="symbols", method=method, model={**MODEL, "n_positions": 256})
    model = build(settings, []).eval()
    model.settings.symbols = {"relabel": relabel}
    examples = generate_prosqa(6, hops=(3, 4))
    tokenized = DataSet(examples, model.tokenizer, model.settings.symbols).fixed
    config = CurriculumConfig(method, target=target, max_latent_stage=4, pad_latent_to_max=False)
    for stage in range(6):
        rows = [training_row(ids, stage, config, model.tokens, row_rng(0, 0, ids.idx)) for ids in tokenized]
        asked = [[token for token in labels if token >= 0 and token != model.tokens.eos] for _, labels in rows]
        output = SimpleNamespace(
            texts=[model.tokenizer.decode(ids) for ids in asked],
            token_ids=asked,
            num_thoughts=[0] * len(asked),
            stats=SimpleNamespace(interrupted=False),
        )
        monkeypatch.setattr(scoring, "generate", lambda *_, output=output, **keywords: output)
        result = generate_and_score(model, make_problems(model, examples, tokenized, stage, config))
        assert result.accuracy == 1, (stage, result.predictions)
        for ids, prediction in zip(tokenized, result.predictions, strict=True):
            assert model.tokenizer.encode(prediction.question) == ids.question_ids


def test_tables_and_files(tmp_path: Path) -> None:
    result = Evaluation(
        [Prediction(0, "q", "a", "a", True, 6, 8, "### a"), Prediction(1, "q", "a", "b", False, 6, 9, "b")], 0.5
    )
    table = result_table({"ours": result, "other one": result}).splitlines()
    assert table[0].split()[:3] == ["model", "accuracy", "tokens"]
    assert table[2].split() == ["ours", "50.0%", "8.5", "6.0", "250.00", "2"]
    assert len({len(line) for line in table}) == 1
    write_results(tmp_path, {"ours": result}, {"data": "test.json"})
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["data"] == "test.json" and saved["results"]["ours"]["accuracy"] == 0.5
    assert [json.loads(line)["correct"] for line in (tmp_path / "ours.jsonl").read_text().splitlines()] == [True, False]


def test_a_long_problem_takes_nothing_from_the_others(model: Coconut) -> None:
    short = chains(4)
    alone = evaluate(model, short, num_thoughts=2, max_new_tokens=20).predictions
    long = Example(" ".join(["go"] * 55), [], "ada")
    assert evaluate(model, [*short, long], num_thoughts=2, max_new_tokens=20).predictions[:4] == alone


@pytest.mark.filterwarnings("ignore:.*tokenizer does not know")
@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("### C#", "C#", True),
        ("### A#", "C#", False),
        ("", "C#", False),
        ("### [A]", "[A]", True),
        ("### 1", "[A]", False),
    ],
)
def test_answers_with_marks_inside(model, monkeypatch, text: str, answer: str, right: bool) -> None:

    output = SimpleNamespace(texts=[text], token_ids=[[5]], num_thoughts=[0], stats=SimpleNamespace(interrupted=False))
    monkeypatch.setattr(scoring, "generate", lambda *args, **kwargs: output)
    assert evaluate(model, [Example("go on from cy", [], answer)], method="cot").predictions[0].correct is right


def test_methods_without_thoughts_are_given_none(model: Coconut) -> None:
    with pytest.raises(ValueError, match="num_thoughts: found 3, expected none: method 'cot' has no thoughts"):
        evaluate(model, chains(2), method="cot", num_thoughts=3)
    with pytest.raises(ValueError, match="method: found 'pause', but the checkpoint does not say how many pause"):
        evaluate(model, chains(2), method="pause")
    record_curriculum(model, CurriculumConfig("cot"), stage=0)
    with pytest.raises(ValueError, match="num_thoughts: the checkpoint does not say how many thoughts"):
        evaluate(model, chains(2), method="coconut")


@pytest.mark.parametrize("method", ["coconut", "pause", "pause_as_thought", "cot", "icot"])
def test_generate_asks_a_question_as_evaluation_does(tmp_path: Path, method: str) -> None:
    examples, config = chains(6), CurriculumConfig(method, c_thought=2, max_latent_stage=2)
    model = build(tiny(tmp_path, method=method), examples).eval()
    record_curriculum(model, config, stage=3)
    problems = make_problems(model, examples, tokenize_examples(examples, model.tokenizer), 3, config)
    read = read_prompts(model, [e.question for e in examples], None, 1)
    assert [list(p.ids) for p in read] == [p.prompt for p in problems]


def test_a_trainer_may_extract_answers_in_its_own_way(tmp_path: Path) -> None:
    class Sure(CoconutTrainer):
        extract_answer = staticmethod(lambda text: "dee")

    folder = run(tiny(tmp_path, num_epochs=1), Sure)
    share = sum(problem.answer == "dee" for problem in chains(8, seed=1)) / 8
    found = [r["eval_accuracy"] for r in read_metrics(folder / "metrics.jsonl") if "eval_accuracy" in r]
    assert found == [share] and share > 0


def test_the_loss_of_an_evaluation_is_the_mean_over_labelled_tokens(tmp_path: Path) -> None:
    """Over the held-out problems' rows at the current stage, whatever their lengths."""
    settings = tiny(tmp_path, num_epochs=2, batch_size_training=3)
    folder = run(settings)
    model = load(folder)
    held_out = StageRows(DataSet(chains(8, seed=1), model.tokenizer), settings.curriculum(), model.tokens, seed=0)
    rows = [held_out[idx, 0, 1] for idx in range(8)]
    expected = model(batch=collate([r[1] for r in rows], model.tokens.thought, [r[2] for r in rows])).loss.item()
    found = [r["eval_loss"] for r in read_metrics(folder / "metrics.jsonl") if "eval_loss" in r]
    assert found[-1] == pytest.approx(expected, rel=1e-5) and len(found) == 2


def test_a_recipe_is_evaluated_as_its_model_is_elsewhere(tmp_path: Path) -> None:
    folder = run(tiny(tmp_path, pad_latent_to_max=False))
    held_out, known = chains(8, seed=1), {"model": str(folder), "tokenizer": None, "only_eval": True}
    for changes in ({}, {"num_thoughts": 1}, {"method": "cot"}):
        found = evaluate_recipe(tiny(tmp_path, **known, **changes))
        count = changes.get("num_thoughts")
        assert found.predictions == evaluate(load(folder), held_out, num_thoughts=count, max_new_tokens=8).predictions
    model = load(folder)
    model.settings.curriculum, model.settings.num_thoughts = None, 3
    model.save_pretrained(tmp_path / "number")
    assert evaluate_recipe(tiny(tmp_path, model=str(tmp_path / "number"), tokenizer=None)).mean_thoughts == 3
    for method in ("cot", "pause"):
        with pytest.raises(ValueError, match=f"num_thoughts: found 3, expected none: method '{method}' has no"):
            evaluate_recipe(tiny(tmp_path, only_eval=True, method=method, num_thoughts=3))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", None)])
def test_a_recipe_is_evaluated_in_its_precision_and_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype | None
) -> None:
    seen = []

    def score(model: Coconut, *_: object, **keywords: object) -> None:
        active = torch.is_autocast_enabled("cpu")
        seen.append((model.settings.parallel_rounds, torch.get_autocast_dtype("cpu") if active else None, model.dtype))

    monkeypatch.setattr(accuracy, "generate_and_score", score)
    evaluate_recipe(tiny(tmp_path, only_eval=True, parallel_rounds=2, precision=precision, num_thoughts=2))
    assert seen == [(2, dtype, torch.float32)]


def test_a_checkpoint_keeps_the_rounds_it_was_trained_with(model: Coconut, tmp_path: Path) -> None:
    model.settings.parallel_rounds = 3
    fill_settings(model, tiny(tmp_path, only_eval=True, num_thoughts=2))
    assert model.settings.parallel_rounds == 3


def test_the_number_of_pauses_is_not_taken_from_resume(tmp_path: Path) -> None:
    bare = {"method": "pause_as_thought", "c_thought": 2, "resume": 1}
    with pytest.raises(ValueError, match="resume: found 1, which .* 2 pause tokens .* has 4; say max_latent_stage=1"):
        evaluate_recipe(tiny(tmp_path, **bare))
    for change in ({"max_latent_stage": 1}, {"resume": 2}):
        assert evaluate_recipe(tiny(tmp_path, **{**bare, **change})).mean_thoughts == 0


def test_a_converted_model_is_asked_as_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def convert(source: str, target: str) -> int:
        return main(["convert", "model", str(tmp_path / source), str(tmp_path / target), "--num-thoughts", "3"])

    model = build(tiny(tmp_path, tokenizer="symbols"), [])
    trained = CurriculumConfig(c_thought=2, pad_latent_to_max=False, target="random_frontier", markers=False)
    record_curriculum(model, trained, stage=7)
    model.save_pretrained(tmp_path / "run")
    assert convert("run", "three") == 0
    [prompt] = read_prompts(load(tmp_path / "three"), "4 10 | 10 7 [Q] 7 3 [R] 4", None, 1)
    assert prompt.ids[-6:] == (ROOT, 4, *[TOKENS.thought] * 3, ANSWER)
    config, stage = trained_curriculum(load(tmp_path / "three"))
    assert (config.target, stage) == ("random_frontier", 4)
    assert num_slots(TokenizedExample([], [[]], []), stage, config) == 3, "however short its chain"
    record_curriculum(model, CurriculumConfig("cot"), stage=0)
    model.save_pretrained(tmp_path / "cot")
    assert convert("cot", "x") == 2
    assert "--num-thoughts: found 3, expected none: method 'cot' has no thoughts" in capsys.readouterr().err
