"""The persistent kernel: its own source on the CPU (tests/cuda_on_cpu.h), and on a GPU where there is one."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from coconut_fast.infer import persistent
from coconut_fast.infer.fused import FusedPasses
from coconut_fast.infer.passes import StaticBatch
from coconut_fast.infer.persistent import Launch, PersistentChain, schedule
from coconut_fast.infer.sampling import Sampling
from coconut_fast.model.coconut import Coconut
from coconut_fast.model.feedback import make_feedback
from tests.compare import assert_as_good_as_torch
from tests.persistent_setup import (
    COUNTS,
    MODELS,
    PROMPTS,
    ROOT,
    Start,
    last_states,
    machine,
    plan_of,
    start,
)
from tests.test_native import random_model, wrap
from tests.test_plan import gpt2, llama_like

DTYPES = [torch.float32, torch.bfloat16]


def loud(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Random weights of a size at which norms, biases and scores all matter."""
    with torch.no_grad():
        for parameter in model.eval().parameters():
            parameter.mul_(2.0).add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


def build(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """As in test_native, but with GPT-2 heads of 16 dimensions: 16-byte loads of bf16 need a multiple of 8."""
    torch.manual_seed(0)  # the same model in every call
    return loud(gpt2(n_embd=64), dtype) if name == "gpt2" else random_model(name, dtype)


def chain_of(model: Coconut, at: Start, launch: Launch, blocks: int = 3, threads: int = 64) -> PersistentChain:
    return PersistentChain(model, at.cache, Sampling(), launch=launch, blocks=blocks, threads=threads)


def think(model: Coconut, at: Start, launch: Launch, count: int = 3, blocks: int = 3, threads: int = 64):
    """The states after `count` passes, of the rows in use."""
    chain_of(model, at, launch, blocks, threads).think(at.batch, count)
    return at.batch.hidden[: at.rows].clone()


# ---- on the CPU ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_chains_are_as_good_as_torch(name: str, dtype: torch.dtype, launch: Launch) -> None:
    hf = build(name, dtype)
    model = wrap(hf)
    at = start(model)
    ours = think(model, at, launch)
    truth = last_states(copy.deepcopy(hf).double())
    assert_as_good_as_torch(ours, last_states(hf), truth, what=name, working=dtype)
    lengths = [len(p) + c for p, c in zip(PROMPTS, COUNTS, strict=True)]
    assert at.batch.lengths.tolist() == [*lengths, 0]
    assert at.batch.positions.tolist() == [*(n - 1 for n in lengths), -1]
    assert at.batch.remaining.tolist() == [0] * 4
    written = [int((~side[:, 0, 0].isnan()).sum()) for side in (*at.cache.keys, *at.cache.values)]
    assert set(written) == {sum(lengths)}, "slots beside the thoughts' own were written"


@pytest.mark.parametrize("batch", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_layer_of_gpt2_with_as_many_threads_as_on_a_gpu(batch: int, launch: Launch) -> None:
    hf = gpt2(n_embd=768, n_head=12, n_layer=1, n_positions=512).eval().bfloat16()
    model = wrap(hf)
    prompts = [[(3 * i + j) % 90 + 3 for j in range(n)] for i, n in enumerate((330, 5, 40, 12, 300, 7, 9, 100))][:batch]
    counts = [2, 1, 2, 1, 1, 2, 0, 1][:batch]
    ours = think(model, start(model, prompts, counts, batch, room=400), launch, 2, blocks=7, threads=persistent.THREADS)
    truth = last_states(copy.deepcopy(hf).double(), prompts, counts)
    assert_as_good_as_torch(ours, last_states(hf, prompts, counts), truth, working=torch.bfloat16)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_every_phase_by_itself(name: str, launch: Launch) -> None:
    """Launched one by one, each phase gives what the Python machine gives, and all together what one launch gives."""
    hf = build(name, torch.float32)
    model = wrap(hf)
    together = think(model, start(model), launch)
    at = start(model)
    chain = chain_of(model, at, launch)
    program = schedule(chain.plan, batch=4, blocks=3, splits=1)
    plain = machine(model, program, at, rows=4)
    model_64 = wrap(copy.deepcopy(hf).double())
    truth = machine(model_64, program, at, rows=4)
    buffers = {"hidden": at.batch.hidden, "x": at.batch.stream}
    for i in range(3 * chain.phases + 1):
        chain.run(at.batch, 3, i, i + 1)
        for each in (plain, truth):
            each.run(3, end=i + 1)
        buffers |= {n: chain.made[4][n] for n in ("qkv", "mid")}
        for buffer, ours in buffers.items():
            known = ~truth.memory.data[buffer].isnan()
            names = f"{buffer} behind instruction {i} ({persistent.OPCODES[program[0, i % chain.phases, 0]]})"
            assert_as_good_as_torch(
                ours[known], plain.memory.data[buffer][known], truth.memory.data[buffer][known], what=names
            )
    assert torch.equal(at.batch.hidden[:3], together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_batch_on_any_number_of_blocks(dtype: torch.dtype, launch: Launch) -> None:
    model = wrap(build("llama", dtype))
    prompts = [[7 * i + j for j in range(1 + 5 * i % 11)] for i in range(4)]
    counts = [1 + i % 3 for i in range(4)]
    at = start(model, prompts, counts, size=4)
    sides = [*at.cache.keys, *at.cache.values]
    before, hidden = [side.clone() for side in sides], at.batch.hidden.clone()
    together = think(model, at, launch, blocks=5)
    for i, prompt in enumerate(prompts):
        for size, blocks in ((1, 1), (2, 3), (4, 20)):
            for side, kept in zip(sides, before, strict=True):
                side.copy_(kept)
            batch = StaticBatch(size, model.hf.config.hidden_size, 1, torch.float32, model.device)
            batch.fill([int(at.batch.rows[i])], [len(prompt)], [counts[i]])
            batch.hidden[0] = hidden[i]
            (alone,) = think(model, Start(at.cache, batch, 1), launch, blocks=blocks)
            assert torch.equal(alone, together[i]), f"row {i} in a batch of {size} on {blocks} blocks"


def test_the_order_of_blocks_does_not_show(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(random_model("qwen2"))
    forwards = think(model, start(model), launch)
    monkeypatch.setenv("COCONUT_FAST_REVERSED", "1")
    assert torch.equal(think(model, start(model), launch), forwards)


def test_one_chain_is_as_many_thoughts_one_by_one(launch: Launch) -> None:
    model = wrap(random_model("llama"))
    together = think(model, start(model), launch, count=3)
    at = start(model)
    chain = chain_of(model, at, launch)
    for _ in range(4):  # the fourth finds no row that has a thought left
        chain.think(at.batch, 1)
    assert torch.equal(at.batch.hidden[:3], together)


LONG = {
    "gpt2": lambda: gpt2(n_positions=700),
    "mistral": lambda: llama_like("Mistral", max_position_embeddings=700, sliding_window=270),
    "qwen2": lambda: llama_like("Qwen2", max_position_embeddings=700),
}


@pytest.mark.parametrize("name", LONG)
def test_long_prompts_are_attended_to_in_splits(name: str, launch: Launch) -> None:
    """Two and three splits of 256 positions, and a window that begins inside one."""
    hf = loud(LONG[name]())
    model = wrap(hf)
    prompts = [[(3 * i + j) % 90 + 3 for j in range(n)] for i, n in enumerate((255, 300, 520))]
    counts = [3, 1, 2]
    ours = think(model, start(model, prompts, counts, size=4, room=528), launch, blocks=40)
    truth = last_states(copy.deepcopy(hf).double(), prompts, counts)
    assert_as_good_as_torch(ours, last_states(hf, prompts, counts), truth, what=name)


def test_a_share_too_large_for_shared_memory_is_refused(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(loud(gpt2(n_inner=1100)))
    expected = think(model, start(model), launch, blocks=16)
    monkeypatch.setenv("COCONUT_FAST_SHARED_LIMIT", "30000")
    assert torch.equal(think(model, start(model), launch, blocks=16), expected)
    with pytest.raises(RuntimeError, match="too wide"):
        think(model, start(model), launch, blocks=1)


def test_an_error_of_the_runtime_is_told_and_not_left_behind(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(random_model("llama"))
    expected = think(model, start(model), launch)
    with monkeypatch.context() as patch:
        patch.setenv("COCONUT_FAST_ATTRIBUTE_FAILS", "1")
        with pytest.raises(RuntimeError, match="invalid value"):
            think(model, start(model), launch)
    assert torch.equal(think(model, start(model), launch), expected)


def test_forked_rows_share_their_prompt(launch: Launch) -> None:
    model = wrap(random_model("llama"))
    at = start(model, PROMPTS[:1], [2])
    (fork,) = at.cache.fork([int(at.batch.rows[0])])
    at.cache.reserve([fork], [2])
    at.batch.fill([int(at.batch.rows[0]), fork], [18, 18], [2, 2])
    at.batch.hidden[1] = at.batch.hidden[0]
    at.rows = 2
    states = think(model, at, launch, count=2)
    assert torch.equal(states[0], states[1])


def test_rescaled_feedback(launch: Launch) -> None:
    hf = random_model("llama")
    model = wrap(hf, feedback=make_feedback("rescale", hf.get_input_embeddings()))
    ours = think(model, start(model), launch)
    at = start(model)
    results = []
    for dtype in (torch.float32, torch.float64):
        each = wrap(copy.deepcopy(hf).to(dtype))
        program = schedule(plan_of(each), batch=3, blocks=2, splits=1)
        results.append(machine(each, program, at, rescale=float(model.feedback.mean_norm)).run(3))
    assert_as_good_as_torch(ours, *results)


def test_larger_batches_think_as_fused_passes(launch: Launch) -> None:
    model = wrap(random_model("llama"))
    ours = think(model, start(model, size=16), launch)
    at = start(model, size=16)
    with torch.inference_mode():
        FusedPasses(model, at.cache, Sampling()).think(at.batch, 3)
    assert torch.equal(ours, at.batch.hidden[:3])


# ---- what is refused, and what two files must agree on ------------------------------------------------------------


def test_what_the_kernel_does_not_know_is_refused_with_its_reason(launch: Launch) -> None:
    def refused(model: Coconut, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            chain_of(model, start(model), launch)

    refused(wrap(random_model("gpt2", torch.bfloat16)), "head_dim is 12, not a multiple of 8")
    refused(wrap(random_model("llama").half()), "float16")
    hf = random_model("llama")
    refused(wrap(hf, feedback=make_feedback("projection", hf.get_input_embeddings())), "Projection")
    refused(wrap(gpt2(activation_function="relu")), "relu")
    refused(wrap(gpt2(n_embd=64, activation_function="gelu")), "'gelu'")
    model = wrap(gpt2())
    model.hf.transformer.h[1].ln_2.bias = torch.nn.Parameter(torch.zeros(49)[1:])
    refused(model, "1.ln_2.bias does not begin at a multiple of 16 bytes")
    for name in ("transformer.ln_f", "transformer.wpe", "transformer.h.0.ln_1"):
        hf = gpt2()
        hf.get_submodule(name).double()
        assert "float64 and the model torch.float32" in str(persistent._unfit(wrap(hf))), name
    hf = random_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        refused(wrap(hf), "autocast")
    assert "cpu" in str(persistent.reason_not(wrap(hf)))


def test_it_is_off_until_a_measurement_is_committed() -> None:
    assert persistent.enabled("a device that nobody has measured") == (
        False,
        "no committed measurement shows it faster than the graph on this device",
    )


def test_a_committed_measurement_switches_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(persistent.FASTER_ON, "a device", "a-device/bench_persistent.json")
    assert persistent.enabled("a device") == (True, "faster than the graph: a-device/bench_persistent.json")


def test_python_and_cuda_agree_on_instructions_and_layers() -> None:
    header = (ROOT / "csrc" / "cuda" / "program.h").read_text()

    def names(pattern: str) -> tuple[str, ...]:
        found = re.search(pattern, header, re.S)
        assert found, pattern
        return tuple(re.findall(r"\w+", found[1]))

    assert names(r"enum Opcode : int32_t \{(.*?)\}") == tuple(f"k{op.capitalize()}" for op in persistent.OPCODES)
    assert names(r"struct Instruction \{\s*int32_t (.*?);") == persistent.FIELDS
    lists = re.findall(r"(?:const )?void (\*.*?);", re.search(r"struct Layer \{(.*?)\};", header, re.S)[1])
    assert tuple(re.findall(r"\w+", " ".join(lists))) == persistent.LAYER_POINTERS
    constants = dict(re.findall(r"constexpr int (\w+) = (\d+);", header))
    agreed = {"kSplit": persistent.SPLIT, "kMaxRows": persistent.MAX_ROWS, "kThreads": persistent.THREADS}
    assert {name: int(constants[name]) for name in agreed} == agreed


# ---- on a GPU -----------------------------------------------------------------------------------------------------


def on_gpu(name: str, dtype: torch.dtype) -> Coconut:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if reason := persistent.reason_not(model := wrap(build(name, dtype)).cuda()):
        pytest.fail(f"the persistent kernel does not run here: {reason}")
    return model


def gpu_chain(model: Coconut, at: Start) -> PersistentChain:
    return PersistentChain(model, at.cache, Sampling())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gpu_chains_are_as_good_as_torch(name: str, dtype: torch.dtype) -> None:
    model = on_gpu(name, dtype)
    at = start(model)
    gpu_chain(model, at).think(at.batch, 3)
    hf = build(name, dtype)
    truth = last_states(copy.deepcopy(hf).double())
    assert_as_good_as_torch(at.batch.hidden[:3].cpu(), last_states(hf), truth, what=name, working=dtype)
    assert at.batch.remaining.tolist() == [0] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("size", [3, 4])
def test_gpu_chains_repeat_bit_for_bit_phase_by_phase_and_under_a_graph(size: int) -> None:
    model = on_gpu("gpt2", torch.bfloat16)

    def fresh() -> tuple[PersistentChain, Start]:
        at = start(model, size=size)
        return gpu_chain(model, at), at

    chain, at = fresh()
    chain.think(at.batch, 3)
    expected = at.batch.hidden.clone()
    for _ in range(20):
        chain, at = fresh()
        chain.think(at.batch, 3)
        assert torch.equal(at.batch.hidden, expected)
    chain, at = fresh()
    for i in range(3 * chain.phases + 1):
        chain.run(at.batch, 3, i, i + 1)
    assert torch.equal(at.batch.hidden, expected)
    chain, at = fresh()
    remaining = at.batch.remaining.clone()
    at.batch.remaining.zero_()
    chain.think(at.batch, 3)  # builds program and scratch, changes nothing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain.think(at.batch, 3)
    at.batch.remaining.copy_(remaining)
    graph.replay()
    assert torch.equal(at.batch.hidden, expected)


@pytest.mark.gpu
def test_gpu_sanitizer_persistent() -> None:
    """Small enough for compute-sanitizer: one layer's worth of every phase, two splits, idle rows."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = wrap(loud(llama_like("Mistral", max_position_embeddings=700, sliding_window=270), torch.bfloat16)).cuda()
    prompts = [[(3 * i + j) % 90 + 3 for j in range(n)] for i, n in enumerate((300, 5, 40))]
    at = start(model, prompts, [2, 1, 0], size=4, room=320)
    gpu_chain(model, at).think(at.batch, 2)
    assert torch.isfinite(at.batch.hidden).all()
