"""coconut-fast train: run a recipe, or resume it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut_fast.commands.common import add_command, quiet, tell_of_hub

if TYPE_CHECKING:
    from coconut_fast.train.arguments import CoconutArguments


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        "train by a recipe; the same command again goes on where a killed run stopped",
        "coconut-fast train recipes/prosqa.yaml method=no_thoughts name=prosqa-no-thoughts\n"
        "  torchrun --nproc-per-node 4 -m coconut_fast train recipes/prosqa.yaml gradient_accumulation_steps=1",
    )
    parser.add_argument(
        "recipe",
        help="a YAML file of settings: ours (coconut_fast/train/arguments.py says what each means, and its default) "
        "or the official code's args/*.yaml",
    )
    parser.add_argument(
        "override",
        nargs="*",
        default=[],  # else argparse calls it required, too
        help="KEY=VALUE, instead of what the recipe says; model.n_layer=4 for a key of a mapping",
    )
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from coconut_fast.train.recipe import read_recipe

    settings = read_recipe(arguments.recipe, arguments.override)
    quiet()
    first = os.environ.get("RANK", "0") == "0"  # among torchrun's processes
    if settings.only_eval:
        if first:
            _evaluate(settings)
        return 0
    from coconut_fast.train import checkpoints
    from coconut_fast.train.run import leave_group, run

    begins = not checkpoints.complete(Path(settings.output_dir))
    readable = settings.train_path and all(map(os.path.exists, filter(None, (settings.train_path, settings.val_path))))
    if first and begins and readable and isinstance(settings.model, str) and settings.load_model_path is None:
        tell_of_hub(settings.model)
    try:
        folder = run(settings)
    except KeyboardInterrupt:
        kept = checkpoints.complete(Path(settings.output_dir))
        again = f"goes on from {kept[-1].name}" if kept else "begins anew, there is no checkpoint yet"
        raise KeyboardInterrupt(f"the same command {again}") from None
    leave_group()
    if first:
        print(folder)
    return 0


def _evaluate(settings: CoconutArguments) -> None:
    from coconut_fast.commands.evaluate import show
    from coconut_fast.evaluate.recipe import evaluate_recipe
    from coconut_fast.files import check_folder

    check_folder(settings.output_dir, "save_path")
    show({settings.name: evaluate_recipe(settings)}, False, settings.output_dir, {"data": settings.val_path})
