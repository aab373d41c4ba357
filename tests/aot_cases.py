"""The launches that aot.py compiles: every op on meta tensors, at the shapes of real models, and whole fused passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def indices(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# name -> (H, Hkv, K, model dim, inner dim, vocabulary)
SHAPES = {
    "gpt2": (12, 12, 64, 768, 3072, 50257),
    "llama1b": (32, 8, 64, 2048, 8192, 128256),
    "qwen3": (16, 8, 128, 1024, 3072, 151936),
}
# For attention only: phi-2's heads, whose width is not a power of two.
ATTENTION_SHAPES = SHAPES | {"phi2": (32, 32, 80, 2560, 10240, 51200)}
PASS_SHAPES = {
    "gpt2": ("gpt2", {"vocab_size": 50260, "n_layer": 2}),
    "llama1b": (
        "llama",
        {
            "vocab_size": 128259, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
DTYPES = {
    "gpt2": (torch.bfloat16, torch.float32),
    "llama1b": (torch.bfloat16,),
    "qwen3": (torch.bfloat16,),
    "phi2": (torch.bfloat16,),
}  # fmt: skip


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, call) of every op at the shapes of real models; the label starts with the name of its kernels' file."""
    yield from attention_cases()
    yield from dense_cases()
    yield from pass_cases()


def attention_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from coconut_fast.kernels import (
        decode_attention,
        kv_append,
        kv_gather,
        ragged_attention,
        ragged_attention_backward,
    )

    for name, (heads, kv_heads, head_dim, *_) in ATTENTION_SHAPES.items():
        for dtype in DTYPES[name]:
            label = f"{name}/{str(dtype).removeprefix('torch.')}"
            store = [empty(4096, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
            fused = empty(8, heads + 2 * kv_heads, head_dim, dtype=dtype)
            query, key, value = fused.split([heads, kv_heads, kv_heads], dim=1)
            table = [empty(2048, head_dim // 2, dtype=torch.float32) for _ in range(2)]
            places = indices(8, dtype=torch.int64)
            rotary = {} if name == "gpt2" else {"cos": table[0], "sin": table[1], "positions": places}
            norms = {"query_norm": empty(head_dim), "key_norm": empty(head_dim)} if name == "qwen3" else {}
            turned = {"query": query, **rotary, **norms} if rotary else {}
            yield (
                f"kv_append/{label}",
                lambda k=key, v=value, s=store, t=turned, p=places: kv_append._launch(k, v, p, *s, **t),
            )
            for length in (512, 8192) if name == "gpt2" else (512,):
                layout = (indices(64, length // 16), indices(8), indices(8))
                options = {"page_size": 16, "scaling": 0.125, "max_length": length}
                fresh = {**options, **rotary, **norms, "key": key, "value": value}
                for kind, given in (("stored", options), ("append", fresh)):
                    yield (
                        f"decode_attention/{label}/{length}/{kind}",
                        lambda q=query, s=store, t=layout, o=given: decode_attention._launch(q, *s, *t, **o),
                    )
            if heads > kv_heads:  # for many rows, one program handles all heads that share keys
                fused = empty(64, heads + 2 * kv_heads, head_dim, dtype=dtype)
                query, key, value = fused.split([heads, kv_heads, kv_heads], dim=1)
                layout = (indices(64, 32), indices(64), indices(64))
                options = {"page_size": 16, "scaling": 0.125, "max_length": 512}
                turn = rotary | {"positions": indices(64, dtype=torch.int64)}
                fresh = {**options, **turn, **norms, "key": key, "value": value}
                for kind, given in (("stored", options), ("append", fresh)):
                    yield (
                        f"decode_attention_group/{label}/{kind}",
                        lambda q=query, s=store, t=layout, o=given: decode_attention._launch(q, *s, *t, **o),
                    )
            for dropout, queries in ((0.1, 1024), (0.1, 330), (0.1, 1)) if name == "gpt2" else ((0.0, 1024),):
                out, lse = empty(64, heads, head_dim, dtype=dtype), empty(64, heads, dtype=torch.float32)
                layout = (indices(64, 64), indices(8), indices(9), indices(8))
                options = {"page_size": 16, "scaling": 0.125, "max_query": queries, "max_length": 1024}
                options |= {"dropout": dropout, "seed": indices(dtype=torch.int64)}
                yield (
                    f"ragged_attention/{label}/{queries}/{dropout}",
                    lambda q=out, s=store, t=layout, o=options: ragged_attention._launch(q, *s, *t, **o),
                )
                grads = [empty(*t.shape, dtype=torch.float32) for t in store]
                yield (
                    f"ragged_attention_backward/{label}/{queries}/{dropout}",
                    lambda q=out, n=lse, s=store, t=layout, o=options, g=grads: ragged_attention_backward._launch(
                        q, q, *s, q, n, *t, *g, **o
                    ),
                )
            for pairs in (64, 16) if head_dim <= 64 and dtype != torch.float32 else ():  # few queries, many rows
                queries = pairs * kv_heads // heads
                out, lse = empty(64, heads, head_dim, dtype=dtype), empty(64, heads, dtype=torch.float32)
                layout = (indices(64, 64), indices(64), indices(65), indices(64))
                options = {"page_size": 16, "scaling": 0.125, "max_query": queries, "max_length": 1024}
                options |= {"dropout": 0.1, "seed": indices(dtype=torch.int64), "grads_from": layout[3]}
                yield (
                    f"ragged_attention_few/{label}/{pairs}",
                    lambda q=out, n=lse, s=store, t=layout, o=options, g=grads: ragged_attention_backward._launch(
                        q, q, *s, q, n, *t, *g, **o
                    ),
                )
            for batch in (8, 64) if heads == kv_heads else ():
                one, lse = empty(batch, heads, head_dim, dtype=dtype), empty(batch, heads, dtype=torch.float32)
                layout = (indices(64, 64), indices(batch), indices(batch + 1), indices(batch))
                options = {"page_size": 16, "scaling": 0.125, "max_query": 1, "max_length": 1024}
                options |= {"grads_from": layout[3]}
                yield (
                    f"ragged_attention_few/{label}/one/{batch}",
                    lambda q=one, n=lse, s=store, t=layout, o=options, g=grads: ragged_attention_backward._launch(
                        q, q, *s, q, n, *t, *g, **o
                    ),
                )
            yield (
                f"kv_gather/{label}",
                lambda p=places, g=grads, t=dtype: kv_gather._launch(*g, p, t),
            )


def dense_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from coconut_fast.kernels import (
        accept_tokens,
        column_sums,
        cross_entropy,
        cross_entropy_backward,
        gated_mlp,
        latent_feedback,
        layer_norm,
        layer_norm_backward,
        lm_head_sample,
        residual_norm,
        skinny_linear,
        transpose,
    )

    tokens = [indices(8, dtype=torch.int64), indices(8, dtype=torch.int64), indices(8, 8, dtype=torch.int64)]
    tokens += [indices(8), indices(8), indices(1, dtype=torch.int64)]
    yield "accept_tokens/bfloat16", lambda: accept_tokens._launch(*tokens, eos=50256)
    for name, (_, _, _, dim, inner, vocabulary) in SHAPES.items():
        gpt2 = name == "gpt2"
        kind, activation = ("layer", "gelu_tanh") if gpt2 else ("rms", "swiglu")
        wide = inner if gpt2 else 2 * inner
        for dtype in DTYPES[name]:
            label = f"{name}/{str(dtype).removeprefix('torch.')}"
            weight, bias = empty(dim, dtype=dtype), empty(dim, dtype=dtype) if gpt2 else None
            one, many = empty(1, dim, dtype=torch.float32), empty(8, dim, dtype=dtype)
            norm = {"weight": weight, "bias": bias, "norm": kind}
            numbers = empty(8, dtype=torch.float64)
            logits, targets = empty(8, -(-vocabulary // 64) * 64, dtype=dtype), indices(8, dtype=torch.int64)
            for softcap in (0.0, 30.0) if gpt2 else (0.0,):
                options = {"vocabulary": vocabulary, "softcap": softcap}
                yield (
                    f"cross_entropy/{label}/{softcap}",
                    lambda x=logits, t=targets, o=options: cross_entropy._launch(x, t, **o),
                )
                kept = empty(8, 2, dtype=torch.float32)
                yield (
                    f"cross_entropy_backward/{label}/{softcap}",
                    lambda x=logits, t=targets, k=kept, o=options: cross_entropy_backward._launch(
                        x, t, k, k[0, 0], **o
                    ),
                )
            positions, counts = indices(8, dtype=torch.int64), indices(8)
            yield (
                f"latent_feedback/{label}",
                lambda x=many, p=positions, c=counts, n=norm: latent_feedback._launch(
                    x,
                    c,
                    x,
                    p,
                    c,
                    **n,
                    position_embedding=x if n["bias"] is not None else None,
                    remaining=c,
                    attended=c,
                    thought=x,
                ),
            )
            yield (
                f"residual_norm/{label}",
                lambda x=many, w=weight, b=bias, k=kind: residual_norm._launch(
                    x, w, kind=k, residual=empty(*x.shape, dtype=torch.float32), norm_bias=b
                ),
            )
            yield (
                f"gated_mlp/{label}",
                lambda a=activation, w=wide, t=dtype: gated_mlp._launch(empty(8, w, dtype=t), activation=a),
            )
            yield (
                f"skinny_linear_dot/{label}/48/up",
                lambda d=dim, w=wide, t=dtype, a=activation: skinny_linear._launch(
                    empty(48, d, dtype=t), empty(w, d, dtype=t), activation=a
                ),
            )
            if gpt2:
                stream, partial = empty(8, dim, dtype=torch.float32), empty(64, 2, dim, dtype=torch.float32)
                gain = empty(dim, dtype=torch.float32)
                yield (
                    f"layer_norm/{label}",
                    lambda x=stream, g=gain, t=dtype: layer_norm._launch(x, g, g, eps=1e-5, dtype=t),
                )
                for normed in (None, stream):
                    yield (
                        f"layer_norm_backward/{label}/{normed is None}",
                        lambda n=normed, r=many, x=stream, g=gain, s=partial: layer_norm_backward._launch(
                            n, r, n, x, g, s.new_empty(8, 2), s, dtype=None if n is None else r.dtype
                        ),
                    )
                matrices = [[empty(*shape, dtype=dtype) for _ in range(12)] for shape in ((dim, inner), (inner, dim))]
                yield f"transpose/{label}", lambda m=matrices: transpose._launch(*m)
                sums = empty(64, dim, dtype=torch.float32)
                yield f"column_sums/{label}", lambda x=many, s=sums: column_sums._launch(x, s)
                yield (
                    f"gated_mlp/{label}/gelu",
                    lambda w=wide, t=dtype: gated_mlp._launch(empty(8, w, dtype=t), activation="gelu"),
                )
                square = empty(dim, dim, dtype=dtype)
                for op, x in (("skinny_linear", one), ("skinny_linear_dot", many)):
                    yield (
                        f"{op}/{label}/{len(x)}/projection",
                        lambda x=x, w=square: skinny_linear._launch(x, w, bias=w[0], activation="gelu"),
                    )
            up, down = empty(wide, dim, dtype=dtype), empty(dim, inner, dtype=dtype)
            normed = {"norm": kind, "norm_weight": weight, "norm_bias": bias, "activation": activation}
            for op, x in (("skinny_linear", one), ("skinny_linear_dot", many)):
                yield f"{op}/{label}/{len(x)}/up", lambda x=x, w=up, n=normed: skinny_linear._launch(x, w, **n)
                yield (
                    f"{op}/{label}/{len(x)}/down",
                    lambda x=x, w=down, i=inner, t=dtype: skinny_linear._launch(
                        empty(len(x), i, dtype=t), w, residual=x
                    ),
                )
                head = empty(vocabulary, dim, dtype=dtype)
                drawn = {"numbers": numbers[: len(x)], "temperature": 1.0}
                for options in ({}, drawn, drawn | {"top_k": 50, "top_p": 0.9}) if gpt2 else ({},):
                    yield (
                        f"lm_head_sample/{label}/{len(x)}/{len(options)}",
                        lambda x=x, w=head, o=options: lm_head_sample._launch(x, w, **o),
                    )


def pass_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Whole fused passes over two layers, as infer/fused.py launches them: "fused_pass/shape/dtype/rows/kind"; and
    prefills as in infer/fused_prefill.py: "fused_pass/shape/dtype/tokens/prefill"."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from coconut_fast import Coconut, LatentTokens
    from coconut_fast.infer.fused import FusedPasses
    from coconut_fast.infer.passes import StaticBatch, StaticPrompts
    from coconut_fast.infer.sampling import Sampling
    from coconut_fast.model.cache import KVCache

    for name, (family, settings) in PASS_SHAPES.items():
        config = AutoConfig.for_model(family, **settings, bos_token_id=0, eos_token_id=0, pad_token_id=0)
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = Coconut(hf, LatentTokens(start=1, thought=2, end=3, eos=0))
        cache = KVCache(2, num_slots=1024 * 64, max_rows=64, max_length=1024, device="meta")
        passes = FusedPasses(model, cache, Sampling())
        for rows in (1, 8, 64):
            batch = StaticBatch(rows, hf.config.hidden_size, 8, torch.float32, torch.device("meta"))
            label = f"fused_pass/{name}/bfloat16/{rows}"
            yield f"{label}/think", lambda p=passes, b=batch: p.think(b, 2)
            yield f"{label}/decode", lambda p=passes, b=batch: p.decode(b)
        for size in ((64, 1, 64), (16384, 64, 512)):
            prompts = StaticPrompts(size, hf.config.hidden_size, torch.float32, torch.device("meta"))
            yield f"fused_pass/{name}/bfloat16/{size[0]}/prefill", lambda p=passes, s=prompts: p.prefill(s)
