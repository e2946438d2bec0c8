"""AirLLM: a layer at a time, from files of its own that it splits the checkpoint into (not timed).

python airllm_run.py MODEL [--split]
"""

import sys
import time
from pathlib import Path

import torch
from airllm import AutoModel
from work import Work, clock_passes, report


def main() -> None:
    work = Work(Path(sys.argv[1]))
    shards = work.model.with_name(f"{work.model.name}.airllm")
    torch.set_grad_enabled(False)
    start = time.perf_counter()
    module = AutoModel.from_pretrained(
        str(work.model), device="cpu", layer_shards_saving_path=str(shards), dtype=torch.bfloat16
    )
    if "--split" in sys.argv:
        return
    load_seconds = time.perf_counter() - start
    pass_seconds = clock_passes(module.model)  # transformers' own; AirLLM's hooks on its layers load and free
    report(work, load_seconds=load_seconds, pass_seconds=pass_seconds, outputs=work.perform(module))


main()
