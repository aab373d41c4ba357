"""coconut-fast generate: answers to one prompt, a file of prompts, or prompts as they are typed."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from coconut_fast.commands.common import MODEL_HELP, add_command, add_model_options, check_base, load_model


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "generate",
        "answer one prompt, a file of prompts, or prompts as they are typed",
        "coconut-fast generate runs/prosqa --file questions.txt --num-thoughts 6",
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("prompt", nargs="?", help="a question; without it and --file, prompts are read one by one")
    parser.add_argument("--file", help="prompts: one per line, or the questions of a JSON list or of JSON lines")
    parser.add_argument("--num-thoughts", type=int, help="thoughts per prompt (default: as the checkpoint was trained)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens (default 0: all)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="nucleus sampling: from the fewest likeliest tokens whose probabilities reach this sum (default 1: all)",
    )
    parser.add_argument("--seed", type=int, help="seed of the sampling (default: a new one each call)")
    parser.add_argument(
        "--num-samples", type=int, default=1, help="answers per prompt (default 1; more need a temperature)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object per answer, with its token ids")
    add_model_options(parser)
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.prompt is not None and arguments.file is not None:
        raise ValueError("--file: found a prompt as well, expected one of them")
    check_base(arguments.base, arguments.model)
    prompts = [arguments.prompt] if arguments.prompt is not None else None
    if arguments.file is not None:
        prompts = read_prompts_file(arguments.file)
    model = load_model(arguments.model, arguments)
    if prompts is not None:
        _answer(model, prompts, arguments)
        return 0
    code, typed = 0, sys.stdin.isatty()
    while True:
        try:
            prompt = input("> " if typed else "")
        except EOFError:
            return code
        if prompt.strip():
            try:
                _answer(model, [prompt], arguments)
            except ValueError as error:
                print(error, file=sys.stderr)
                code = 0 if typed else 2  # a script must learn that an answer is missing


def read_prompts_file(path: str) -> list[str]:
    """Prompts of a file: the questions of JSON lines (or of a JSON list), else its lines that are not blank."""
    from pathlib import Path

    from coconut_fast.data.examples import read_questions, read_text

    if path.endswith((".json", ".jsonl")):
        return read_questions(path)
    # Not splitlines(), which also splits at characters that a prompt may contain (form feeds, U+2028).
    prompts = [
        line.removesuffix("\r") for line in read_text(Path(path), "a file of prompts").split("\n") if line.strip()
    ]
    if not prompts:
        raise ValueError(f"--file: {path} is empty, expected one prompt per line")
    return prompts


def _answer(model: Any, prompts: list[str], arguments: argparse.Namespace) -> None:
    from coconut_fast.infer.engine import generate

    names = ("num_thoughts", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "num_samples", "batch_size")
    options = {name: getattr(arguments, name) for name in (*names, "weights")}
    lines = _Lines(prompts, arguments)
    try:
        output = generate(model, prompts, **options, on_answer=lines.add)
    finally:
        lines.print_rest()
    if output.stats.interrupted:
        finished = len(output.texts) - output.token_ids.count(None)
        raise KeyboardInterrupt(f"{finished} of {len(output.texts)} answers were finished")


class _Lines:
    """Prints each answer as soon as it and all before it are complete: a run that is killed has printed these."""

    def __init__(self, prompts: list[str], arguments: argparse.Namespace) -> None:
        self.prompts, self.arguments = prompts, arguments
        self.waiting: dict[int, str] = {}  # number -> the line of an answer that others must precede
        self.next = 0
        # On a terminal, what is left of the line of the progress bar, which draws itself again.
        self.erase = "\r\x1b[K" if sys.stdout.isatty() and sys.stderr.isatty() else ""

    def add(self, number: int, text: str | None, token_ids: list[int], num_thoughts: int) -> None:
        if self.arguments.json:
            prompt = self.prompts[number // self.arguments.num_samples]
            record = {"prompt": prompt, "text": text, "token_ids": token_ids, "num_thoughts": num_thoughts}
            readable = "utf" in (sys.stdout.encoding or "").lower()  # else JSON's escapes, not Python's
            self.waiting[number] = json.dumps(record, ensure_ascii=not readable)
        else:
            self.waiting[number] = str(text)
        while self.next in self.waiting:
            self._print(self.next)
            self.next += 1

    def print_rest(self) -> None:
        """After a failure or Ctrl-C, the answers behind one that is missing."""
        for number in sorted(self.waiting):
            self._print(number)

    def _print(self, number: int) -> None:
        print(self.erase + self.waiting.pop(number), flush=True)
