"""The mathematics of the ops on dense rows: norms, feedback, products, the head. reference.py exports them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# ---- residual_norm ---------------------------------------------------------------------------------------------------


def _normed(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm ("layer"), RMSNorm ("rms") or nothing ("none") over the last dimension, in x's dtype."""
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    if kind != "none" and weight is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def _work(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def residual_norm_ref(
    x: Tensor,
    weight: Tensor,
    *,
    kind: str = "layer",
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """total = x (+ bias) (+ residual), in the residual's dtype (x's without one), and normed = norm(total), in x's.

    Returns (normed, total).

    x, residual (N, D); weight, bias, norm_bias (D,); kind "layer" or "rms".
    """
    total = _work(x)
    for term in (bias, residual):
        total = total if term is None else total + term.to(total.dtype)
    normed = _normed(total, kind, weight, norm_bias, eps).to(x.dtype)
    return normed, total.to(x.dtype if residual is None else residual.dtype)


# ---- layer_norm ------------------------------------------------------------------------------------------------------


def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of x (N, D) in x's dtype, the same in `dtype`, and (mean, 1 / deviation) of each row (N, 2)."""
    work = _work(x)
    mean = work.mean(-1, keepdim=True)
    scale = torch.rsqrt((work - mean).square().mean(-1, keepdim=True) + eps)
    y = (work - mean) * scale * weight.to(work.dtype)
    y = y if bias is None else y + bias.to(work.dtype)
    return y.to(x.dtype), y.to(dtype), torch.cat([mean, scale], -1)


def layer_norm_backward_ref(
    grad_normed: Tensor | None,
    grad_rounded: Tensor | None,
    other: Tensor | None,
    x: Tensor,
    weight: Tensor,
    statistics: Tensor,
    sums: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x's gradient from those of layer_norm's two results (None: zero), plus `other`: in x's dtype and in `dtype`.

    dtype None: an empty tensor instead of the second.

    sums (P, 2, D): the gradients of weight and bias are added to sums[:, 0] and sums[:, 1], one entry for each
    consecutive ceil(N / P) rows.
    """
    g = sum(_work(grad) for grad in (grad_normed, grad_rounded) if grad is not None)
    assert isinstance(g, Tensor), "a gradient of at least one result"
    mean, scale = statistics.to(g.dtype).unsqueeze(-1).unbind(1)
    xhat, dy = (_work(x) - mean) * scale, g * weight.to(g.dtype)
    parts = [part.split(max(1, -(-len(x) // len(sums)))) for part in (g * xhat, g)]
    for i, (of_weight, of_bias) in enumerate(zip(*parts, strict=True)):
        sums[i] += torch.stack([of_weight.sum(0), of_bias.sum(0)])
    dx = scale * (dy - dy.mean(-1, keepdim=True) - xhat * (dy * xhat).mean(-1, keepdim=True))
    dx = dx if other is None else dx + other.to(dx.dtype)
    return dx.to(x.dtype), x.new_empty(0) if dtype is None else dx.to(dtype)


# ---- column_sums -----------------------------------------------------------------------------------------------------


def column_sums_ref(x: Tensor, sums: Tensor) -> None:
    """Adds column sums of x (N, F) to sums (P, F), one entry for each consecutive ceil(N / P) rows."""
    for i, part in enumerate(x.split(max(1, -(-len(x) // len(sums))))):
        sums[i] += part.to(sums.dtype).sum(0)


# ---- transpose -------------------------------------------------------------------------------------------------------


def transpose_ref(x: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Writes x[i] (R, C), transposed, to out[i] (C, R)."""
    for source, target in zip(x, out, strict=True):
        target.copy_(source.t())


# ---- gated_mlp -------------------------------------------------------------------------------------------------------


def gated_mlp_ref(x: Tensor, *, activation: str, bias: Tensor | None = None) -> Tensor:
    """gelu(x + bias) (N, F), by tanh or ("gelu") by erf; "swiglu": silu(gate) * up, x + bias = (gate, up) (N, 2 F)."""
    wide = _work(x) if bias is None else _work(x) + bias.to(_work(x).dtype)
    if activation == "swiglu":
        gate, up = wide.chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up).to(x.dtype)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(wide, approximate=approximate).to(x.dtype)


# ---- latent_feedback -------------------------------------------------------------------------------------------------


def latent_feedback_ref(
    source: Tensor,
    last: Tensor,
    next_input: Tensor,
    positions: Tensor,
    lengths: Tensor,
    *,
    norm: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    target: float = 0.0,
    position_embedding: Tensor | None = None,
    remaining: Tensor | None = None,
    thought: Tensor | None = None,
    attended: Tensor | None = None,
) -> None:
    """Each active row's hidden state source[last[b]], normed and rescaled to norm `target`, becomes its next input.

    source (T, D), last (B,), next_input and thought (B, D), positions int64 (B,), lengths, remaining and attended
    int32 (B,). In place: next_input (with position_embedding[positions + 1] added), thought (the normed state
    itself), positions + 1, lengths + 1, remaining - 1, attended = lengths. Rows with remaining 0 keep all that and get
    attended 0. If attended is given, thought is written for the rows where it was above 0 on entry (those in the pass
    that made source) instead of the active ones.
    """
    active = torch.ones_like(lengths, dtype=torch.bool) if remaining is None else remaining > 0
    h = _normed(_work(source[last.long()]), norm, weight, bias, eps)
    if thought is not None:
        ended = active if attended is None else attended > 0
        thought.copy_(torch.where(ended[:, None], h.to(thought.dtype), thought))
    if target:
        h = h * (target / torch.linalg.vector_norm(h, dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny))
    if position_embedding is not None:
        h = h + position_embedding[torch.where(active, positions + 1, 0)].to(h.dtype)
    next_input.copy_(torch.where(active[:, None], h.to(next_input.dtype), next_input))
    for counter, step in ((positions, 1), (lengths, 1), (remaining, -1)):
        if counter is not None:
            counter += step * active.to(counter.dtype)
    if attended is not None:
        attended.copy_(torch.where(active, lengths, 0))


# ---- matmul ----------------------------------------------------------------------------------------------------------


def matmul_ref(a: Tensor, b: Tensor, bias: Tensor | None = None, *, into: Tensor | None = None) -> Tensor:
    """a (M, K) @ b (K, N) + bias (N,), or added to `into` (M, N), in place."""
    if into is not None:
        return into.addmm_(a, b)
    return a @ b if bias is None else torch.addmm(bias, a, b)


# ---- few_rows_linear -------------------------------------------------------------------------------------------------


def few_rows_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (N, K) transposed plus bias (N,), in x's dtype; sums in fp32."""
    y = _work(x) @ _work(weight).t()
    return (y if bias is None else y + _work(bias)).to(x.dtype)


# ---- products of the training step on CPU ----------------------------------------------------------------------------


def pack_matrix_ref(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix (K, N) as `packed_matmul_ref` takes it: cast to `dtype`, not packed."""
    return matrix.to(dtype)


def packed_matmul_ref(x: Tensor, packed: Tensor, n: int, bias: Tensor | None = None) -> Tensor:
    """x (M, K) times the packed matrix (K, n) plus bias (n,), in x's dtype; sums in fp32."""
    y = _work(x) @ _work(packed)
    return (y if bias is None else y + bias).to(x.dtype)


def few_rows_matmul_ref(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K) times a matrix (K, N) in any layout plus bias (N,)."""
    return matmul_ref(x, matrix, bias)


def weight_gradient_ref(
    left: Tensor, right: Tensor, into: Tensor | None = None, column_sums: Tensor | None = None
) -> Tensor:
    """left (M, K) transposed times right (M, N) -> fp32 (K, N), or added to `into` in place.

    The sums of right's columns go to column_sums (N,), fp32: added if `into` is given, else overwritten.
    """
    if column_sums is not None:
        sums = _work(right).sum(0)
        column_sums.copy_(sums if into is None else column_sums + sums)
    product = _work(left).t() @ _work(right)
    return product if into is None else into.add_(product)


# ---- cross_entropy ---------------------------------------------------------------------------------------------------


def _scores(logits: Tensor, vocabulary: int, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    scores = _work(logits[:, :vocabulary])
    scores = scale * (scores if bias is None else scores + bias.to(scores.dtype))
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def cross_entropy_ref(
    logits: Tensor,
    targets: Tensor,
    *,
    vocabulary: int,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """losses (N,) and statistics (N, 2) of logits (N, W), of which columns from `vocabulary` on are not read.

    With l = scale (logits + bias), softcap tanh(l / softcap) where set: statistics are top = max l and
    log = ln sum exp(l - top), a loss is log - (l[target] - top), and 0 where the target, int64 (N,), is -100.
    """
    scores = _scores(logits, vocabulary, bias, scale, softcap)
    top = scores.amax(-1, keepdim=True)
    log = torch.logsumexp(scores - top, -1, keepdim=True)
    losses = log - (scores - top).gather(1, targets.clamp_min(0)[:, None])
    return torch.where(targets >= 0, losses[:, 0], 0.0), torch.cat([top, log], -1)


def cross_entropy_backward_ref(
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    grad: Tensor,
    *,
    vocabulary: int,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> None:
    """Overwrites the logits with the derivative of grad () times the losses' sum; 0 in columns from `vocabulary` on.

    scale slope (exp(l - top - log) - onehot(target)) grad, slope = 1 - (l / softcap)^2 with a softcap, else 1.
    """
    scores = _scores(logits, vocabulary, bias, scale, softcap)
    slope = 1 - (scores / softcap).square() if softcap else 1.0
    shares = torch.exp(scores - statistics[:, :1] - statistics[:, 1:])
    shares[torch.arange(len(targets), device=targets.device), targets.clamp_min(0)] -= 1.0
    shares = torch.where(targets[:, None] >= 0, shares * slope * (grad * scale), 0.0)
    logits[:, :vocabulary] = shares.to(logits.dtype)
    logits[:, vocabulary:] = 0.0


# ---- skinny_linear ---------------------------------------------------------------------------------------------------


def skinny_linear_ref(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    overlap: bool = False,
    early: bool = False,
) -> Tensor:
    """residual + act(norm(x) W^T + bias): x (M, IN), weight (OUT, IN); in the residual's dtype, else the weight's.

    activation "none", "gelu_tanh", "gelu", or "swiglu": then weight is (2 OUT, IN), gate rows before up rows.
    """
    x = _normed(_work(x), norm, norm_weight, norm_bias, eps)
    y = x @ weight.to(x.dtype).t()
    y = y if bias is None else y + bias.to(x.dtype)
    y = y if activation == "none" else gated_mlp_ref(y, activation=activation)
    return y.to(weight.dtype) if residual is None else (y + residual.to(y.dtype)).to(residual.dtype)


# ---- lm_head_sample --------------------------------------------------------------------------------------------------


def lm_head_sample_ref(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    numbers: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Token ids int64 (B,) from hidden (B, D) and the head's weight (V, D): the likeliest, ties to the lowest id.

    At a temperature above 0, with numbers (B,) fp64 in [0, 1): softmax(logits / temperature) is restricted to the top_k
    likeliest (0: all), renormalised, and of these to the fewest that together reach top_p, ties to lower ids; the id is
    the first, in order of ids, at which the kept probabilities add up to more than numbers[b] of their sum. The same as
    infer/sampling.py.
    """
    logits = _work(hidden) @ weight.to(_work(hidden).dtype).t()
    logits = logits if bias is None else logits + bias.to(logits.dtype)
    if not temperature or numbers is None:
        return logits.argmax(-1)
    scaled = logits.double() / temperature
    ranked, ids = torch.sort(scaled, dim=-1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = float("-inf")
    shares = ranked.softmax(-1)
    ranked = ranked.masked_fill(shares.cumsum(-1) - shares >= top_p, float("-inf"))
    sums = torch.empty_like(scaled).scatter_(-1, ids, ranked).softmax(-1).cumsum(-1)
    return (sums <= numbers[:, None] * sums[:, -1:]).sum(-1).clamp_max(logits.shape[-1] - 1)


# ---- accept_tokens ---------------------------------------------------------------------------------------------------


def accept_tokens_ref(
    ids: Tensor, tokens: Tensor, written: Tensor, remaining: Tensor, attended: Tensor, step: Tensor, *, eos: int
) -> None:
    """The end of a token pass: in rows with attended > 0, tokens and written[:, step] become ids, remaining 0 at eos.

    ids, tokens int64 (B,), written int64 (B, N), remaining, attended int32 (B,), step int64 (1,), all in place. The
    other rows get -1 in written[:, step]; step grows by one. eos -1: no token ends a row.
    """
    active = attended > 0
    tokens.copy_(torch.where(active, ids, tokens))
    written.index_copy_(1, step, torch.where(active, ids, -1)[:, None])
    remaining.copy_(torch.where(active & (ids == eos), 0, remaining))
    step += 1


# ---- gelu ------------------------------------------------------------------------------------------------------------


def gelu_ref(x: Tensor) -> Tensor:
    """x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3): GELU by tanh, in x's dtype."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def gelu_backward_ref(grad: Tensor, x: Tensor) -> Tensor:
    """grad times the derivative of gelu at x, all of one shape and dtype."""
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
