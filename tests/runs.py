"""Tiny training runs for tests: problems of a few words, a fresh two-layer model, seconds per run."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

from coconut_fast.data.examples import Example, write_examples
from coconut_fast.train.arguments import CoconutArguments
from coconut_fast.train.recipe import make_arguments

NAMES = ["ada", "bo", "cy", "dee", "eli", "fay", "gus", "hal"]
MODEL = {"from_config": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def chains(count: int, seed: int = 0) -> list[Example]:
    """Problems: who is k steps after someone in a circle of names? The reasoning steps walk there one by one."""
    rng = random.Random(seed)
    problems = []
    for _ in range(count):
        start, length = rng.randrange(len(NAMES)), rng.randint(1, 3)
        walk = [NAMES[(start + i) % len(NAMES)] for i in range(length + 1)]
        question = " ".join(["go", *["on"] * length, "from", walk[0]])
        problems.append(Example(question, [f"{a} to {b}" for a, b in pairwise(walk)], walk[-1]))
    return problems


def tiny(folder: Path, **changes: Any) -> CoconutArguments:
    """Settings of a small run in `folder`, whose data are written on the first call."""
    train, val = folder / "train.json", folder / "val.json"
    if not train.exists():
        write_examples(train, chains(40))
        write_examples(val, chains(8, seed=1))
    settings = {
        "name": "tiny",
        "save_path": str(folder / "runs"),
        "model": {**MODEL},
        "tokenizer": "words",
        "train_path": str(train),
        "val_path": str(val),
        "max_latent_stage": 2,
        "num_epochs": 4,
        "batch_size_training": 16,
        "max_new_tokens": 8,
        "logging_steps": 1,
        "lr": 1e-2,
        "device": "cpu",
    }
    return make_arguments({**settings, **changes})
