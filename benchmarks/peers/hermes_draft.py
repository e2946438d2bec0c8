"""Hermes with a draft: what a sweep over several tokens costs, and what `--draft prompt-lookup` saves or costs.

    python hermes_draft.py MODEL BUDGET NEW_TOKENS

One process, everything in turns. *Plain* prose makes lookups that guess wrong, as the weights are random and repeating
is penalised; the *repeated* prompt is gone on with greedily, and random weights soon repeat themselves.
"""

import json
import os
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

from hermes.memory.allocator import keep_heap_tight

keep_heap_tight()
import torch  # noqa: E402
from work import clock_passes, memory_bytes  # noqa: E402

import hermes  # noqa: E402
from hermes.tasks.text import load_tokenizer  # noqa: E402
from hermes.tasks.text_generation import PROMPT_LOOKUP, GenerateOptions, generate_text  # noqa: E402

TURNS = 5
PASSES = 8
ROWS = (1, 8)
PROSE = " ".join(topics["naming"].split())[:600]
"""Of Python's language reference; words and endings come again, as in any prose."""
PROMPTS = {
    "does not repeat": (PROSE, 1.3),
    "repeats": ("one two three four " * 8, None),
}
"""Text, and the penalty on repeating."""


def sweep_seconds(model, vocabulary_size: int) -> dict[int, list[float]]:
    """Of passes over 1 token and over 8, behind the same 16."""
    from transformers import DynamicCache

    found: dict[int, list[float]] = {rows: [] for rows in ROWS}
    cache = DynamicCache(config=model.config)
    ids = torch.arange(100, 116).view(1, -1) % vocabulary_size
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    for _ in range(PASSES):
        for rows in ROWS:
            start = time.perf_counter()
            model(input_ids=ids[:, :rows], past_key_values=cache, use_cache=True)
            found[rows].append(time.perf_counter() - start)
            cache.crop(-rows)
    return found


def main() -> None:
    directory, budget, new_tokens = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_grad_enabled(False)
    tokenizer = load_tokenizer(directory)
    longest = max(len(tokenizer(text).input_ids) for text, _ in PROMPTS.values())
    model = hermes.load(directory, budget=budget, sequence_length=longest, max_new_tokens=new_tokens + max(ROWS))
    result: dict[str, object] = {"sweeps": sweep_seconds(model, model.config.vocab_size)}
    passes = clock_passes(model)
    for name, (text, penalty) in PROMPTS.items():
        runs: dict[str, list[dict]] = {"plain": [], "draft": []}
        for _ in range(TURNS):
            for way, draft in (("plain", None), ("draft", PROMPT_LOOKUP)):
                passes.clear()
                options = GenerateOptions(max_new_tokens=new_tokens, repetition_penalty=penalty, draft=draft)
                start = time.perf_counter()
                (output,) = generate_text(model, tokenizer, [text], options)
                seconds = time.perf_counter() - start
                # The prompt's sweep is the same in both.
                runs[way].append(
                    {"seconds": seconds - passes[0], "passes": len(passes) - 1, "tokens": output.token_ids}
                )
        result[name] = runs
    print(json.dumps(result | {"peak_bytes": memory_bytes("VmHWM")}))
    sys.stdout.flush()
    os._exit(0)


main()
