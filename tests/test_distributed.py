"""Two processes (gloo, CPU) train what one process trains: losses, gradient norms, scores and weights, in fp64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from coconut_fast import load
from coconut_fast.train.build import build
from coconut_fast.train.checkpoints import CheckpointError
from coconut_fast.train.run import run
from tests.conftest import ROOT
from tests.distributed_worker import train
from tests.runs import chains, tiny

ONE = ("batch_size_training=12",)
TWO = ("batch_size_training=3", "gradient_accumulation_steps=2")


def train_together(folder: Path, *overrides: str) -> dict[str, Any]:
    """The result of two processes."""
    out = folder / "out.pt"
    launch("tests.distributed_worker", str(folder), str(out), *TWO, *overrides)
    return torch.load(out, weights_only=True)


def launch(module: str, *arguments: str) -> None:
    """Runs a module in two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("single"), *ONE)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    return folder, train_together(folder)


def assert_same(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("losses", "norms", "scores"):
        torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(expected[name]), rtol=1e-5, atol=1e-7)
    assert_same_weights(ours, expected)


def assert_same_weights(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected["weights"].items():
        # rows fall on other processes, so sums run in another order
        torch.testing.assert_close(
            ours["weights"][name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_ddp_equals_one_process(single: dict[str, Any], ddp: tuple[Path, dict[str, Any]]) -> None:
    """37 problems in steps of 12: in the last batch one of the two has no row."""
    assert_same(ddp[1], single)
    assert ddp[1]["sharded"] == 0


def test_a_run_goes_on_with_other_processes(single: dict[str, Any], ddp: tuple[Path, dict[str, Any]]) -> None:
    """Begun by two, ended by one."""
    run = ddp[0] / "runs" / "tiny"
    shutil.rmtree(run / "checkpoint-12")
    assert len(list(run.glob("checkpoint-*/rng_state_*.pth"))) == 2 * len(list(run.glob("checkpoint-*")))
    assert_same_weights(train(ddp[0], *ONE), single)


@pytest.mark.slow
def test_fsdp_equals_one_process_and_goes_on(single: dict[str, Any], tmp_path: Path) -> None:
    """Mixed stages give the two processes different numbers of passes."""
    found = train_together(tmp_path, "fsdp=true")
    assert_same(found, single)
    assert found["sharded"] == len(found["weights"].keys() - {"hf.lm_head.weight"}), (
        "every weight is (the head is tied)"
    )
    shutil.rmtree(tmp_path / "runs" / "tiny" / "checkpoint-12")
    assert_same_weights(train_together(tmp_path, "fsdp=true"), single)


def test_a_sharded_run_does_not_go_on_unsharded(tmp_path: Path) -> None:
    """Its optimizer's state has other files."""
    changes = {"epoch_size": 16, "eval_examples": 2}
    manifest = run(tiny(tmp_path, num_epochs=1, **changes)) / "checkpoint-1" / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace('"fsdp": false', '"fsdp": true'))
    with pytest.raises(CheckpointError, match="fsdp was True there and is False now"):
        run(tiny(tmp_path, num_epochs=2, **changes))


@pytest.mark.slow
def test_weights_that_some_steps_do_not_use_train_together(tmp_path: Path) -> None:
    """Steps without thoughts use neither a projection nor the module of a trainer's subclass, idle rows no head."""
    own = ("feedback=projection", "model.tie_word_embeddings=false")
    one = train(tmp_path / "one", *ONE, *own, "bounded")
    assert_same_weights(train_together(tmp_path / "ddp", *own, "bounded"), one)
    start = build(tiny(tmp_path, feedback="projection"), chains(37))
    assert not torch.allclose(one["weights"]["feedback.0.weight"].float(), start.feedback[0].weight, atol=1e-2)
    assert one["weights"]["bound.weight"].shape == (1, 1)
    sharded = train_together(tmp_path / "fsdp", *own, "fsdp=true")
    assert_same_weights(sharded, train(tmp_path / "one of fsdp", *ONE, *own))


@pytest.mark.slow
def test_a_sharded_run_without_validation_leaves_its_last_model(tmp_path: Path) -> None:
    """Only the first process writes it, though the weights are sharded over both."""
    settings = tiny(tmp_path, val_path=None, num_epochs=2, fsdp=True).to_dict()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    launch("coconut_fast", "train", str(recipe))
    folder = tmp_path / "runs" / "tiny"
    model, last = load(folder), load(sorted(folder.glob("checkpoint-*"))[-1])
    assert torch.equal(model.embed(torch.arange(3)), last.embed(torch.arange(3)))
