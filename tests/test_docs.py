"""The code in docs/extending.md runs, from its first line to its last, as a reader would type it."""

from __future__ import annotations

from pathlib import Path

import torch

from coconut_fast import load
from coconut_fast.cli import main
from coconut_fast.train import checkpoints
from coconut_fast.train.build import build
from tests.runs import MODEL, tiny

EXTENDING = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


def test_what_is_built_on_it_runs(tmp_path: Path, monkeypatch) -> None:
    model = build(tiny(tmp_path, tokenizer="symbols", model={**MODEL, "n_positions": 128, "n_embd": 32}), [])
    model.settings.num_thoughts = 3
    model.save_pretrained(tmp_path / "runs" / "demo" / "coconut")
    monkeypatch.chdir(tmp_path)
    assert main(["data", "graphs", "graphs.json", "--count", "32"]) == 0
    lines = [line[4:] for line in EXTENDING.read_text("utf-8").splitlines() if line.startswith("    ") or not line]
    names: dict = {}
    exec(compile("\n".join(lines), str(EXTENDING), "exec"), names)
    assert names["output"].logits.shape == (1, len(names["question"]) + 2, len(names["model"].tokenizer))
    assert names["log_p"].shape == (8, max(map(len, names["rows"])), len(names["model"].tokenizer))
    assert len(names["scores"]) == 8 and torch.isfinite(torch.stack(names["scores"])).all()
    assert names["noisy"].num_thoughts == [3] * 16 and len(names["noisy"].prompt_ids) == 16
    assert names["chances_BV"].shape == (2, len(names["model"].tokenizer))
    kept = checkpoints.complete(names["folder"])[-1]
    assert (kept / "added.safetensors").is_file() and not (names["folder"] / "added.safetensors").exists()
    assert checkpoints.read_manifest(kept)["step"] == 8 and load(names["folder"]).settings.method == "coconut"
