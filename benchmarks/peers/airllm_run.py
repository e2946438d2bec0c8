"""AirLLM: a layer at a time, from files of its own that it splits the checkpoint into (not timed).

python airllm_run.py MODEL [--split]
"""

import sys
import time
from pathlib import Path

import torch
from airllm import AutoModel
from work import Work, report


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
    pass_seconds: list[float] = []
    own = type(module).__call__

    def timed(self, *args, **kwargs):  # no nn.Module: no hooks
        begun = time.perf_counter()
        output = own(self, *args, **kwargs)
        pass_seconds.append(time.perf_counter() - begun)
        return output

    type(module).__call__ = timed
    report(work, load_seconds=load_seconds, pass_seconds=pass_seconds, outputs=work.perform(module))


main()
