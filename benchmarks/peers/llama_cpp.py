"""llama.cpp, measured in its own environment: reads a job as JSON, prints seconds of a pass as JSON.

    COCONUT_LLAMA_PYTHON=python-with-llama_cpp-gguf-and-safetensors pytest benchmarks/bench_latent_pass.py

Run by benchmarks/peers/__init__.py as a separate program; imports nothing of ours. Hidden states enter through
`llama_batch.embd` and come back as embeddings (after the final norm: Coconut's feedback). llama.cpp computes the LM
head wherever an embedding is asked for, so a latent pass is timed twice: as it is, and in a model whose vocabulary is
cut to the prompt's few ids, where the head costs next to nothing.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path

# A program's folder is on the path: this file would be imported instead of the package.
sys.path.remove(str(Path(__file__).resolve().parent))

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file

FORMATS = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}
NAMES = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def main() -> None:
    job = json.load(sys.stdin)
    folder = Path(job["model"])
    whole, headless = folder / f"{job['format']}.gguf", folder / f"{job['format']}-headless.gguf"
    write_gguf(folder, whole, job["format"], None)
    write_gguf(folder, headless, job["format"], max(map(max, job["prompts"])) + 1)
    result = {"latent_headless": Context(headless, job).think()[0]}
    context = Context(whole, job)
    result["latent"], states = context.think()
    result |= {"token": context.write(), "state": states[0].tolist()}
    print(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # its static destructors may print after us


def write_gguf(folder: Path, path: Path, format: str, vocab: int | None) -> None:
    """A Hugging Face GPT-2 directory as a GGUF file without a tokenizer; `vocab` cuts the vocabulary."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(vocab or config["vocab_size"])
    for name, values in load_file(folder / "model.safetensors").items():
        part, _, kind = name.removeprefix("transformer.").rpartition(".")
        if part.startswith("h."):
            _, layer, part = part.split(".", 2)
            if part not in NAMES:
                continue
            if kind == "weight" and values.ndim == 2:
                values = values.T  # Conv1D stores (inputs, outputs)
            add(writer, f"blk.{layer}.{NAMES[part]}.{kind}", values, format)
        elif part in ("wte", "wpe", "ln_f"):
            if part == "wte":
                values = values[:vocab]
            target = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}[part]
            add(writer, f"{target}.{kind}", values, "fp32" if part == "wpe" else format)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, format: str) -> None:
    """Matrices in the format, vectors in fp32."""
    kind = gguf.GGMLQuantizationType[FORMATS[format] if values.ndim == 2 else "F32"]
    packed = gguf.quants.quantize(np.ascontiguousarray(values, dtype=np.float32), kind)
    writer.add_tensor(name, packed, raw_dtype=kind)


class Context:
    """A loaded model and the prompts of a job, one sequence per prompt."""

    def __init__(self, path: Path, job: dict) -> None:
        self.prompts, self.thoughts, self.rounds = job["prompts"], job["thoughts"], job["rounds"]
        self.rows, self.length = len(self.prompts), len(self.prompts[0])
        loading = llama_cpp.llama_model_default_params()
        # The AMX path of quantised formats crashes (llama-cpp-python 0.3.36); the others profit from it.
        loading.use_extra_bufts = job["format"] != "int8" or b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.rows * max(128, 2 * (self.length + self.thoughts))
        params.n_batch = params.n_ubatch = max(512, self.rows)
        params.n_seq_max = self.rows
        params.n_threads = params.n_threads_batch = job["threads"]
        params.embeddings = True
        params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self.dim = llama_cpp.llama_model_n_embd(self.model)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.tokens = llama_cpp.llama_batch_init(max(self.rows, self.length), 0, 1)
        self.states = llama_cpp.llama_batch_init(self.rows, self.dim, 1)

    def think(self) -> tuple[float, np.ndarray]:
        """Seconds of a latent pass (of the fastest round) and the states after the last one, (rows, D)."""
        prompt_states = self.read()
        best = float("inf")
        for _ in range(self.rounds + 1):  # the first one warms up
            self.rewind()
            states = prompt_states
            start = time.perf_counter()
            for step in range(self.thoughts):
                ctypes.memmove(self.states.embd, states.ctypes.data, states.nbytes)
                self.run(self.states, range(self.rows), self.length + step)
                states = self.outputs(llama_cpp.llama_get_embeddings_ith, self.dim)
            best = min(best, (time.perf_counter() - start) / self.thoughts)
        return best, states

    def write(self) -> float:
        """Seconds of a token pass: embedding, LM head and argmax included."""
        best = float("inf")
        for _ in range(self.rounds + 1):
            self.rewind()
            ids = np.ones(self.rows, dtype=np.int64)
            start = time.perf_counter()
            for step in range(self.thoughts):
                for i in range(self.rows):
                    self.tokens.token[i] = int(ids[i])
                self.run(self.tokens, range(self.rows), self.length + step)
                ids = self.outputs(llama_cpp.llama_get_logits_ith, self.vocab).argmax(1)
            best = min(best, (time.perf_counter() - start) / self.thoughts)
        return best

    def read(self) -> np.ndarray:
        """Prefills every prompt -> the state of its last position, (rows, D)."""
        states = np.empty((self.rows, self.dim), dtype=np.float32)
        for row, prompt in enumerate(self.prompts):
            for i, token in enumerate(prompt):
                self.tokens.token[i] = token
            self.run(self.tokens, [row] * self.length, 0)
            last = llama_cpp.llama_get_embeddings_ith(self.context, self.length - 1)
            states[row] = np.ctypeslib.as_array(last, (self.dim,))
        return states

    def run(self, batch: "llama_cpp.llama_batch", rows: "range | list[int]", position: int) -> None:
        """One forward: the i-th token of the batch belongs to rows[i]; tokens of one row have consecutive positions."""
        batch.n_tokens = len(rows)
        for i, row in enumerate(rows):
            batch.pos[i] = position + (i if rows[0] == rows[-1] else 0)
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, row, True
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")

    def outputs(self, get: object, width: int) -> np.ndarray:
        return np.stack([np.ctypeslib.as_array(get(self.context, i), (width,)) for i in range(self.rows)])

    def rewind(self) -> None:
        """Removes everything after the prompts from the cache."""
        memory = llama_cpp.llama_get_memory(self.context)
        for row in range(self.rows):
            llama_cpp.llama_memory_seq_rm(memory, row, self.length, -1)


if __name__ == "__main__":
    main()
