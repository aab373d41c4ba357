"""From one pass to the next on the device, in one launch: make each row's next input from its last hidden state, and
advance the row's position in the cache by one.

    h = source[last[b]];  h = norm(h) (LayerNorm or RMSNorm, optional);  thought[b] = h (optional)
    next_input[b] = h * target / |h| (optional) + position_embedding[positions[b] + 1] (optional)
    positions[b] += 1;  lengths[b] += 1;  remaining[b] -= 1;  attended[b] = lengths[b]

A row whose `remaining` is 0 is left unchanged, with `attended` 0, for which decode_attention writes nothing to the
cache: rows of one batch may have different numbers of thoughts in one graph. `attended`, if given, says on entry which
rows were in the pass that made `source`, and `thought` is written for those: the launch between two passes ends the one
and starts the other, and a row's last hidden state stays in `thought` however long the others continue.
Feedbacks: identity uses the state as it is; rescale brings its norm to `target`, the token embeddings' mean norm; a
projection's two products are skinny_linear calls, and its LayerNorm is this launch's `norm`. With the embedding table
as source and token ids as `last`, the launch makes a decode step's input.

Shapes: source (T, D), last int (B,), next_input and thought (B, D), position_embedding (P, D), positions int64 (B,),
lengths, remaining and attended int32 (B,).
Bytes: about 4 B D elements in 128-bit accesses. Bound: launch latency. One program per row. Registers at most 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import check_dtypes, check_shape, on_device, overlaps, pdl_release, pdl_wait, register


@triton.jit
def _feed(
    source, last, next_input, thought, weight, bias, position_embedding, positions, lengths, remaining, attended,
    source_row, eps, target,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr, RESCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_THOUGHT: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_REMAINING: tl.constexpr, HAS_ATTENDED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    pdl_wait(OVERLAP)
    pdl_release(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    active = b >= 0
    if HAS_REMAINING:
        left = tl.load(remaining + b)
        active = left > 0
    ended = active
    if HAS_ATTENDED:
        ended = tl.load(attended + b) > 0
    place = tl.load(lengths + b)
    position = tl.load(positions + b) + 1
    row = tl.load(last + b).to(tl.int64)
    tl.debug_barrier()  # every thread has read the row's position before it is advanced
    if active | (ended & HAS_THOUGHT):
        d = tl.arange(0, BLOCK_D)
        mask = d < D
        h = tl.load(source + row * source_row + d, mask=mask, other=0.0).to(tl.float32)
        if NORM != "none":  # all loads before the sums
            gain = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            shift = tl.load(bias + d, mask=mask, other=0.0).to(tl.float32)
        if HAS_POSITION:
            at = position.to(tl.int64) * D
            place_embedding = tl.load(position_embedding + at + d, mask=mask & active, other=0.0).to(tl.float32)
        if NORM != "none":
            if NORM == "layer":
                h = tl.where(mask, h - tl.sum(h, axis=0) / D, 0.0)
            h = h * tl.rsqrt(tl.sum(h * h, axis=0) / D + eps)
            h = h * gain
            if HAS_BIAS:
                h += shift
        if HAS_THOUGHT:
            tl.store(thought + b * D + d, h.to(thought.dtype.element_ty), mask=mask & ended)
        if RESCALE:
            h = h * (target / tl.maximum(tl.sqrt(tl.sum(h * h, axis=0)), 1.1754943508222875e-38))
        if HAS_POSITION:
            h += place_embedding
        tl.store(next_input + b * D + d, h.to(next_input.dtype.element_ty), mask=mask & active)
    if active:
        tl.store(positions + b, position)
        tl.store(lengths + b, place + 1)
        if HAS_REMAINING:
            tl.store(remaining + b, left - 1)
    if HAS_ATTENDED:
        tl.store(attended + b, tl.where(active, place + 1, 0))


def _launch(
    source: torch.Tensor, last: torch.Tensor, next_input: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor,
    *, norm: str = "none", weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5,
    target: float = 0.0, position_embedding: torch.Tensor | None = None, remaining: torch.Tensor | None = None,
    thought: torch.Tensor | None = None, attended: torch.Tensor | None = None,
) -> None:  # fmt: skip
    op, (batch, dim) = "latent_feedback", next_input.shape
    check_dtypes(
        op, source=source, next_input=next_input, weight=weight, bias=bias, position_embedding=position_embedding
    )
    if norm not in ("none", "layer", "rms"):
        raise ValueError(f"{op}: norm is {norm!r}, expected 'none', 'layer' or 'rms'")
    if (weight is None) != (norm == "none"):
        raise ValueError(f"{op}: weight is {'absent' if weight is None else 'given'} with norm {norm!r}")
    if bias is not None and norm == "none":
        raise ValueError(f"{op}: bias is given with norm 'none'")
    if not target >= 0:
        raise ValueError(f"{op}: target is {target}, expected 0 (no rescaling) or more")
    check_shape(op, "source", source, (source.shape[0], dim))
    vectors = {"last": last, "positions": positions, "lengths": lengths}
    for name, vector in {**vectors, "remaining": remaining, "attended": attended}.items():
        if vector is not None:
            check_shape(op, name, vector, (batch,))
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_shape(op, name, vector, (dim,))
    check_shape(op, "next_input", next_input, (batch, dim), contiguous=True)
    if thought is not None:
        check_shape(op, "thought", thought, (batch, dim), contiguous=True)
    if position_embedding is not None:
        shape = (position_embedding.shape[0], dim)
        check_shape(op, "position_embedding", position_embedding, shape, contiguous=True)
    if batch == 0:
        return
    block_d = triton.next_power_of_2(dim)
    with on_device(source):
        _feed[(batch,)](
            source=source,
            last=last,
            next_input=next_input,
            thought=thought,
            weight=weight,
            bias=bias,
            position_embedding=position_embedding,
            positions=positions,
            lengths=lengths,
            remaining=remaining,
            attended=attended,
            source_row=source.stride(0),
            eps=eps,
            target=target,
            D=dim,
            BLOCK_D=block_d,
            NORM=norm,
            RESCALE=target > 0,
            HAS_BIAS=bias is not None,
            HAS_THOUGHT=thought is not None,
            HAS_POSITION=position_embedding is not None,
            HAS_REMAINING=remaining is not None,
            HAS_ATTENDED=attended is not None,
            OVERLAP=overlaps(source),
            num_warps=max(1, min(16, block_d // 256)),
            launch_pdl=overlaps(source),
        )


_OP = register(
    "latent_feedback(Tensor source, Tensor last, Tensor(a!) next_input, Tensor(b!) positions, Tensor(c!) lengths, "
    "*, str norm='none', Tensor? weight=None, Tensor? bias=None, float eps=1e-5, float target=0.0, "
    "Tensor? position_embedding=None, Tensor(d!)? remaining=None, Tensor(e!)? thought=None, "
    "Tensor(f!)? attended=None) -> ()",
    _launch,
    lambda *args, **kwargs: None,
)


def latent_feedback(
    source: torch.Tensor, last: torch.Tensor, next_input: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor,
    *, norm: str = "none", weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5,
    target: float = 0.0, position_embedding: torch.Tensor | None = None, remaining: torch.Tensor | None = None,
    thought: torch.Tensor | None = None, attended: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Write next_input (and thought), update positions, lengths, remaining and attended, as in the module's docstring.

    positions are those of the last tokens in the cache on entry. target 0 means no rescaling. ValueError for shapes or
    dtypes that do not fit.
    """
    _OP(
        source, last, next_input, positions, lengths, norm=norm, weight=weight, bias=bias, eps=eps, target=target,
        position_embedding=position_embedding, remaining=remaining, thought=thought, attended=attended,
    )  # fmt: skip
