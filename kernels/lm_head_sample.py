"""The LM head and the choice of the next token in one op: ids from hidden states, without logits in memory.

    logits = hidden W^T (+ bias)
    greedy:  the id of the largest, ties to the lowest id
    sampled: p = softmax(logits / temperature), restricted to the top_k likeliest and of those to the fewest that reach
             top_p (ties to lower ids); the first id, in order of ids, where the kept p add up to more than
             numbers[b] of their sum.  numbers: counter-based uniforms of (seed, step), infer/sampling.py

Shapes: hidden (B, D), weight (V, D), bias (V,), numbers fp64 (B,) in [0, 1); ids int64 (B,).
First launch: one program per tile of the vocabulary computes its logits and keeps (largest, id) or (largest, sum of
exponentials) of each row. Second launch, one program per row: greedy reduces the tiles; sampling finds the tile that
holds numbers[b] and recomputes that tile's logits. So nothing of size (B, V) exists. Only top_k and top_p, which must
rank all logits, store them in an fp32 scratch that stays in L2 (0.2 MB per row for GPT-2) and rank by bisection.
Bytes: V D weights once, in 128-bit loads (GPT-2 77 MB, 18 us at 4.3 TB/s). Bound: memory bandwidth. Sums over the
vocabulary are fp64 over tiles, in order. Registers at most 255.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    TRITON_TYPE,
    check_dtypes,
    check_shape,
    on_device,
    overlaps,
    pdl_release,
    pdl_wait,
    products,
    register,
    shared_memory,
)


@triton.jit
def _head(
    hidden, weight, bias, tops, extras, scratch, hidden_row, weight_row, batch, inverse,
    D: tl.constexpr, V: tl.constexpr, PITCH: tl.constexpr, TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr, MODE: tl.constexpr, OVERLAP: tl.constexpr,
    DOT: tl.constexpr, TYPE: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pdl_wait(OVERLAP)
    pdl_release(OVERLAP)
    tile = tl.program_id(0)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask_m = m < batch
    v = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    mask_v = v < V
    logits = products(hidden, m, mask_m, hidden_row, weight, v, mask_v, weight_row, D, BLOCK_K, DOT, TYPE, STAGES)
    if HAS_BIAS:
        logits += tl.load(bias + v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    if MODE == "store":
        mask = mask_m[:, None] & mask_v[None, :]
        tl.store(scratch + m[:, None] * PITCH + v[None, :], logits * inverse, mask=mask)
    else:
        # NaN counts as the least: how a maximum treats it differs by backend, and the ids index the embedding table
        logits = tl.where(mask_v[None, :] & (logits == logits), logits, float("-inf"))
        if MODE == "greedy":
            top, at = tl.max(logits, axis=1, return_indices=True, return_indices_tie_break_left=True)
            tl.store(extras + m * TILES + tile, (tile * BLOCK_V + at).to(tl.float64), mask=mask_m)
        else:
            logits = logits * inverse
            top = tl.max(logits, axis=1)
            total = tl.sum(tl.exp(logits - top[:, None]), axis=1)
            tl.store(extras + m * TILES + tile, total.to(tl.float64), mask=mask_m)
        tl.store(tops + m * TILES + tile, top, mask=mask_m)


@triton.jit
def _largest(tops, extras, ids, TILES: tl.constexpr, BLOCK_T: tl.constexpr, OVERLAP: tl.constexpr):
    pdl_wait(OVERLAP)
    pdl_release(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    mask = t < TILES
    top = tl.load(tops + b * TILES + t, mask=mask, other=float("-inf"))
    _, tile = tl.max(top, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(ids + b, tl.load(extras + b * TILES + tile).to(tl.int64))


@triton.jit
def _sampled(
    hidden, weight, bias, tops, extras, numbers, ids, hidden_row, weight_row, inverse,
    D: tl.constexpr, V: tl.constexpr, TILES: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    pdl_wait(OVERLAP)
    pdl_release(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    mask = t < TILES
    top = tl.load(tops + b * TILES + t, mask=mask, other=float("-inf"))
    highest = tl.max(top, axis=0)
    mass = tl.load(extras + b * TILES + t, mask=mask, other=0.0) * tl.exp(top - highest).to(tl.float64)
    sums = tl.cumsum(mass, axis=0)
    at = tl.load(numbers + b) * tl.max(sums, axis=0)
    tile = tl.minimum(tl.sum(((sums <= at) & mask).to(tl.int32), axis=0), TILES - 1)
    before = tl.sum(tl.where(t < tile, mass, 0.0), axis=0)
    v = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    mask_v = v < V
    row = b + tl.arange(0, 1)
    logits = products(
        hidden, row, row >= 0, hidden_row, weight, v, mask_v, weight_row, D, BLOCK_K, False, tl.float32, 2
    )
    logits = tl.sum(logits, axis=0)
    if HAS_BIAS:
        logits += tl.load(bias + v, mask=mask_v, other=0.0).to(tl.float32)
    share = tl.where(mask_v, tl.exp(logits * inverse - highest), 0.0).to(tl.float64)
    inside = tl.cumsum(share, axis=0)
    count = tl.sum(((before + inside <= at) & mask_v).to(tl.int32), axis=0)
    last = tl.minimum(V - tile * BLOCK_V, BLOCK_V) - 1
    tl.store(ids + b, (tile * BLOCK_V + tl.minimum(count, last)).to(tl.int64))


@triton.jit
def _above(scores, cut, highest, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """How many scores are above cut, and the sum of their exponentials."""
    count = tl.zeros([BLOCK_V], tl.int32)
    mass = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        s = tl.load(scores + v, mask=v < V, other=float("-inf"))
        count += (s > cut).to(tl.int32)
        mass += tl.where(s > cut, tl.exp(s - highest), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass.to(tl.float64), axis=0)


@triton.jit
def _ranked(
    scratch, numbers, ids, top_k, top_p, V: tl.constexpr, PITCH: tl.constexpr, BLOCK_V: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    pdl_wait(OVERLAP)
    pdl_release(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    scores = scratch + b * PITCH
    highest = tl.full([BLOCK_V], float("-inf"), tl.float32)
    lowest = tl.full([BLOCK_V], float("inf"), tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        s = tl.load(scores + v, mask=v < V, other=float("-inf"))
        highest = tl.maximum(highest, s)
        lowest = tl.minimum(lowest, tl.where(v < V, s, float("inf")))
    high = tl.max(highest, axis=0)

    # The cut is the smallest score that is kept. First by rank: fewer than top_k are above it, at least top_k at or
    # above it. Then by mass of those kept by rank: less than top_p of it is above the cut, at least top_p at or above.
    count, mass = _above(scores, float("-inf"), high, V, BLOCK_V)
    cut = tl.min(lowest, axis=0)
    kept = mass
    room = tl.full([], V, tl.int32)
    if top_k < V:
        low, up = _bits(cut) - 1, _bits(high)
        while up - low > 1:  # at least top_k are above low, fewer above up
            middle = low + (up - low) // 2
            count, mass = _above(scores, _score(middle), high, V, BLOCK_V)
            if count < top_k:
                up = middle
            else:
                low = middle
        cut = _score(up)
        count, mass = _above(scores, cut, high, V, BLOCK_V)
        room = top_k - count  # how many of the scores equal to the cut are kept, lowest ids first
        kept = mass + room * tl.exp(cut - high).to(tl.float64)
    if top_p < 1:
        low, up = _bits(cut) - 1, _bits(high)
        while up - low > 1:
            middle = low + (up - low) // 2
            count, mass = _above(scores, _score(middle), high, V, BLOCK_V)
            if mass < top_p * kept:
                up = middle
            else:
                low = middle
        rank_cut = cut
        cut = _score(up)
        count, mass = _above(scores, cut, high, V, BLOCK_V)
        each = tl.exp(cut - high).to(tl.float64)
        needed = tl.ceil(((top_p * kept - mass) / each).to(tl.float32)).to(tl.int32)
        room = tl.where(cut > rank_cut, tl.maximum(needed, 1), tl.minimum(room, tl.maximum(needed, 1)))

    # In order of ids: add up the kept ones until they exceed numbers[b] of their sum.
    count, mass = _above(scores, cut, high, V, BLOCK_V)
    ties = tl.zeros([BLOCK_V], tl.int32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        ties += (tl.load(scores + v, mask=v < V, other=float("-inf")) == cut).to(tl.int32)
    equal = tl.minimum(tl.sum(ties, axis=0), room)
    at = tl.load(numbers + b) * (mass + equal * tl.exp(cut - high).to(tl.float64))
    behind = tl.full([], 0.0, tl.float64)
    seen = tl.full([], 0, tl.int32)
    chosen = tl.full([], V, tl.int32)
    last = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        s = tl.load(scores + v, mask=v < V, other=float("-inf"))
        tie = (s == cut).to(tl.int32)
        keep = (s > cut) | ((tie > 0) & (seen + tl.cumsum(tie, axis=0) <= room))
        keep = keep & (v < V)
        sums = behind + tl.cumsum(tl.where(keep, tl.exp(s - high), 0.0).to(tl.float64), axis=0)
        chosen = tl.minimum(chosen, tl.min(tl.where(keep & (sums > at), v, V), axis=0))
        last = tl.maximum(last, tl.max(tl.where(keep, v, 0), axis=0))
        behind = tl.max(sums, axis=0)
        seen += tl.sum(tie, axis=0)
    tl.store(ids + b, tl.minimum(chosen, last).to(tl.int64))


@triton.jit
def _bits(score):
    """A float as an integer that sorts the same way."""
    i = score.to(tl.int32, bitcast=True)
    return tl.where(i < 0, i ^ 0x7FFFFFFF, i).to(tl.int64)


@triton.jit
def _score(bits):
    """The inverse of _bits."""
    i = bits.to(tl.int32)
    return tl.where(i < 0, i ^ 0x7FFFFFFF, i).to(tl.float32, bitcast=True)


def _check(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, numbers: torch.Tensor | None,
    temperature: float, top_k: int, top_p: float,
) -> None:  # fmt: skip
    """ValueError for inputs that do not fit."""
    op, (batch, dim), vocabulary = "lm_head_sample", hidden.shape, weight.shape[0]
    check_dtypes(op, hidden=hidden, weight=weight, bias=bias)
    check_shape(op, "hidden", hidden, (batch, dim))
    check_shape(op, "weight", weight, (vocabulary, dim))
    if bias is not None:
        check_shape(op, "bias", bias, (vocabulary,))
    if not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"{op}: temperature {temperature}, top_k {top_k}, top_p {top_p}; expected temperature >= 0, top_k >= 0, "
            "0 < top_p <= 1"
        )
    if temperature > 0:
        if numbers is None or numbers.dtype != torch.float64:
            found = "None" if numbers is None else str(numbers.dtype)
            raise ValueError(f"{op}: numbers is {found}, expected float64 ({batch},) at a temperature above 0")
        check_shape(op, "numbers", numbers, (batch,))


def _launch(
    hidden: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor | None = None,
    numbers: torch.Tensor | None = None, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    (batch, dim), vocabulary = hidden.shape, weight.shape[0]
    _check(hidden, weight, bias, numbers, temperature, top_k, top_p)
    ids = torch.empty(batch, dtype=torch.int64, device=hidden.device)
    if batch == 0:
        return ids
    top_k = top_k if 0 < top_k < vocabulary else vocabulary
    ranked = top_k < vocabulary or top_p < 1
    mode = "greedy" if temperature == 0 else "store" if ranked else "sum"
    dot, block_m, block_v, block_k, stages = _tiles(hidden, weight)
    num_tiles = triton.cdiv(vocabulary, block_v)
    tops = torch.empty(batch * num_tiles, dtype=torch.float32, device=hidden.device)
    extras = torch.empty(batch * num_tiles, dtype=torch.float64, device=hidden.device)
    pitch = triton.cdiv(vocabulary, 16) * 16  # rows of the scratch start at vector boundaries
    scratch = torch.empty(batch * pitch, dtype=torch.float32, device=hidden.device) if mode == "store" else tops
    inverse = 1 / temperature if temperature else 1.0
    overlap = overlaps(hidden)
    with on_device(hidden):
        _head[(num_tiles, triton.cdiv(batch, block_m))](
            hidden=hidden,
            weight=weight,
            bias=bias,
            tops=tops,
            extras=extras,
            scratch=scratch,
            hidden_row=hidden.stride(0),
            weight_row=weight.stride(0),
            batch=batch,
            inverse=inverse,
            D=dim,
            V=vocabulary,
            PITCH=pitch,
            TILES=num_tiles,
            HAS_BIAS=bias is not None,
            MODE=mode,
            DOT=dot,
            TYPE=TRITON_TYPE[weight.dtype],
            STAGES=stages,
            BLOCK_M=block_m,
            BLOCK_V=block_v,
            BLOCK_K=block_k,
            OVERLAP=overlap,
            num_warps=4,
            launch_pdl=overlap,
        )
        block_t = triton.next_power_of_2(num_tiles)
        if mode == "greedy":
            _largest[(batch,)](
                tops=tops,
                extras=extras,
                ids=ids,
                TILES=num_tiles,
                BLOCK_T=block_t,
                OVERLAP=overlap,
                num_warps=4 if block_t < 8192 else 16,
                launch_pdl=overlap,
            )
        elif mode == "sum":
            _sampled[(batch,)](
                hidden=hidden,
                weight=weight,
                bias=bias,
                tops=tops,
                extras=extras,
                numbers=numbers,
                ids=ids,
                hidden_row=hidden.stride(0),
                weight_row=weight.stride(0),
                inverse=inverse,
                D=dim,
                V=vocabulary,
                TILES=num_tiles,
                HAS_BIAS=bias is not None,
                BLOCK_T=block_t,
                BLOCK_V=block_v,
                BLOCK_K=min(triton.next_power_of_2(dim), 128),
                OVERLAP=overlap,
                num_warps=8,
                launch_pdl=overlap,
            )
        else:
            _ranked[(batch,)](
                scratch=scratch,
                numbers=numbers,
                ids=ids,
                top_k=top_k,
                top_p=top_p,
                V=vocabulary,
                PITCH=pitch,
                BLOCK_V=min(triton.next_power_of_2(vocabulary), 4096),
                OVERLAP=overlap,
                num_warps=16,
                launch_pdl=overlap,
            )
    return ids


def _tiles(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[bool, int, int, int, int]:
    """Whether to use tensor cores, BLOCK_M, BLOCK_V, BLOCK_K, stages."""
    (batch, dim), itemsize = hidden.shape, weight.element_size()
    if batch == 1:
        return False, 1, 32, min(triton.next_power_of_2(dim), 256 // itemsize), 3
    block_m, block_v = min(64, max(16, triton.next_power_of_2(batch))), 64
    block_k = max(16, min(triton.next_power_of_2(dim), 256 // itemsize))
    stage = block_k * (block_m * hidden.element_size() + block_v * itemsize)
    return True, block_m, block_v, block_k, min(4, 1 + shared_memory(hidden) // stage)


_OP = register(
    "lm_head_sample(Tensor hidden, Tensor weight, *, Tensor? bias=None, Tensor? numbers=None, float temperature=0.0, "
    "int top_k=0, float top_p=1.0) -> Tensor",
    _launch,
    lambda hidden, weight, **keywords: hidden.new_empty(hidden.shape[0], dtype=torch.int64),
)


def lm_head_sample(
    hidden: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor | None = None,
    numbers: torch.Tensor | None = None, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """ids int64 (B,) as in the module's docstring. Greedy at temperature 0; else `numbers` is needed.

    Logits and exponentials are fp32 (infer/sampling.py ranks the model's own logits in fp64), so a sampled id can
    differ from its where numbers[b] falls within rounding of a boundary. ValueError for inputs that do not fit.
    """
    return _OP(hidden, weight, bias=bias, numbers=numbers, temperature=temperature, top_k=top_k, top_p=top_p)
