"""One model, one budget, one process: run it and print what happened as one JSON object.

    python benchmarks/one_run.py MODEL streamed|sequential|resident BUDGET

Encoders make FORWARDS passes over 128 tokens (or one image), decoders go on from 16 tokens with 8 more, greedily.
"""

import hashlib
import json
import statistics
import sys
import time
from pathlib import Path

FORWARDS = 5
ENCODER_TOKENS = 128
PROMPT_TOKENS = 16
NEW_TOKENS = 8


def main() -> None:
    model, mode, budget = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    architecture = json.loads((model / "config.json").read_text())["architectures"][0]
    generates = "CausalLM" in architecture or "LMHead" in architecture
    auto_class = "AutoModelForCausalLM" if generates else "AutoModel" if "Bert" in architecture else None
    print(json.dumps(run(model, mode, budget, auto_class, generates=generates)))


def run(model: Path, mode: str, budget: str, auto_class: str | None, *, generates: bool) -> dict[str, object]:
    if mode != "resident":
        from hermes.memory.allocator import keep_heap_tight

        keep_heap_tight()
    import torch

    torch.set_grad_enabled(False)
    pass_seconds: list[float] = []
    session = None
    if mode == "resident":
        import transformers

        cls = getattr(transformers, auto_class or "AutoModelForImageClassification")
        module = cls.from_pretrained(model, dtype="auto").eval()
        starts: list[float] = []
        module.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
        module.register_forward_hook(lambda *_: pass_seconds.append(time.perf_counter() - starts[-1]))
    else:
        import hermes

        module = hermes.load(
            model,
            budget=budget,
            auto_class=auto_class,
            sequence_length=PROMPT_TOKENS if generates else ENCODER_TOKENS,
            max_new_tokens=NEW_TOKENS,
            sequential=mode == "sequential",
        )
        session = module.hermes
        pass_seconds = session.stats.pass_seconds
    digest = hashlib.sha256()
    start = time.perf_counter()
    if generates:
        ids = torch.arange(100, 100 + PROMPT_TOKENS).view(1, -1)
        tokens = module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False, output_scores=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        outputs = [tokens.sequences, *tokens.scores]
    else:
        size = getattr(module.config, "image_size", 224)
        inputs = (
            {"input_ids": torch.arange(1000, 1000 + ENCODER_TOKENS).view(1, -1)}
            if auto_class
            else {"pixel_values": torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)}
        )
        for _ in range(FORWARDS):
            outputs = [module(**inputs)[0]]
    seconds = time.perf_counter() - start
    for tensor in outputs:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    from hermes.memory.probe import peak_resident_bytes

    result: dict[str, object] = {
        "digest": digest.hexdigest()[:16],
        "seconds": seconds,
        "pass_seconds": list(pass_seconds),
        "steady_seconds": statistics.median(pass_seconds[1:]),
        "peak_bytes": peak_resident_bytes(),
    }
    if session is not None:
        plan, stats = session.plan, session.stats
        result |= {
            "predicted_seconds": plan.first_pass_seconds + (len(pass_seconds) - 1) * plan.steady_pass_seconds,
            "predicted_steady_seconds": plan.steady_pass_seconds,
            "predicted_peak_bytes": plan.peak_bytes,
            "steady_bytes": statistics.median(stats.pass_bytes[1:]),
            "bytes_read": stats.bytes_read,
            "stall_seconds": stats.stall_seconds,
            "evicted_bytes": stats.evicted_bytes,
            "num_agents": plan.num_agents,
            "granularity": plan.granularity,
            "ring_bytes": plan.ring_bytes,
            "resident_bytes": plan.resident_bytes,
            "floor_bytes": plan.floor_bytes,
        }
        session.close()
    return result


main()
