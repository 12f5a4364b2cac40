"""The other side of `scripts.benchmark --only peer`: transformers' training step, on request.

Reads a line, runs one step (forward, backward, AdamW; sdpa attention), answers with
`[wall seconds, CPU seconds]`, until its input ends.
"""

import json
import sys
import time

import torch
from transformers import DecoderConfig, LlamaForCausalLM


def main() -> None:
    """Arguments: the model's config as JSON, rows, row length, dtype, and what is recomputed."""
    shape, rows, length, dtype, remat = sys.argv[1:6]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = DecoderConfig(**json.loads(shape), attn_implementation="sdpa", use_cache=False)
    model = LlamaForCausalLM(config).to(device)
    if remat == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    step = torch.compile(model) if device == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    tokens = torch.randint(0, config.vocab_size, (int(rows), int(length)), device=device)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = step(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)


if __name__ == "__main__":
    main()
