"""Memory and CPUs: what the machine has, within what the container leaves of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coconut_fast import Coconut, KVCache, generate
from coconut_fast.infer import engine, machine, native
from coconut_fast.infer.prefill import prefill
from tests.families import FAMILIES, TOKENS, make_pair
from tests.test_native import native_chains, random_model, wrap


def test_a_cache_beyond_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make_pair("llama")
    free = type("", (), {"available": 20_000})
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: free)
    with pytest.raises(ValueError, match="batch_size: a cache of 5 rows needs .* GB are free"):
        generate(model, [[5, 6]] * 5, batch_size=5)
    monkeypatch.undo()
    assert generate(model, [[5, 6]] * 5, max_new_tokens=1).token_ids


@pytest.mark.parametrize("sampled", [{}, {"num_samples": 3, "temperature": 1.0, "seed": 1}], ids=["greedy", "sampled"])
def test_one_long_prompt_does_not_size_the_rows_of_short_ones(sampled: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the sum of what the rows need; and where nobody named a number of rows, as many are taken as fit."""
    model, _ = make_pair("llama")
    prompts, options = [[5, 6]] * 7 + [[7, 8] * 100], {"max_new_tokens": 5, **sampled}
    samples = options.get("num_samples", 1)
    expected = generate(model, prompts, **options).token_ids
    needed = machine.cache_bytes(model, 16 * samples * (7 * 2 + 14))
    one = machine.cache_bytes(model, 16 * samples * 14)
    sizes, begin = [], engine.Engine.run
    monkeypatch.setattr(engine.Engine, "run", lambda self: sizes.append(self.batch_size) or begin(self))
    for free, batch_size in ((needed, 8 * samples), (-(-needed * 4 // 3), None), (one * 2, None), (one, None)):
        monkeypatch.setattr(machine, "free_bytes", lambda device, free=free: free)
        assert generate(model, prompts, batch_size=batch_size, **options).token_ids == expected
    assert sizes[:2] == [8 * samples] * 2 and 8 * samples > sizes[2] > sizes[3] == samples
    for free, batch_size, rows in ((needed - 1, 8 * samples, 8 * samples), (one - 1, None, samples)):
        monkeypatch.setattr(machine, "free_bytes", lambda device, free=free: free)
        with pytest.raises(ValueError, match=f"batch_size: a cache of {rows} rows needs"):
            generate(model, prompts, batch_size=batch_size, **options)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("qwen3", {}),
        ("gemma4_text", {"hidden_size_per_layer_input": 0, "head_dim": 8, "global_head_dim": 16}),
        ("jetmoe", {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
        ("deepseek_v3", {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 12}),
    ],
)
def test_a_cache_has_the_bytes_it_was_said_to_need(family: str, changes: dict) -> None:
    """Gemma 4's layers have heads of different widths, DeepSeek's keys are wider than its values, and JetMoe has heads
    for each expert."""
    small = {"vocab_size": 96, **FAMILIES.get(family, FAMILIES["llama"]), **changes}
    model = Coconut(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small)).eval(), TOKENS)
    cache = KVCache(model.num_layers, num_slots=32, max_rows=1)
    prefill(model, cache, cache.alloc(1), [[5, 6]])
    held = sum(stored.numel() * stored.element_size() for stored in (*cache.keys, *cache.values))
    assert machine.cache_bytes(model, 32) == held
    assert generate(model, [[5, 6, 94]], max_new_tokens=1).num_thoughts == [1]


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, _ = make_pair("llama")
    monkeypatch.setattr(machine, "CONTAINER", tmp_path)
    whole = machine.free_bytes(torch.device("cpu"))
    for name, text in (("max", "1000000"), ("current", "990000"), ("stat", "anon 7\ninactive_file 4000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert machine.free_bytes(torch.device("cpu")) == 14_000 < whole
    with pytest.raises(ValueError, match=r"a cache of 5 rows needs .* GB, 0.00 GB are free"):
        generate(model, [[5, 6]] * 5, batch_size=5)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_bytes(torch.device("cpu")) > 14_000


def test_threads_are_torchs_within_the_process_and_its_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, before = wrap(random_model("gpt2")), torch.get_num_threads()
    monkeypatch.setattr(machine, "CONTAINER", tmp_path)  # without limits
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    try:
        torch.set_num_threads(3)
        three = native.packed(model)
        assert three.chain.threads == machine.cpus() == 3
        expected = native_chains(three)
        torch.set_num_threads(2)
        two = native.packed(model)
        assert two is three and two.chain.threads == 2, "weights are packed once"
        assert torch.equal(native_chains(two), expected)
        torch.set_num_threads(8)
        assert machine.cpus() == 4  # CPUs it may run on
        for file, text, count in (
            ("cpu.max", "250000 100000\n", 2),
            ("cpu.max", "max 100000\n", 4),
            ("cpu.max", "50000 100000\n", 1),
        ):
            (tmp_path / file).write_text(text)
            assert machine.cpus() == count, text
        (tmp_path / "cpu.max").unlink()
        (tmp_path / "cpu").mkdir()  # cgroups version 1
        (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
        for quota, count in (("300000\n", 3), ("-1\n", 4)):
            (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
            assert machine.cpus() == count, quota
    finally:
        torch.set_num_threads(before)
