"""Where the time of a `generate` call went, and how close a pass came to the memory bandwidth."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch


class Clock:
    """Seconds and passes of each phase: "prefill", "think" (latent passes), "decode" (answer tokens).

    On a GPU, seconds are the device's, measured between events without waiting for it: phases are only queued.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.passes: Counter[str] = Counter()
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str, passes: int = 1) -> Iterator[None]:
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            yield
            stop.record(stream)
            self.events.append((phase, start, stop))
        else:
            begun = time.perf_counter()
            yield
            self.seconds[phase] += time.perf_counter() - begun
        self.passes[phase] += passes

    def read(self) -> None:
        """Waits for the device and adds the times between its events."""
        for phase, start, stop in self.events:
            stop.synchronize()
            self.seconds[phase] += start.elapsed_time(stop) / 1e3
        self.events.clear()


@dataclass
class GenerateStats:
    """backend: the runner of the passes; reason: why. Counts are over all rows; new_tokens has the end-of-text that an
    answer ended with, which its token_ids have not. Seconds are wall clock, on a GPU the device's.

    A pass is one forward of the whole batch. bytes_per_*_pass: the weights it must read (a latent pass has no LM head).
    """

    backend: str
    reason: str
    prompt_tokens: int = 0
    thoughts: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    think_seconds: float = 0.0
    decode_seconds: float = 0.0
    latent_passes: int = 0
    token_passes: int = 0
    bytes_per_latent_pass: int | None = None
    bytes_per_token_pass: int | None = None
    interrupted: bool = False
    measure_bandwidth: Callable[[], float] | None = field(default=None, repr=False)

    def take(self, clock: Clock) -> None:
        """Brings seconds and passes up to date."""
        clock.read()
        self.prefill_seconds = clock.seconds["prefill"]
        self.think_seconds = clock.seconds["think"]
        self.decode_seconds = clock.seconds["decode"]
        self.latent_passes, self.token_passes = clock.passes["think"], clock.passes["decode"]

    @property
    def seconds(self) -> float:
        """All three phases."""
        return self.prefill_seconds + self.think_seconds + self.decode_seconds

    @property
    def seconds_per_latent_pass(self) -> float | None:
        return self.think_seconds / self.latent_passes if self.latent_passes else None

    @property
    def seconds_per_token_pass(self) -> float | None:
        return self.decode_seconds / self.token_passes if self.token_passes else None

    @property
    def tokens_per_second(self) -> float:
        """New tokens and thoughts per second, prefill included in the time."""
        return (self.new_tokens + self.thoughts) / self.seconds if self.seconds else 0.0

    @property
    def bandwidth_share(self) -> float | None:
        """Share of this machine's memory bandwidth that the latent passes reached; the bandwidth is measured on
        first use, on a CPU by reading, on a GPU by a copy (read and written bytes)."""
        if self.measure_bandwidth is None or not self.bytes_per_latent_pass or not self.seconds_per_latent_pass:
            return None
        return self.bytes_per_latent_pass / self.seconds_per_latent_pass / self.measure_bandwidth()

    def __str__(self) -> str:
        """One line for people."""
        parts = [
            f"{self.backend}: {self.new_tokens} tokens and {self.thoughts} thoughts in {self.seconds:.2f} s",
            f"{self.tokens_per_second:.0f} a second",
        ]
        if self.seconds_per_latent_pass:
            parts.append(f"{self.seconds_per_latent_pass * 1e3:.2f} ms a latent pass")
        if self.seconds_per_token_pass:
            parts.append(f"{self.seconds_per_token_pass * 1e3:.2f} ms a token pass")
        return ", ".join(parts)


@lru_cache
def copy_bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes a second, read and written, of copying `size` bytes: what memory-bound kernels can reach. By default five
    times the L2 of an H100; the best of three rounds of ten copies."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else (lambda: None)
    rounds = []
    for _ in range(3):
        wait()
        begun = time.perf_counter()
        for _ in range(10):
            target.copy_(source)
        wait()
        rounds.append(time.perf_counter() - begun)
    del source, target
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return 20 * size / min(rounds)
