"""The official implementation, measured in its own environment: reads a job as JSON, prints seconds as JSON.

    COCONUT_REFERENCE=checkout COCONUT_REFERENCE_PYTHON=python-with-transformers-4.46.2 pytest benchmarks/

Run by benchmarks/peers/__init__.py as a separate program; imports nothing of ours.
"""

import json
import os
import resource
import sys
import threading
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    job = json.load(sys.stdin)
    sys.path.insert(0, job["checkout"])
    from coconut import Coconut  # the official module

    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    base = AutoModelForCausalLM.from_pretrained(job["model"], torch_dtype=dtype).to(job["device"])
    model = Coconut(base, job["thought"], job["start"], job["end"], -1).to(job["device"])
    result = generate(model, job) if job["work"] == "generate" else train(model, job)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if job["device"] != "cpu":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(result), flush=True)
    os._exit(0)  # a timer may still run


def give_up(seconds: float) -> None:
    """Ends the program in the middle of its first step, which has taken longer than `seconds`."""
    print(json.dumps({"seconds": seconds, "losses": [], "ended": False, "peak_bytes": 0}), flush=True)
    os._exit(0)


def rounds(job: dict) -> range:
    """Negative ones are not timed: on a GPU the first call of a process loads kernels for seconds."""
    return range(0 if job["device"] == "cpu" else -1, job["rounds"])


def finished(job: dict) -> float:
    if job["device"] != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def generate(model: torch.nn.Module, job: dict) -> dict:
    """Seconds for all prompts, one by one as it must; the answers of the last round."""
    model.eval()
    seconds, answers = [], []
    with torch.no_grad():
        for _ in rounds(job):
            start = finished(job)
            answers = []
            for prompt in job["prompts"]:
                ids = torch.tensor([prompt], device=job["device"])
                out = model.generate(ids, torch.ones_like(ids), max_new_tokens=job["max_new_tokens"])
                answers.append(out[0].tolist()[len(prompt) :])
            seconds.append(finished(job) - start)
    return {"seconds": min(seconds[-job["rounds"] :]), "answers": answers}


def train(model: torch.nn.Module, job: dict) -> dict:
    """Seconds of one step: forward, backward, AdamW. All rows have one length, so its collator would add no padding."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    ids = torch.tensor(job["rows"], device=job["device"])
    labels = torch.tensor(job["labels"], device=job["device"])
    positions = torch.arange(ids.shape[1], device=job["device"]).expand_as(ids)
    seconds, losses = [], []
    for _ in rounds(job):
        if job.get("limit") and not seconds:
            threading.Timer(job["limit"], give_up, (job["limit"],)).start()
        start = finished(job)
        loss = model(ids, torch.ones_like(ids), labels, positions).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(finished(job) - start)
        losses.append(loss.item())
    return {"seconds": min(seconds[-job["rounds"] :]), "losses": losses}


if __name__ == "__main__":
    main()
