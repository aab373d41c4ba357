"""coconut-fast eval: accuracy of models on a file of problems."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut_fast.commands.common import MODEL_HELP, add_command, add_model_options, load_model

if TYPE_CHECKING:
    from coconut_fast.infer.answers import Evaluation
    from coconut_fast.model.coconut import Coconut
    from coconut_fast.train.arguments import CoconutArguments

# Spelled out, so that --help needs no import; a test compares it with data/curriculum.py.
METHODS = (
    "coconut", "no_curriculum", "no_thoughts", "pause_as_thought", "pause_as_thought_multipass", "pause", "icot", "cot",
    "no_cot",
)  # fmt: skip


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "eval",
        "accuracy by batched generation: the answer is the text after the last '#', commas removed",
        "coconut-fast eval runs/prosqa data/prosqa_test.json --out results/prosqa",
    )
    parser.add_argument("model", nargs="+", help=MODEL_HELP + "; several make a table")
    parser.add_argument("data", help="JSON or JSON lines of {question, steps, answer}")
    parser.add_argument(
        "--num-thoughts", type=int, help="thoughts per question (default: as the checkpoint was trained)"
    )
    parser.add_argument("--method", choices=METHODS, help="how questions are put, where the checkpoint does not know")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer, in tokens (default 128)")
    parser.add_argument("--limit", type=int, help="the first n problems only")
    parser.add_argument("--out", help="directory for results.json and one JSON line per problem")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    add_model_options(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from coconut_fast.data.examples import read_examples
    from coconut_fast.evaluate.accuracy import evaluate
    from coconut_fast.files import check_folder

    for name, low in (("limit", 1), ("max_new_tokens", 1), ("batch_size", 1), ("num_thoughts", 0)):
        value = getattr(arguments, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')}: found {value}, expected {low} or more")
    if arguments.out is not None:
        check_folder(arguments.out, "--out")
    examples = read_examples(arguments.data)[: arguments.limit]
    results: dict[str, Evaluation] = {}
    for path in arguments.model:
        model = load_model(path, arguments)
        results[_name(path, results)] = evaluate(
            model,
            examples,
            num_thoughts=arguments.num_thoughts,
            method=arguments.method,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            weights=arguments.weights,
        )
    _show(results, arguments.json, arguments.out, {"data": arguments.data})
    return 0


def evaluate_recipe(settings: CoconutArguments) -> int:
    """`only_eval: true`: the model of a recipe on its val_path."""
    from coconut_fast.infer.answers import answer, make_problems
    from coconut_fast.train.build import build
    from coconut_fast.train.problems import read_file, tokenize

    examples = read_file(settings.val_path, "val_path", 32 if settings.debug else settings.eval_examples)
    train = read_file(settings.train_path, "train_path") if settings.tokenizer == "words" else []
    model = build(settings, train).eval()
    stage, config, num_thoughts = thoughts_of_recipe(settings, model)
    if settings.device != "cpu":
        import torch

        model.to("cuda" if torch.cuda.is_available() else "cpu")
    problems = make_problems(
        model, examples, tokenize(examples, model.tokenizer, model.settings.symbols), stage, config
    )
    result = answer(
        model,
        problems,
        num_thoughts=num_thoughts,
        max_new_tokens=settings.answer_length(),
        batch_size=settings.eval_batch_size,
    )
    _show({settings.name: result}, False, settings.output_dir, {"data": settings.val_path})
    return 0


def thoughts_of_recipe(settings: CoconutArguments, model: Coconut) -> tuple[int, Any, int | None]:
    """(stage, curriculum, thoughts where they are said explicitly) for a recipe with only_eval.

    The checkpoint says, or num_thoughts does. An official checkpoint does not; then all stages' thoughts are used where
    `resume` agrees with that, and ValueError where the official code would silently take another number from it.
    """
    from coconut_fast.data.curriculum import CurriculumConfig, num_slots
    from coconut_fast.data.examples import TokenizedExample

    if model.settings.curriculum is not None and model.settings.stage is not None:
        return model.settings.stage, CurriculumConfig(**model.settings.curriculum), settings.num_thoughts
    config = settings.curriculum()
    last = config.max_latent_stage + 1
    if settings.num_thoughts is None:
        empty = TokenizedExample([], [[]] * last, [])
        by_resume = num_slots(empty, settings.resume // settings.epochs_per_stage, config)
        full = num_slots(empty, last, config)
        if by_resume != full:
            raise ValueError(
                f"num_thoughts: found none, and resume={settings.resume} would mean {by_resume} thoughts where a fully "
                f"trained model has {full}; say num_thoughts={by_resume} or num_thoughts={full}"
            )
    return last, config, settings.num_thoughts


def _name(path: str, taken: dict[str, Any]) -> str:
    name = Path(path).name or path
    return name if name not in taken else path.strip("/").replace("/", "-")


def _show(results: dict[str, Evaluation], as_json: bool, out: str | None, facts: dict[str, Any]) -> None:
    from coconut_fast.evaluate.table import result_table, write_results

    if as_json:
        print(json.dumps({name: result.summary() for name, result in results.items()}, indent=2))
    else:
        print(result_table(results))
    if out:
        write_results(out, results, facts)
        print(f"wrote {out}/results.json", file=sys.stderr)
