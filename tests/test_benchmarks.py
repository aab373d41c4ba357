"""The GPU benchmarks' own code, run once at a tiny shape, so that it cannot rot where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_graph, figures
from benchmarks.figures import Figures
from benchmarks.summary import summarize
from coconut_fast import ops
from coconut_fast.infer import cuda_graphs
from coconut_fast.infer.cuda_graphs import GraphRunner
from coconut_fast.infer.fused import FusedPasses
from coconut_fast.model.plan import describe
from tests.families import make_hf, make_pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_graph_benchmark(family: str, dtype: torch.dtype, device, monkeypatch) -> None:
    monkeypatch.setattr(bench_graph, "PROMPT", 5)
    monkeypatch.setattr(bench_graph, "ROOM", 32)
    model = make_pair(family, dtype)[0].to(device)
    model.tokens = replace(model.tokens, eos=None)
    found = bench_graph.measure(model, 2, rounds=1)
    assert len(found) == 10 and all(seconds > 0 for seconds in found.values())
    answers = [bench_graph.Timed(model, 2, body).answer() for body in ("fused", "hugging face")]
    assert answers[0] == answers[1] or dtype == torch.bfloat16  # where a close call may fall either way
    assert [len(a) for a in (*answers[0], *answers[1])] == [bench_graph.TOKENS] * 4
    body, head = bench_graph.weight_bytes(describe(model.hf))
    size = dtype.itemsize
    assert body + head < sum(size * p.numel() for p in model.parameters()) <= body + 2 * head + size * 257 * 32


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")
def test_graph_benchmark_on_its_kernels(device, monkeypatch) -> None:
    for name, value in {"PROMPT": 5, "ROOM": 32, "THOUGHTS": 1, "TOKENS": 2}.items():
        monkeypatch.setattr(bench_graph, name, value)
    model = make_pair("gpt2", n_layer=1)[0].to(device)
    expected = bench_graph.Timed(model, 1, "hugging face").answer()
    timed = bench_graph.Timed(model, 1, "fused")
    with ops.use("triton"):
        assert timed.pass_seconds("think", graphed=True, rounds=1) > 0
        assert timed.answer() == expected


def test_the_fused_baseline_is_never_another_default(device, monkeypatch) -> None:
    class Default(FusedPasses):
        pass

    monkeypatch.setattr(bench_graph, "PROMPT", 5)
    monkeypatch.setattr(cuda_graphs, "choose_passes", Default)
    assert type(bench_graph.Timed(make_pair("gpt2")[0].to(device), 1, "fused").runner.passes) is FusedPasses


def test_graph_benchmark_refuses_a_wrong_result(device, monkeypatch) -> None:
    replay = GraphRunner.replay

    def wrong(self, batch, kind, *count):
        replay(self, batch, kind, *count)
        if "fused" in self.passes.reason:
            batch.hidden.mul_(-1)

    monkeypatch.setattr(bench_graph, "PROMPT", 5)
    monkeypatch.setattr(bench_graph, "ROOM", 32)
    monkeypatch.setattr(GraphRunner, "replay", wrong)
    with pytest.raises(AssertionError, match="nothing is timed"):
        bench_graph.measure(make_pair("gpt2")[0].to(device), 2, rounds=1)


def test_what_a_batch_costs_is_a_row_of_its_own() -> None:
    figures = Figures()
    figures.add("gpt2 batch 64: latent pass", 3e-4)
    bench_graph.add_cost_of_batch(figures, "gpt2", 64)
    assert len(figures.rows) == 1, "batch 1 was not timed"
    figures.add("gpt2 batch 1: latent pass", 1.5e-4)
    for batch in (1, 64):
        bench_graph.add_cost_of_batch(figures, "gpt2", batch)
    assert [row["ours"] for row in figures.rows[2:]] == [2.0]
    assert figures.table()[-1] == "gpt2 batch 64: latent pass over that of batch 1  2 x"


def test_the_peers_static_cache(device) -> None:
    hf = make_hf("gpt2").to(device)
    assert bench_graph.static_seconds(hf, 2, rounds=1) > 0


def test_a_run_that_is_killed_keeps_what_it_has_measured(tmp_path: Path) -> None:
    suite = tmp_path / "bench_killed.py"
    suite.write_text(
        "import os\n\n"
        "def test_measured(figures):\n    figures.add('a row', 0.5)\n\n"
        "def test_killed(figures):\n    figures.add('half a row', 1.0)\n    os._exit(9)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.conftest", "-p", "no:xdist", str(suite)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([*command, "--results", str(tmp_path / "kept")], cwd=root, capture_output=True, text=True)
    assert done.returncode == 9, done.stdout
    assert [row["what"] for row in json.loads((tmp_path / "kept" / "bench_killed.json").read_text())["rows"]] == [
        "a row"
    ]


def test_a_checkout_without_its_history_is_told_its_commit(monkeypatch) -> None:
    monkeypatch.setattr(figures.shutil, "which", lambda name: None)
    for given in ("0f5e3fc", ""):
        monkeypatch.setenv("COCONUT_FAST_COMMIT", given)
        assert figures._commit.__wrapped__() == given


def test_two_runs_of_a_suite_stay_apart_in_the_summary(tmp_path: Path, monkeypatch) -> None:
    for name, seconds in (("slow", 2.0), ("fast", 1.0)):
        run = {"device": "a CPU", "torch": "2.13", "commit": "", "card": [f"{name} memory"]}
        run["rows"] = [{"what": "a pass", "ours": seconds, "unit": "s", "note": ""}]
        (tmp_path / f"bench_pass-{name}.json").write_text(json.dumps(run))
    assert [line.split() for line in summarize(tmp_path)] == [
        ["a", "CPU,", "torch", "2.13,", "commit", "unknown"],
        *([], ["bench_pass-fast"], ["fast", "memory"], ["ours", "note"], ["a", "pass", "1", "s"]),
        *([], ["bench_pass-slow"], ["slow", "memory"], ["ours", "note"], ["a", "pass", "2", "s"]),
    ]
