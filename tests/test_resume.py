"""Nothing is lost: kill -9 anywhere, a full disk, broken and foreign checkpoints. A resumed run ends bit for bit where
an undisturbed one ends."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from coconut_fast.data.examples import read_examples, write_examples
from coconut_fast.files import reserve
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.loading import load
from coconut_fast.train import checkpoints
from coconut_fast.train.build import build
from coconut_fast.train.problems import DataSet
from coconut_fast.train.recipe import make_arguments
from coconut_fast.train.reports import read_metrics
from coconut_fast.train.run import run
from coconut_fast.train.state import check_same_run
from coconut_fast.train.trainer import CoconutTrainer
from tests.runs import tiny

ROOT = Path(__file__).resolve().parents[1]
# Where a process kills itself: in which function, and at which call of it.
SPOTS = [
    ("coconut_fast.train.trainer", "CoconutTrainer.training_step", 2),  # before the first checkpoint
    ("coconut_fast.train.trainer", "CoconutTrainer.training_step", 6),  # in the middle of an epoch
    ("coconut_fast.train.trainer", "CoconutTrainer._save_optimizer_and_scheduler", 2),  # the weights are written
    ("coconut_fast.train.checkpoints", "write_manifest", 1),  # all but the manifest is written
    ("coconut_fast.train.checkpoints", "sync", 1),  # everything is written, nothing is renamed
    ("coconut_fast.train.validation", "generate_and_score", 1),  # in an evaluation
    ("coconut_fast.train.checkpoints", "shutil.rmtree", 3),  # while an old checkpoint is removed
    ("coconut_fast.train.run", "finish", 1),  # trained, but the best model is not in its place
    ("coconut_fast.model.saving", "write", 1),  # the best model is half-way to its place
    ("matplotlib.figure", "Figure.savefig", 1),  # the picture has its temporary name
]
CHANGES = {"num_epochs": 4, "save_steps": 2, "keep_last": 2, "uniform_prob": 0.3, "warmup_steps": 4}


def child(settings: dict[str, Any], spot: tuple[str, str, int] | None, file_limit: int | None, pipe: Any) -> None:
    """Runs in a separate process; sends the error's type and text, or None."""
    torch.set_num_threads(1)
    from coconut_fast.train.run import run

    if spot:
        _kill_at(*spot)
    if file_limit:  # a write fails, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    try:
        run(make_arguments(settings))
        pipe.send(None)
    except Exception as error:
        pipe.send((type(error).__name__, str(error)))


def _kill_at(module: str, name: str, call: int) -> None:
    *owner_names, last = name.split(".")
    owner = importlib.import_module(module)
    for part in owner_names:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, last, wrapped)


def start(
    folder: Path, spot: tuple[str, str, int] | None = None, file_limit: int | None = None, **changes: Any
) -> tuple[str, str] | None:
    """Trains in another process -> the error's type and text, ("killed", ""), or None."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["coconut_fast.train.run"])
    ours, theirs = context.Pipe(duplex=False)
    settings = {k: v for k, v in tiny(folder, **{**CHANGES, **changes}).to_dict().items() if k != "removal_smoothing"}
    process = context.Process(target=child, args=(settings, spot, file_limit, theirs))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = ("killed", "")
    process.join()
    if answer == ("killed", ""):
        assert process.exitcode == -signal.SIGKILL
    return answer


def digest(run: Path) -> dict[str, Any]:
    """What has to be the same: weights, optimizer and the losses of every step."""
    last = checkpoints.complete(run)[-1]
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    state = {f"{i}.{name}": value for i, s in optimizer.items() for name, value in s.items()}
    losses = [(r["step"], r["loss"]) for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    scores = [
        (r["step"], r["eval_accuracy"], r["eval_loss"]) for r in read_metrics(run / "metrics.jsonl") if "eval_loss" in r
    ]
    files = {name: (folder / name).read_bytes() for folder in (run, last) for name in ("model.safetensors",)}
    return {"files": files, "losses": losses, "scores": scores, "last": last.name, **state}


def assert_same(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        same = torch.equal(value, expected[name]) if isinstance(value, torch.Tensor) else value == expected[name]
        assert same, name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder) is None
    return folder / "runs" / "tiny"


@pytest.fixture
def stopped(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of the run, without its end: two checkpoints, the newer one in the middle of the last epoch."""
    shutil.copytree(undisturbed.parents[1], tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs" / "tiny"
    shutil.rmtree(run / "checkpoint-12")
    (run / "coconut.json").unlink()
    return run


def test_a_second_process_does_not_train_in_the_same_directory(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    half = run / ".unfinished-checkpoint-2"
    with reserve(run, "save_path"):
        half.mkdir()  # the first process is writing it
        refused = f"save_path: another process is writing to {run}, expected a folder of our own"
        assert start(tmp_path) == ("ValueError", refused)
        assert list(run.iterdir()) == [half]
    assert start(tmp_path, num_epochs=1) is None
    assert not half.exists() and checkpoints.complete(run)


def test_a_child_does_not_keep_the_directory_of_a_killed_process(tmp_path: Path) -> None:
    code = f"""if True:
        import os, signal, time
        from coconut_fast.files import Path, reserve
        read, write = os.pipe()
        with reserve(Path({str(tmp_path)!r}), "save_path"):
            if not os.fork():
                os.write(write, b".")  # the child runs
                time.sleep(10)
                os._exit(0)
            os.read(read, 1)
            os.kill(os.getpid(), signal.SIGKILL)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    with reserve(tmp_path, "save_path"):
        pass


def test_a_manifest_reads_the_same_in_any_locale(tmp_path: Path) -> None:
    model = {"model": "modèle"}
    checkpoints.write_manifest(tmp_path, {"run": model, "history": [], "best": None, "stage": 0, "skipped": 0})
    code = f"print(ascii(read_manifest(Path({str(tmp_path)!r}))['run']['model']))"
    command = [sys.executable, "-c", f"from coconut_fast.train.checkpoints import Path, read_manifest; {code}"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == ascii("modèle") + "\n", done.stderr


def test_killed_again_and_again(undisturbed: Path, tmp_path: Path) -> None:
    for spot in SPOTS:
        assert start(tmp_path, spot) == ("killed", ""), f"{spot} was not reached"
    assert start(tmp_path) is None
    run = tmp_path / "runs" / "tiny"
    assert_same(digest(run), digest(undisturbed))
    left = [path for folder in (run, run.parent) for path in folder.iterdir() if path.name.startswith(".")]
    assert not left, "nothing half-written is left"


def test_a_finished_run_is_left_alone(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed.parents[1], tmp_path, dirs_exist_ok=True)
    assert start(tmp_path) is None
    assert_same(digest(tmp_path / "runs" / "tiny"), digest(undisturbed))


def test_settings_of_another_run_are_named_when_it_is_finished(undisturbed: Path) -> None:
    before = digest(undisturbed)
    error = start(undisturbed.parents[1], lr=3e-3)
    assert error is not None and error[0] == "CheckpointError" and "lr was 0.01 there and is 0.003 now" in error[1]
    assert_same(digest(undisturbed), before)


def test_a_full_disk_leaves_the_older_checkpoint(stopped: Path, undisturbed: Path) -> None:
    older = checkpoints.complete(stopped)[-1]
    error = start(stopped.parents[1], file_limit=30_000)
    assert error is not None and error[0] == "OSError", error
    assert re.search(rf"checkpoint-12 could not be written \(.*MB were free\); {older.name} is intact", error[1])
    assert not [path for path in stopped.iterdir() if path.name.startswith(checkpoints.UNFINISHED)]
    assert start(stopped.parents[1]) is None
    assert_same(digest(stopped), digest(undisturbed))


def test_records_are_on_the_disk_before_their_checkpoint_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(tmp_path, num_epochs=1, save_steps=2, val_path=None)
    metrics = Path(settings.output_dir) / "metrics.jsonl"
    synced, seen = [0], []

    def fsync(descriptor: int, really: Any = os.fsync) -> None:
        really(descriptor)
        if metrics.exists() and os.path.samestat(os.fstat(descriptor), metrics.stat()):
            synced.append(metrics.stat().st_size)

    def rename(source: Any, target: Path, really: Any = os.rename) -> None:
        if target.name.startswith(checkpoints.PREFIX):
            assert synced[-1] == metrics.stat().st_size > 0
            seen.append(target.name)
        really(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    run(settings)
    assert seen == ["checkpoint-2", "checkpoint-3"]


def test_a_truncated_checkpoint_is_named(stopped: Path, undisturbed: Path) -> None:
    newest = checkpoints.complete(stopped)[-1]
    weights = newest / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size // 2)
    error = start(stopped.parents[1])
    assert error == (
        "CheckpointError",
        f"{weights} is {size // 2} bytes long, expected {size} bytes; move {newest.name} away to go on with an older "
        "checkpoint",
    )
    (newest / "optimizer.pt").unlink()
    os.truncate(weights, size)
    error = start(stopped.parents[1])
    assert error is not None and "optimizer.pt is missing, expected" in error[1]
    shutil.rmtree(newest)
    assert start(stopped.parents[1]) is None
    assert_same(digest(stopped), digest(undisturbed))


def test_a_foreign_checkpoint_is_named(stopped: Path) -> None:
    (stopped / "checkpoint-99").mkdir()
    (stopped / "checkpoint-99" / "model.safetensors").write_text("something else")
    error = start(stopped.parents[1])
    assert error is not None and error[0] == "CheckpointError"
    assert "checkpoint-99 is not a checkpoint of ours (no readable checkpoint.json)" in error[1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epochs_per_stage": 2}, "epochs_per_stage was 1 there and is 2 now"),
        ({"max_latent_stage": 3}, "max_latent_stage was 2 there and is 3 now"),
        ({"lr": 3e-3}, "lr was 0.01 there and is 0.003 now"),
        ({"batch_size_training": 8}, "rows_per_update was 16 there and is 8 now"),
    ],
)
def test_settings_of_another_run_are_named(stopped: Path, changes: dict[str, Any], named: str) -> None:
    before = digest(stopped)
    error = start(stopped.parents[1], **changes)
    assert error is not None and error[0] == "CheckpointError" and named in error[1], error
    assert_same(digest(stopped), before)


def test_other_data_are_named(stopped: Path) -> None:
    """The same numbers of problems and of tokens."""
    write_examples(stopped.parents[1] / "train.json", read_examples(stopped.parents[1] / "train.json")[::-1])
    error = start(stopped.parents[1])
    assert error is not None and error[0] == "CheckpointError" and "another run: train_path_digest was" in error[1]


def test_a_run_may_be_made_longer_and_cut_otherwise(stopped: Path) -> None:
    """The rows of a step may be cut into other batches, and there may be more epochs: it is still the same run."""
    cut = {"batch_size_training": 4, "gradient_accumulation_steps": 4, "num_epochs": 5}
    assert start(stopped.parents[1], **cut) is None
    assert checkpoints.complete(stopped)[-1].name == "checkpoint-15"


def test_a_linked_checkpoint_goes_without_what_it_points_to(tmp_path: Path) -> None:
    """As when one was moved to another disk."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    for folder in (run / "checkpoint-2", disk):
        folder.mkdir(parents=True)
    (disk / "model.safetensors").write_bytes(b"weights")
    (run / "checkpoint-1").symlink_to(disk)
    checkpoints.prune(run, 1, None)
    assert [path.name for path in run.iterdir()] == ["checkpoint-2"]
    assert (disk / "model.safetensors").read_bytes() == b"weights"


def test_a_setting_newer_than_the_checkpoint_had_its_default_there(tmp_path: Path) -> None:
    check_same_run({"lr": 0.1}, {"lr": 0.1, "c_thought": 1}, tmp_path)
    with pytest.raises(checkpoints.CheckpointError, match="c_thought was 1 there and is 2 now"):
        check_same_run({"lr": 0.1}, {"lr": 0.1, "c_thought": 2}, tmp_path)


def test_a_run_with_modules_of_the_users_own_goes_on(tmp_path: Path) -> None:
    """A feedback, and an auxiliary head with its own loss, which is saved but is not part of what `load` returns;
    a module shares its weight."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
            return hidden_BD * self.scale

    class WithHead(Coconut):
        def __init__(self, model: Coconut) -> None:
            super().__init__(model.hf, model.tokens, tokenizer=model.tokenizer, feedback=Scaled())
            self.extra, self.twin = torch.nn.Linear(16, 1), torch.nn.Linear(16, 1)
            self.twin.weight = self.extra.weight

        def forward(self, *args: Any, **keywords: Any) -> Any:
            output = super().forward(*args, **keywords)
            output.loss = output.loss + self.extra(output.hidden_TD[0]).square().mean()
            return output

    def trained(epochs: int, last: Path | None = None) -> CoconutTrainer:
        settings = tiny(tmp_path, num_epochs=epochs, val_path=None)
        problems = read_examples(settings.train_path)
        torch.manual_seed(len(str(last)))  # so that a fresh model does not happen to have the saved weights
        model = WithHead(build(settings, problems))
        trainer = CoconutTrainer(model, settings, DataSet(problems, model.tokenizer))
        trainer.train(resume_from_checkpoint=last)
        return trainer

    whole = trained(3)
    folder = Path(whole.args.output_dir)
    shutil.rmtree(folder / "checkpoint-9")
    again = trained(3, checkpoints.complete(folder)[-1])
    assert_same(again.model.state_dict(), whole.model.state_dict())
    assert again.model.feedback.scale.item() != 1
    with pytest.warns(UserWarning, match=r"checkpoint-9: added\.safetensors is left out, modules that"):
        read = load(folder / "checkpoint-9", feedback=Scaled())
    added = ("extra.", "twin.")
    assert_same(read.state_dict(), {k: v for k, v in whole.model.state_dict().items() if not k.startswith(added)})


def test_adapters_are_refused_before_a_checkpoint_is_lost(tmp_path: Path) -> None:
    """Adapters laid out as peft's; the wrapper that peft puts around a model is removed."""

    class Adapted(torch.nn.Module):
        def __init__(self, base_layer: torch.nn.Module) -> None:
            super().__init__()
            self.base_layer, self.lora_A = base_layer, torch.nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x)

    class Wrapper(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.base_model = model

        def get_base_model(self) -> torch.nn.Module:
            return self.base_model

    settings = tiny(tmp_path)
    problems = read_examples(settings.train_path)
    made = build(settings, problems)
    model = Coconut(Wrapper(made.hf), made.tokens, tokenizer=made.tokenizer)
    assert model.hf is made.hf
    layer = model.hf.transformer.h[0].mlp
    layer.c_fc = Adapted(layer.c_fc)
    assert model(torch.tensor([[7, 8, model.tokens.thought, 7]]), labels=torch.tensor([[7, 8, 7, 7]])).loss > 0
    for call in (
        lambda: model.save_pretrained(tmp_path / "model"),
        lambda: CoconutTrainer(model, settings, DataSet(problems, model.tokenizer)),
    ):
        with pytest.raises(ValueError, match="hf: the model has adapters, .* merge them first"):
            call()
    layer.c_fc = layer.c_fc.base_layer
    model.save_pretrained(tmp_path / "model")
    assert load(tmp_path / "model").tokens == model.tokens
