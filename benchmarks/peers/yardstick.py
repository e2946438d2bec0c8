"""What no streaming can beat: resident passes, and in turns with them the same while BYTES are read beside each.

    python yardstick.py MODEL BUDGET BYTES WINDOW

Nobody waits for the reads but the end of the pass.
"""

import itertools
import statistics
import sys
import time
from pathlib import Path

from hermes.memory.allocator import keep_heap_tight

keep_heap_tight()
import torch  # noqa: E402
from work import Work, clock_passes, report  # noqa: E402

import hermes  # noqa: E402

sys.path.append(str(Path(__file__).parents[1]))
from reading import Reading  # noqa: E402


def main() -> None:
    work, budget = Work(Path(sys.argv[1])), sys.argv[2]
    nbytes, window_bytes = map(int, sys.argv[3:])
    torch.set_grad_enabled(False)
    start = time.perf_counter()
    module = hermes.load(work.model, budget=budget, **work.load_options)
    reading = Reading([work.model], nbytes, window_bytes)
    passes = itertools.count(1)
    module.register_forward_hook(lambda *_: reading.wait())  # inside what is clocked, as the start is
    seconds = clock_passes(module)
    module.register_forward_pre_hook(lambda *_: reading.start() if next(passes) % 2 == 0 else None)
    load_seconds = time.perf_counter() - start
    for _ in range(1 if work.generates else 2):  # a decoder's second prompt would be no token
        outputs = work.perform(module)
    later = seconds[1:]
    report(
        work,
        load_seconds=load_seconds,
        pass_seconds=seconds,
        outputs=outputs,
        beside_seconds=statistics.median(later[0::2]),
        resident_seconds=statistics.median(later[1::2]),
    )


main()
