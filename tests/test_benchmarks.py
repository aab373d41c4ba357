"""The GPU benchmarks' own code, run once at tiny shapes, so that it cannot rot where there is no GPU.

bench_graph and bench_persistent run through their `measure`, bench_ops through its works and its gate. Capturing and
timing a graph of single launches needs a device and is left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import bench_graph, bench_ops, bench_persistent, figures, train_step
from benchmarks.figures import Figures
from benchmarks.summary import summarize
from coconut_fast import Coconut, ops
from coconut_fast.infer import cuda_graphs
from coconut_fast.infer.cuda_graphs import GraphRunner
from coconut_fast.infer.fused import FusedPasses
from coconut_fast.infer.persistent import Launch, PersistentChain
from coconut_fast.model import batch as ragged_batch
from coconut_fast.model.plan import describe
from coconut_fast.train import buckets
from tests.families import FAMILIES, TOKENS, make_hf, make_pair
from tests.test_buckets import both


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
    assert answers[0] == answers[1] or dtype == torch.bfloat16  # where near-ties may go either way
    assert [len(a) for a in (*answers[0], *answers[1])] == [bench_graph.TOKENS] * 4
    body, head = bench_graph.weight_bytes(describe(model.hf))
    size = dtype.itemsize
    assert body + head < sum(size * p.numel() for p in model.parameters()) <= body + 2 * head + size * 257 * 32


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")
@pytest.mark.parametrize("name", bench_ops.WORKS)
def test_works_of_the_ops_benchmark(name: str, device, monkeypatch) -> None:
    """At most 16 of everything, in fp16: the interpreter's bf16 is wrong."""
    monkeypatch.setattr(bench_ops, "DEVICE", device)
    monkeypatch.setattr(bench_ops, "DTYPE", torch.float16)
    builders = "decode prefill append linear head norm mlp feedback accept gather trained_norm columns losses turned"
    for builder in builders.split():
        original = getattr(bench_ops, builder)
        monkeypatch.setattr(
            bench_ops, builder, lambda *sizes, f=original, **given: f(*(min(n, 16) for n in sizes), **given)
        )
    work = bench_ops.WORKS[name]()
    assert name.startswith(work.op) and work.moved > 0
    bench_ops._gate(work)
    work.run()
    if work.peer is not None:
        work.peer()


def test_the_gate_of_the_ops_benchmark_sees_what_is_written_in_place(device, monkeypatch) -> None:
    monkeypatch.setattr(bench_ops, "DEVICE", device)
    monkeypatch.setattr(bench_ops, "DTYPE", torch.float16)

    def wrong(backend: str, **given: torch.Tensor) -> None:
        ops.call("kv_append", **given, backend=backend)
        if backend == "triton":
            given["keys"][given["slots"][0]] += 0.01  # a thousandth of the norm

    work = bench_ops.append(40, 2, 4)
    bench_ops._gate(work)
    monkeypatch.setattr(ops, "kv_append", wrong, raising=False)
    with pytest.raises(AssertionError, match="kv_append is off from its reference: nothing is timed"):
        bench_ops._gate(work)


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
    monkeypatch.setattr(bench_graph.Timed, "pass_seconds", lambda *a: pytest.fail("a wrong result is timed"))
    with pytest.raises(AssertionError, match="nothing is timed"):
        bench_graph.measure(make_pair("gpt2")[0].to(device), 2, rounds=1)


def pretend_persistent(launch: Launch, monkeypatch) -> None:
    """bench_persistent's chain runs on the CPU."""
    chain = partial(PersistentChain, launch=launch, blocks=3, threads=64)
    for name, value in {"PersistentChain": chain, "ROUNDS": 1}.items():
        monkeypatch.setattr(bench_persistent, name, value)
    for name, value in {"PROMPT": 5, "ROOM": 32}.items():
        monkeypatch.setattr(bench_graph, name, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_persistent_benchmark(dtype: torch.dtype, launch: Launch, monkeypatch) -> None:
    pretend_persistent(launch, monkeypatch)
    found = bench_persistent.measure(make_pair("llama", dtype)[0], 2)
    assert set(found) == {"graph", "persistent"} and all(seconds > 0 for seconds in found.values())


def test_persistent_benchmark_refuses_a_wrong_result(launch: Launch, monkeypatch) -> None:
    def without_its_end(tensors: dict, numbers: dict, blocks: int, threads: int) -> None:
        launch(tensors, numbers | {"end": numbers["end"] - 2}, blocks, threads)

    pretend_persistent(without_its_end, monkeypatch)
    monkeypatch.setattr(bench_graph.Timed, "pass_seconds", lambda *a: pytest.fail("a wrong result is timed"))
    with pytest.raises(AssertionError, match="nothing is timed"):
        bench_persistent.measure(make_pair("llama")[0], 2)


def test_the_gate_passes_right_states_of_a_deep_model_and_none_without_an_mlp(monkeypatch) -> None:
    """With random weights correct states drift apart with every thought: in this model to 0.2 after six."""
    monkeypatch.setattr(bench_graph, "PROMPT", 5)
    monkeypatch.setattr(bench_graph, "ROOM", 32)
    settings = FAMILIES["llama"] | {"num_hidden_layers": 16, "intermediate_size": 128, "initializer_range": 0.16}
    config = AutoConfig.for_model("llama", vocab_size=96, bos_token_id=0, eos_token_id=0, pad_token_id=0, **settings)
    model = Coconut(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval(), TOKENS)
    assert len(bench_graph.measure(model, 4, rounds=1)) == 10
    expected = bench_graph.Timed(model, 4, "hugging face").states()
    model.hf.model.layers[7].mlp.down_proj.weight.data.zero_()
    with pytest.raises(AssertionError, match="nothing is timed"):
        bench_graph.assert_near(bench_graph.Timed(model, 4, "fused").states(), expected)


def test_trouble_of_hugging_faces_body_leaves_our_figures(device, monkeypatch) -> None:
    replay = GraphRunner.replay

    def troubled(self, batch, kind, *count):
        replay(self, batch, kind, *count)
        self.fallback_reason = "" if isinstance(self.passes, FusedPasses) else "capture failed"

    monkeypatch.setattr(bench_graph, "PROMPT", 5)
    monkeypatch.setattr(bench_graph, "ROOM", 32)
    monkeypatch.setattr(GraphRunner, "replay", troubled)
    with pytest.warns(UserWarning, match="left out: capture failed"):
        found = bench_graph.measure(make_pair("gpt2")[0].to(device), 2, rounds=1)
    assert len(found) == 5 and not any("hugging face" in name for name in found)
    figures = Figures()
    for peer in (found.get("think, hugging face, graph"), 2e-3):
        figures.add("latent pass", 1e-3, hf_body_graph=peer)
    assert [line.split()[3:] for line in figures.table()[1:]] == [["ms"], ["ms", "2", "ms", "(2.00x)"]]


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


def test_a_step_that_reads_every_token_does_so_in_batches_for_graphs_too(monkeypatch) -> None:
    for module in (ragged_batch, buckets):  # restored after the test
        monkeypatch.setattr(module, "used_positions", module.used_positions)
    shapes = [(20, 3, 4), (9, 3, 5)]
    assert [made.passes[0].used is None for made in both(shapes)] == [False, False]
    train_step.read_everything(make_pair("gpt2")[0])
    assert [p.used for made in both(shapes) for p in made.passes] == [None] * 8


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
