"""coconut-fast convert: official checkpoints to model directories and back, iCoT text to JSON."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from coconut_fast.commands.common import BASE_HELP, MODEL_HELP, add_command, check_base, find_model, quiet

if TYPE_CHECKING:
    from coconut_fast.model.coconut import Coconut


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "convert",
        "convert official checkpoints to model directories and back, and iCoT text to JSON",
        "coconut-fast convert model ckpts/checkpoint_40 models/prosqa --base openai-community/gpt2 --num-thoughts 6",
    )
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)

    model = add_command(
        kinds,
        "model",
        "any model that loads (an official checkpoint, say) -> a directory that transformers reads too",
        "coconut-fast convert model ckpts/checkpoint_40 models/prosqa --base openai-community/gpt2 --num-thoughts 6",
    )
    model.add_argument("source", help=MODEL_HELP)
    model.add_argument("target", help="directory to write")
    model.add_argument("--base", help=BASE_HELP)
    model.add_argument(
        "--num-thoughts",
        type=int,
        help="thoughts it was trained with, to be remembered with it (default: what the source says)",
    )
    model.set_defaults(run=_model)

    official = add_command(
        kinds,
        "official",
        "a model -> a checkpoint file that the official code loads",
        "coconut-fast convert official runs/prosqa checkpoint_50",
    )
    official.add_argument("source", help="a run's directory, a model directory, or a hub id")
    official.add_argument("target", help="file to write")
    official.set_defaults(run=_official)

    icot = add_command(
        kinds,
        "icot",
        "the text files of iCoT (question||steps #### answer) -> JSON",
        "coconut-fast convert icot train.txt data/gsm_train.json",
    )
    icot.add_argument("source", help="a text file of iCoT's data/gsm8k")
    icot.add_argument("target", help="file to write: .json or .jsonl")
    icot.set_defaults(run=_icot)


def _model(arguments: argparse.Namespace) -> int:
    from coconut_fast.files import check_folder
    from coconut_fast.model.loading import load

    quiet()
    check_folder(arguments.target, "target")
    if arguments.num_thoughts is not None and arguments.num_thoughts < 0:
        raise ValueError(f"--num-thoughts: found {arguments.num_thoughts}, expected 0 or more")
    check_base(arguments.base, arguments.source)
    model = load(find_model(arguments.source), base=arguments.base)
    if arguments.num_thoughts is not None:
        _remember_thoughts(model, arguments.num_thoughts)
    model.save_pretrained(arguments.target)
    return _wrote(arguments.target)


def _remember_thoughts(model: Coconut, count: int) -> None:
    """Questions will have `count` thoughts; what else is known of the training (markers, the target) stays.

    ValueError for a model whose method has no thoughts.
    """
    from coconut_fast.data.curriculum import METHODS

    saved = model.settings
    if METHODS[saved.method].slot != "thought":
        raise ValueError(f"--num-thoughts: found {count}, expected none: method {saved.method!r} has no thoughts")
    saved.num_thoughts = count
    if saved.curriculum is not None:
        stages = {"c_thought": 1, "max_latent_stage": count, "pad_latent_to_max": True}
        saved.curriculum, saved.stage = {**saved.curriculum, **stages}, count + 1  # past the last: the answer is next


def _official(arguments: argparse.Namespace) -> int:
    import torch

    from coconut_fast.files import check_file, not_written, write_atomically
    from coconut_fast.model.feedback import name_of
    from coconut_fast.model.loading import REFERENCE_PREFIX, load

    quiet()
    check_file(arguments.target, "target")
    model = load(find_model(arguments.source))
    if name_of(model.feedback) != "identity":
        raise ValueError(
            f"source: {arguments.source} feeds back by {name_of(model.feedback)!r}, the official code only by identity"
        )
    state = {f"{REFERENCE_PREFIX}{name}": value for name, value in model.hf.state_dict().items()}
    state["embedding.weight"] = model.hf.get_input_embeddings().weight.detach()
    try:
        with write_atomically(arguments.target, binary=True) as file:
            torch.save(state, file)
    except RuntimeError as error:
        raise not_written(arguments.target, error) from error
    return _wrote(arguments.target)


def _icot(arguments: argparse.Namespace) -> int:
    from coconut_fast.data.examples import write_examples
    from coconut_fast.data.gsm8k import read_gsm8k
    from coconut_fast.files import check_file

    check_file(arguments.target, "target")
    examples = read_gsm8k(arguments.source)
    write_examples(arguments.target, examples)
    return _wrote(f"{len(examples)} problems to {arguments.target}")


def _wrote(what: str) -> int:
    print(f"wrote {what}", file=sys.stderr)
    return 0
