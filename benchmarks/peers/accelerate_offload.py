"""transformers with accelerate's disk offload: what fits stays, the rest is read from the safetensors for each layer.

python accelerate_offload.py MODEL RESIDENT_BYTES
"""

import sys
import time
from pathlib import Path

import torch
import transformers
from work import Work, clock_passes, report


def main() -> None:
    work, resident_bytes = Work(Path(sys.argv[1])), int(sys.argv[2])
    cls = getattr(transformers, work.auto_class)
    torch.set_grad_enabled(False)
    folder = work.model.with_name(f"{work.model.name}.offload")
    start = time.perf_counter()
    module = cls.from_pretrained(
        work.model, dtype="auto", device_map="auto", max_memory={"cpu": resident_bytes}, offload_folder=folder
    ).eval()
    pass_seconds = clock_passes(module)
    load_seconds = time.perf_counter() - start
    outputs = work.perform(module)
    on_disk = sum(device == "disk" for device in getattr(module, "hf_device_map", {}).values())
    report(work, load_seconds=load_seconds, pass_seconds=pass_seconds, outputs=outputs, modules_on_disk=on_disk)


main()
