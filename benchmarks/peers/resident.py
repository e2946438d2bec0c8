"""Baseline: load everything, then infer, with plain transformers.

python resident.py MODEL
"""

import sys
import time
from pathlib import Path

import torch
import transformers
from work import Work, clock_passes, report


def main() -> None:
    work = Work(Path(sys.argv[1]))
    cls = getattr(transformers, work.auto_class)
    torch.set_grad_enabled(False)
    start = time.perf_counter()
    module = cls.from_pretrained(work.model, dtype="auto").eval()
    pass_seconds = clock_passes(module)
    load_seconds = time.perf_counter() - start
    report(work, load_seconds=load_seconds, pass_seconds=pass_seconds, outputs=work.perform(module))


main()
