"""The graph runner: the same answers as the eager runner's, captured once; test_runner_cache.py tests what is kept.

On a CPU its passes run eagerly; `-m gpu` captures and replays them.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from coconut_fast import generate
from coconut_fast.infer import capture, cuda_graphs, engine, fused, runner_cache
from coconut_fast.infer.cuda_graphs import GraphRunner
from coconut_fast.infer.eager import EagerRunner
from coconut_fast.infer.fused import FusedPasses
from coconut_fast.infer.passes import HuggingFacePasses, StaticBatch, StaticPrompts
from coconut_fast.model.cache import KVCache
from tests.families import FAMILIES, make_pair, make_row

PROMPTS = [make_row(n, k, 0, seed) for seed, (n, k) in enumerate([(5, 2), (12, 1), (3, 19), (30, 6), (4, 6)])]
# without thoughts, with prefilled tokens after them, with thoughts in two places, with thoughts at the end
OTHERS = [[4, 5, 6], [7, 94, 8, 9], make_row(6, 0, 0, 9), [5, 94, 94, 6, 94, 8, 4], [3, 94, 8, 94, 94]]


@pytest.fixture(params=[{}, {"temperature": 0.8, "seed": 2, "top_k": 30, "num_samples": 2}], ids=["greedy", "sampled"])
def options(request) -> dict:
    return {"max_new_tokens": 11, **request.param}


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_passes_write_what_eager_ones_write(family: str, options: dict, monkeypatch) -> None:
    model, _ = make_pair(family)
    prompts = PROMPTS + OTHERS
    expected = [generate(model, [p], **options).token_ids for p in prompts]
    monkeypatch.setattr(engine, "choose_runner", lambda model: (GraphRunner, "asked for"))
    together = generate(model, prompts, **options)
    assert together.stats.backend == "graph"
    assert together.token_ids == [ids for answers in expected for ids in answers]


def test_a_batch_of_any_prompts_thinks_by_replay(monkeypatch) -> None:
    """Rows without thoughts are idle, and more rows than the largest static batch holds are split into parts."""
    model, _ = make_pair("llama")
    prompts = PROMPTS + OTHERS
    expected = generate(model, prompts, max_new_tokens=3).token_ids
    prefilled, kinds = [], []
    prefill, replay = GraphRunner._prefill, GraphRunner.replay
    monkeypatch.setattr(cuda_graphs, "BUCKETS", (1, 2, 4))
    monkeypatch.setattr(GraphRunner, "_prefill", lambda *a: (prefilled.append(a[4]), prefill(*a)))
    monkeypatch.setattr(
        GraphRunner, "replay", lambda self, b, kind, *n: (kinds.append(kind), replay(self, b, kind, *n))
    )
    monkeypatch.setattr(engine, "choose_runner", lambda model: (GraphRunner, "asked for"))
    assert generate(model, prompts, max_new_tokens=3).token_ids == expected
    assert [len(tokens) for tokens in prefilled] == [4, 4, 2, 2, 1], (
        "parts of 4, 4 and 2 rows; tails where one is longer"
    )
    assert kinds.count("think") > 0 and kinds.count("feed") > 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_thoughts_are_handed_out(family: str, monkeypatch) -> None:
    model, _ = make_pair(family)
    prompts = PROMPTS + OTHERS
    monkeypatch.setattr(engine, "choose_runner", lambda model: (EagerRunner, "asked for"))
    expected = generate(model, prompts, max_new_tokens=2, return_thoughts=True)
    monkeypatch.setattr(engine, "choose_runner", lambda model: (GraphRunner, "asked for"))
    found = generate(model, prompts, max_new_tokens=2, return_thoughts=True)
    assert found.token_ids == expected.token_ids and found.stats.latent_passes == 19 + 2
    for ours, theirs, count in zip(found.thoughts, expected.thoughts, found.num_thoughts, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == (count, 32)
        if count:
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_rows_that_end_early_stop_where_they_ended(monkeypatch) -> None:
    model, _ = make_pair("gpt2")
    first = generate(model, [PROMPTS[0]], max_new_tokens=6).token_ids[0]
    model.tokens = type(model.tokens)(start=93, thought=94, end=95, eos=first[3])
    expected = generate(model, PROMPTS, max_new_tokens=11).token_ids
    monkeypatch.setattr(engine, "choose_runner", lambda model: (GraphRunner, "asked for"))
    assert generate(model, PROMPTS, max_new_tokens=11, batch_size=2).token_ids == expected


def test_two_threads_capture_one_after_the_other(monkeypatch) -> None:
    inside, most = [], []
    capture = GraphRunner._capture

    def slow(self, *arguments):
        inside.append(self)
        most.append(len(inside))
        time.sleep(0.02)
        inside.remove(self)
        return capture(self, *arguments)

    monkeypatch.setattr(GraphRunner, "_capture", slow)
    monkeypatch.setattr(engine, "choose_runner", lambda model: (GraphRunner, "asked for"))
    models = [make_pair("gpt2")[0] for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda m: generate(m, PROMPTS[:1], max_new_tokens=2).token_ids, models))
    assert answers[0] == answers[1] and len(most) >= 6 and set(most) == {1}


def test_reasons_say_what_passes_are_made_of(kept) -> None:
    assert "fused kernels, five launches" in generate(make_pair("qwen3")[0], [PROMPTS[0]]).stats.reason
    other = generate(make_pair("gemma2")[0], [PROMPTS[0]]).stats
    assert "Hugging Face's body: model type 'gemma2' is not one of gpt2" in other.reason


def test_stats_know_how_near_a_pass_came_to_the_memory(kept, monkeypatch) -> None:
    monkeypatch.setattr(cuda_graphs, "copy_bandwidth", lambda device: 1e9)
    model, _ = make_pair("qwen2")  # its head is its embedding table
    stats = generate(model, PROMPTS, max_new_tokens=11).stats
    assert stats.measure_bandwidth() == 1e9
    body = sum(p.nbytes for p in model.hf.model.layers.parameters())
    assert stats.bytes_per_latent_pass == body
    assert stats.bytes_per_token_pass == body + model.hf.lm_head.weight.nbytes
    stats.think_seconds, stats.latent_passes, stats.bytes_per_latent_pass = 6.0, 3, 10**9  # 0.5 GB/s of 1
    assert stats.bandwidth_share == 0.5
    monkeypatch.undo()
    assert 1e8 < cuda_graphs.copy_bandwidth(torch.device("cpu"), 1 << 22) < 1e13


def test_the_host_looks_once_every_eight_tokens(kept, monkeypatch) -> None:
    """Between two checks nothing is read from the device: a row that ends early is found at the next one."""
    model, _ = make_pair("gpt2")
    looks, replays = [], []
    decode, replay = GraphRunner._decode, GraphRunner.replay
    monkeypatch.setattr(GraphRunner, "_decode", lambda self, *a: (looks.append(1), decode(self, *a)))
    monkeypatch.setattr(
        GraphRunner, "replay", lambda self, batch, kind, *n: (replays.append(kind), replay(self, batch, kind, *n))
    )
    answer = generate(model, [PROMPTS[0]], max_new_tokens=33).token_ids[0]
    assert len(answer) == 33 and len(looks) == 4 and replays.count("decode") == 32
    assert replays.count("think") == 1 and replays.count("feed") == 1


def test_a_look_that_changes_no_row_fills_nothing(kept, monkeypatch) -> None:
    model, _ = make_pair("gpt2")
    expected = generate(model, PROMPTS, max_new_tokens=30, temperature=0.7, seed=1).token_ids
    filled = []
    fill = StaticBatch.fill
    monkeypatch.setattr(StaticBatch, "fill", lambda self, *a: (filled.append(a[0]), fill(self, *a)))
    assert generate(model, PROMPTS, max_new_tokens=30, temperature=0.7, seed=1).token_ids == expected
    assert all(len(ids) == 30 for ids in expected), "nobody ends early, so four looks find the same rows"
    assert len(filled) == 2, "for the thoughts, for the first tokens, and not at the next three looks"


def test_groups_wait_for_a_quarter_of_the_batch(kept, monkeypatch) -> None:
    """Rows that end early are not replaced one by one: all running rows pause while a group thinks."""
    model, _ = make_pair("llama")
    prompts = [make_row(5 + n % 7, n % 3, 0, n) for n in range(30)]
    limits = [8 * (1 + n % 12) for n in range(30)]  # one row ends between two checks
    expected = [generate(model, [p], max_new_tokens=m).token_ids[0] for p, m in zip(prompts, limits, strict=True)]
    groups = []
    begin = GraphRunner.prefill_and_think
    monkeypatch.setattr(
        GraphRunner, "prefill_and_think", lambda self, rows, *a: (groups.append(len(rows)), begin(self, rows, *a))[1]
    )
    assert generate(model, prompts, max_new_tokens=limits, batch_size=12).token_ids == expected
    assert groups[0] == 12 and sum(groups) == 30 and min(groups[:-1]) >= 3


def test_fused_kernels_that_fail_give_way_to_hugging_faces_body(kept, monkeypatch) -> None:
    model, _ = make_pair("gpt2")
    expected = generate(model, PROMPTS, max_new_tokens=11).token_ids
    runner_cache._kept.clear()

    def fails(self, batch: StaticBatch) -> None:
        raise ValueError("no such instruction\nand more")

    monkeypatch.setattr(FusedPasses, "decode", fails)
    for _ in range(2):
        output = generate(model, PROMPTS, max_new_tokens=11)
        assert output.token_ids == expected
        assert output.stats.reason.endswith("body: fused kernels failed: ValueError: no such instruction")
        assert model not in runner_cache._kept, "the next call tries again"


def test_prompts_that_fused_kernels_have_begun_to_read_are_read_from_their_start(kept, monkeypatch) -> None:
    """The first of these kernels advances positions by one, which Hugging Face's body would do again."""
    model, _ = make_pair("gpt2")
    expected = generate(model, PROMPTS, max_new_tokens=11).token_ids
    runner_cache._kept.clear()
    begin = FusedPasses.prefill

    def fails(self, prompts: StaticPrompts) -> None:
        begin(self, prompts)
        raise ValueError("out of shared memory")

    monkeypatch.setattr(FusedPasses, "prefill", fails)
    output = generate(model, PROMPTS, max_new_tokens=11)
    assert output.stats.reason.endswith("body: fused kernels failed: ValueError: out of shared memory")
    assert output.token_ids == expected


def test_want_of_memory_is_not_taken_for_a_kernel_that_fails(kept, monkeypatch) -> None:
    """If packing the weights runs out of memory, Hugging Face's body needs none for it; later there is no fallback."""
    model, _ = make_pair("gpt2")
    expected = generate(model, PROMPTS, max_new_tokens=11).token_ids
    runner_cache._kept.clear()

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(fused, "_packed", fails)
        output = generate(model, PROMPTS, max_new_tokens=11)
    assert output.token_ids == expected and model not in runner_cache._kept
    why = "body: no memory to pack the weights: OutOfMemoryError: CUDA out of memory"
    assert output.stats.reason.endswith(why)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(FusedPasses, "decode", fails)
        generate(model, PROMPTS, max_new_tokens=11)
    assert "fused kernels" in generate(model, PROMPTS, max_new_tokens=11).stats.reason


def test_the_cache_has_its_memory_before_weights_are_packed(monkeypatch) -> None:
    """Packing may run out of memory, as Hugging Face's body works without it; nothing works without the cache."""
    model, _ = make_pair("llama")
    cache = KVCache(model.num_layers, num_slots=64)

    def fails(*_: object) -> None:
        assert None not in (*cache.keys, *cache.values)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fused, "_packed", fails)
    assert isinstance(cuda_graphs.choose_passes(model, cache, engine.Sampling()), HuggingFacePasses)


class Stream:
    """A stand-in for torch.cuda.Stream: which streams have waited for which, and which is current."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.waited = device, []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


@pytest.fixture
def streams(monkeypatch) -> SimpleNamespace:
    """Stand-ins for what warm-ups and captures use of a GPU; `capture` may be replaced."""
    device = torch.device("cuda", 1)
    state = SimpleNamespace(device=device, now=Stream(device), made=[], capture=lambda graph, pool, stream: None)
    state.generator = SimpleNamespace(set_to=[], clone_state=lambda: "a state that no graph waits for")
    state.generator.graphsafe_set_state = state.generator.set_to.append

    @contextmanager
    def use(stream: Stream):
        before, state.now = state.now, stream
        try:
            yield
        finally:
            state.now = before

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local", "other threads may allocate meanwhile"
        state.now = stream
        yield
        state.capture(graph, pool, stream)  # an error here leaves the stream current, as torch.cuda.graph does

    def make(device: torch.device) -> Stream:
        state.made.append(Stream(device))
        return state.made[-1]

    def current(device: torch.device) -> Stream:
        assert device == state.device
        return state.now

    stand_ins = {"Stream": make, "current_stream": current, "stream": use, "graph": graph}
    stand_ins |= {"synchronize": lambda device: None, "default_generators": {device.index: state.generator}}
    for name, stand_in in (stand_ins | {"CUDAGraph": lambda: SimpleNamespace(replay="replay")}).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    capture._stream.cache_clear()
    yield state
    capture._stream.cache_clear()


def test_captures_run_on_a_stream_of_the_models_device(streams) -> None:
    first = streams.now
    for _ in range(2):
        with capture.capture_stream(streams.device) as stream:
            assert streams.now is stream is streams.made[0] and stream.device == streams.device
            assert capture.capture_graph(lambda: None, stream, "the pool") == "replay"
        assert streams.now is first
    assert len(streams.made) == 1, "cuBLAS keeps a workspace for every stream it sees"
    assert stream.waited == [first, first] and first.waited == [stream, stream]


def test_a_capture_that_fails_leaves_the_stream_as_it_was(streams) -> None:
    def refuses(graph, pool, stream):
        raise RuntimeError("operation failed due to a previous error during capture")

    first, streams.capture = streams.now, refuses
    with pytest.raises(RuntimeError, match="previous error"), capture.capture_stream(streams.device) as stream:
        capture.capture_graph(lambda: None, stream, "the pool")
    assert streams.now is first and first.waited == [stream]
    assert streams.generator.set_to == ["a state that no graph waits for"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_numbers_can_be_drawn_after_a_capture_that_fails() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(1)
    expected = torch.rand(3, device=device)
    torch.manual_seed(1)
    with pytest.raises(RuntimeError), capture.capture_stream(device) as stream:
        capture.capture_graph(lambda: torch.rand(3, device=device).tolist(), stream, torch.cuda.graph_pool_handle())
    assert torch.equal(torch.rand(3, device=device), expected)


def test_passes_that_cannot_be_captured_run_launch_by_launch(monkeypatch, streams) -> None:
    model, _ = make_pair("gpt2")
    expected = generate(model, PROMPTS, max_new_tokens=11).token_ids
    begun = []

    def refuses(graph, pool, stream):
        begun.append(pool)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    streams.capture = refuses

    def runner(model, **options) -> GraphRunner:
        made = GraphRunner(model, **options)
        made.pool = "the pool"
        return made

    monkeypatch.setattr(cuda_graphs, "capture_stream", lambda device: capture.capture_stream(streams.device))
    monkeypatch.setattr(engine, "choose_runner", lambda model: (runner, "asked for"))
    output = generate(model, PROMPTS, max_new_tokens=11)
    assert output.token_ids == expected and set(begun) == {"the pool"}
    reason = (
        "capture failed, passes run launch by launch: RuntimeError: operation not permitted when stream is capturing"
    )
    assert output.stats.reason == reason


def _first(seen: list[torch.Tensor], first, runner: GraphRunner, hidden_BD: torch.Tensor, answers: list) -> None:
    seen.append(hidden_BD)
    first(runner, hidden_BD, answers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        *((family, torch.bfloat16, {}) for family in ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2")),
        ("gpt2", torch.float32, {}),
        ("gpt2", torch.bfloat16, {"temperature": 0.8, "seed": 2}),
        ("llama", torch.float32, {"temperature": 0.8, "seed": 2, "top_k": 30, "top_p": 0.9}),
    ],
)
def test_replay_equals_launch_by_launch(family: str, dtype: torch.dtype, options: dict, monkeypatch) -> None:
    """Tokens and states are equal bit for bit, for a chain that replays its graph twice and for several batch sizes."""
    prompts = [make_row(9 + n, 1 + n % 19, 0, n) for n in range(20)]
    runs, begun = [], GraphRunner.first_tokens
    for pool in (True, False):
        if not pool:
            monkeypatch.setattr(GraphRunner, "_capture", lambda self, passes, stream: passes)
        model = make_pair(family, dtype)[0].cuda()
        seen: list[torch.Tensor] = []
        first = partial(_first, seen, begun)
        monkeypatch.setattr(GraphRunner, "first_tokens", lambda self, h, d, first=first: first(self, h, d))
        answers = [generate(model, prompts[:n], max_new_tokens=12, **options) for n in (1, 3, 20)]
        assert all("capture failed" not in a.stats.reason for a in answers)
        runs.append(([a.token_ids for a in answers], seen))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("count", [1, 25])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_greedy_tokens_of_the_graphs_are_the_eager_runners(family: str, count: int, monkeypatch) -> None:
    model = make_pair(family)[0].cuda()
    prompts = (PROMPTS * 5)[:count]
    expected = generate(model, prompts, max_new_tokens=20)
    assert expected.stats.backend == "graph"
    monkeypatch.setattr(engine, "choose_runner", lambda model: (EagerRunner, "asked for"))
    assert generate(model, prompts, max_new_tokens=20).token_ids == expected.token_ids
