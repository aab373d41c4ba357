"""coconut-fast data: generate problems, or check a file of them."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from coconut_fast.commands.common import add_command


def add(commands: Any) -> None:
    example = "coconut-fast data prosqa data/prosqa_train.json --count 17886"
    parser = add_command(commands, "data", "generate problems, or check a file of them", example)
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)

    prosqa = _generator(kinds, "prosqa", "which of two concepts is someone (graphs in words)", 17886)
    prosqa.add_argument(
        "--algorithm",
        choices=("calibrated", "printed"),
        default="calibrated",
        help="calibrated: like the released sets (default); printed: algorithm 1 of the paper as it stands",
    )
    prosqa.add_argument("--nodes", type=int, help="nodes drawn per graph (default 28; printed: 23)")
    prosqa.add_argument(
        "--hops", type=int, nargs=2, metavar=("FEWEST", "MOST"), help="from root to target (default 3 6; printed: any)"
    )
    prosqa.set_defaults(run=_prosqa)

    prontoqa = _generator(kinds, "prontoqa", "is a statement true or false (proofs in words)", 9000)
    prontoqa.add_argument("--hops", type=int, default=5, help="rules applied (default 5)")
    prontoqa.set_defaults(run=_prontoqa)

    graphs = _generator(kinds, "graphs", "which of two nodes can be reached (small layered graphs in symbols)", 3000)
    graphs.add_argument("--depth", type=int, default=3, help="layers below each root (default 3)")
    graphs.add_argument("--width", type=int, default=2, help="nodes of a layer (default 2)")
    graphs.add_argument("--extra-edges", type=int, default=0, help="edges that make trees into DAGs (default 0)")
    graphs.set_defaults(run=_graphs)

    check = add_command(kinds, "check", "check a file of problems and describe it", "coconut-fast data check test.json")
    check.add_argument("file", help="JSON or JSON lines of {question, steps, answer}")
    check.set_defaults(run=_check)


def _generator(kinds: Any, name: str, help: str, count: int) -> argparse.ArgumentParser:
    parser = add_command(
        kinds,
        name,
        f"generate problems: {help}",
        f"coconut-fast data {name} data/{name}_valid.json --count 300 --split valid",
    )
    parser.add_argument("file", help="where to write: .json (a list) or .jsonl (a problem per line)")
    parser.add_argument("--count", type=int, default=count, help=f"problems (default {count})")
    parser.add_argument("--seed", type=int, default=0, help="other problems for another seed (default 0)")
    parser.add_argument("--split", default="train", help="any word: other problems from the same seed (default train)")
    return parser


def _prosqa(arguments: argparse.Namespace) -> int:
    from coconut_fast.data.prosqa import generate_prosqa

    hops = tuple(arguments.hops) if arguments.hops else None
    options = {"algorithm": arguments.algorithm, "nodes": arguments.nodes, "hops": hops}
    return _write(arguments, generate_prosqa(_count(arguments), seed=arguments.seed, split=arguments.split, **options))


def _prontoqa(arguments: argparse.Namespace) -> int:
    from coconut_fast.data.prontoqa import generate_prontoqa

    options = {"seed": arguments.seed, "split": arguments.split, "hops": arguments.hops}
    return _write(arguments, generate_prontoqa(_count(arguments), **options))


def _graphs(arguments: argparse.Namespace) -> int:
    from coconut_fast.data.graphs import layered_trees, symbolic_record

    options = {"depth": arguments.depth, "width": arguments.width, "extra_edges": arguments.extra_edges}
    graphs = layered_trees(_count(arguments), seed=arguments.seed, split=arguments.split, **options)
    return _write(arguments, [symbolic_record(graph, number) for number, graph in enumerate(graphs)])


def _count(arguments: argparse.Namespace) -> int:
    """--count, after checking that the problems can be written."""
    from coconut_fast.files import check_file

    if arguments.count < 1:
        raise ValueError(f"--count: found {arguments.count}, expected 1 or more")
    check_file(arguments.file, "file")
    return arguments.count


def _write(arguments: argparse.Namespace, examples: list[Any]) -> int:
    from coconut_fast.data.examples import write_examples

    write_examples(arguments.file, examples)
    print(f"wrote {len(examples)} problems to {arguments.file}", file=sys.stderr)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from collections import Counter

    from coconut_fast.data.examples import read_examples

    examples = read_examples(arguments.file)
    lengths = Counter(len(example.steps) for example in examples)
    words = sum(len(example.question.split()) for example in examples) / len(examples)
    extra = Counter(key for example in examples for key in example.extra)
    print(f"problems         {len(examples)}")
    print("steps: problems  " + "  ".join(f"{steps}: {count}" for steps, count in sorted(lengths.items())))
    print(f"question         {words:.1f} words on average")
    if extra:
        print("other keys       " + ", ".join(sorted(extra)))
    print(f"first answer     {examples[0].answer}")
    return 0
