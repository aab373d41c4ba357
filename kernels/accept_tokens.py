"""The end of a token pass on the device, in one launch: store each row's new token and stop rows at end-of-text.

    written[b, step] = tokens[b] = ids[b],  remaining[b] = 0 if ids[b] == eos      where attended[b] > 0
    written[b, step] = -1                                                          elsewhere
    step += 1

No host synchronisation: a row that has ended is inactive in the passes that follow, until the host checks.

Shapes: ids, tokens int64 (B,); written int64 (B, N); remaining, attended int32 (B,); step int64 (1,), below N.
Bytes: 40 B. Bound: launch latency (PyTorch needs a dozen launches for it). One program. Registers at most 64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import check_shape, on_device, overlaps, pdl_release, pdl_wait, register


@triton.jit
def _accept(ids, tokens, written, remaining, attended, step, eos, batch, written_row, BLOCK_B: tl.constexpr,
            OVERLAP: tl.constexpr):  # fmt: skip
    pdl_wait(OVERLAP)
    pdl_release(OVERLAP)
    b = tl.arange(0, BLOCK_B)
    mask = b < batch
    now = tl.load(step)
    active = tl.load(attended + b, mask=mask, other=0) > 0
    chosen = tl.load(ids + b, mask=mask, other=-1)
    tl.debug_barrier()  # every thread has read the step before it is advanced
    tl.store(tokens + b, chosen, mask=active)
    tl.store(written + b.to(tl.int64) * written_row + now, tl.where(active, chosen, -1), mask=mask)
    tl.store(remaining + b, tl.zeros([BLOCK_B], tl.int32), mask=active & (chosen == eos))
    tl.store(step, now + 1)


def _launch(
    ids: torch.Tensor, tokens: torch.Tensor, written: torch.Tensor, remaining: torch.Tensor, attended: torch.Tensor,
    step: torch.Tensor, *, eos: int,
) -> None:  # fmt: skip
    op, batch = "accept_tokens", ids.shape[0]
    for name, vector in (("ids", ids), ("tokens", tokens), ("remaining", remaining), ("attended", attended)):
        check_shape(op, name, vector, (batch,))
    check_shape(op, "written", written, (batch, written.shape[1]))
    check_shape(op, "step", step, (1,))
    if batch == 0:
        return
    with on_device(ids):
        _accept[(1,)](
            ids=ids,
            tokens=tokens,
            written=written,
            remaining=remaining,
            attended=attended,
            step=step,
            eos=eos,
            batch=batch,
            written_row=written.stride(0),
            BLOCK_B=triton.next_power_of_2(batch),
            OVERLAP=overlaps(ids),
            num_warps=1 if batch <= 64 else 4,
            launch_pdl=overlaps(ids),
        )


_OP = register(
    "accept_tokens(Tensor ids, Tensor(a!) tokens, Tensor(b!) written, Tensor(c!) remaining, Tensor attended, "
    "Tensor(d!) step, *, int eos) -> ()",
    _launch,
    lambda *args, **kwargs: None,
)


def accept_tokens(
    ids: torch.Tensor, tokens: torch.Tensor, written: torch.Tensor, remaining: torch.Tensor, attended: torch.Tensor,
    step: torch.Tensor, *, eos: int,
) -> None:  # fmt: skip
    """Change tokens, written, remaining and step in place, as in the module's docstring. eos -1: no token ends a row.

    ValueError for shapes that do not fit.
    """
    _OP(ids, tokens, written, remaining, attended, step, eos=eos)
