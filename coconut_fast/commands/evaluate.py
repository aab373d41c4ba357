"""coconut-fast eval: accuracy of models on a file of problems."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut_fast.commands.common import (
    MODEL_HELP,
    add_command,
    add_model_options,
    check_base,
    find_model,
    load_model,
)

if TYPE_CHECKING:
    from coconut_fast.infer.scoring import Evaluation

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
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="how questions are put (default: as the checkpoint was trained; coconut where it does not say)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer, in tokens (default 128)")
    parser.add_argument("--limit", type=int, help="the first n problems only (default: all)")
    parser.add_argument(
        "--out", help="directory for results.json and a JSON line per problem (default: written nowhere)"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    add_model_options(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from coconut_fast.data.examples import read_examples
    from coconut_fast.evaluate.accuracy import evaluate
    from coconut_fast.evaluate.table import RESULTS
    from coconut_fast.files import check_file, check_folder
    from coconut_fast.model.loading import check_path

    for name, low in (("limit", 1), ("max_new_tokens", 1), ("batch_size", 1), ("num_thoughts", 0)):
        value = getattr(arguments, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')}: found {value}, expected {low} or more")
    if arguments.out is not None:
        check_folder(arguments.out, "--out")
        check_file(Path(arguments.out) / RESULTS, "--out")
    names: list[str] = []
    for path in arguments.model:
        check_path(find_model(path))
        names.append(_name(path, names))
        if arguments.out is not None:
            check_file(Path(arguments.out) / f"{names[-1]}.jsonl", "--out")
    check_base(arguments.base, *arguments.model)
    examples = read_examples(arguments.data)[: arguments.limit]
    results: dict[str, Evaluation] = {}
    try:
        for path, name in zip(arguments.model, names, strict=True):
            model = load_model(path, arguments)
            results[name] = evaluate(
                model,
                examples,
                num_thoughts=arguments.num_thoughts,
                method=arguments.method,
                max_new_tokens=arguments.max_new_tokens,
                batch_size=arguments.batch_size,
                weights=arguments.weights,
                where=arguments.data,
            )
    finally:  # an error in a later model does not lose earlier results
        if results:
            show(results, arguments.json, arguments.out, {"data": arguments.data})
    return 0


def _name(path: str, taken: list[str]) -> str:
    name = Path(path).resolve().name
    names = itertools.chain([name, path.strip("/").replace("/", "-")], (f"{name}-{n}" for n in itertools.count(2)))
    return next(n for n in names if n not in taken)


def show(results: dict[str, Evaluation], as_json: bool, out: str | None, facts: dict[str, Any]) -> None:
    """Writes results where `out` says, and prints them, each even if the other fails."""
    from coconut_fast.evaluate.table import RESULTS, result_table, write_results

    try:
        if out:
            write_results(out, results, facts)
    finally:
        if as_json:
            print(json.dumps({name: result.summary() for name, result in results.items()}, indent=2), flush=True)
        else:
            print(result_table(results), flush=True)
    if out:
        print(f"wrote {Path(out) / RESULTS}", file=sys.stderr)
