"""Hermes itself.

    python hermes_run.py MODEL BUDGET [streamed|sequential|nothing-resident] [GRANULARITY AGENTS WINDOW]

With the last three the plan is given, not chosen; WINDOW is in smallest windows.
"""

import sys
import time
from pathlib import Path

from hermes.memory.allocator import keep_heap_tight

keep_heap_tight()
import torch  # noqa: E402
from work import Work, report  # noqa: E402

import hermes  # noqa: E402
import hermes.api  # noqa: E402
from hermes.model.lean import lean_imports  # noqa: E402
from hermes.plan import search  # noqa: E402

with lean_imports():  # as Hermes imports it; before the clock, as for every peer that is made of it
    import transformers  # noqa: F401


def main() -> None:
    work, budget, mode = Work(Path(sys.argv[1])), sys.argv[2], (*sys.argv[3:], "streamed")[0]
    choices: dict = {}
    if len(sys.argv) > 4:
        granularity, agents, window = sys.argv[4:]
        choices = {"granularity": granularity, "num_agents": int(agents)}
        search.WINDOW_LADDER = (float(window),)
    torch.set_grad_enabled(False)
    start = time.perf_counter()
    module = hermes.load(
        work.model,
        budget=budget,
        sequential=mode == "sequential",
        resident_bytes=0 if mode == "nothing-resident" else None,
        **work.load_options,
        **choices,
    )
    load_seconds = time.perf_counter() - start
    session = module.hermes
    outputs = work.perform(module)
    plan, stats = session.plan, session.stats
    work.floor_bytes = plan.floor_bytes
    report(
        work,
        load_seconds=load_seconds,
        pass_seconds=stats.pass_seconds,
        outputs=outputs,
        predicted_seconds=plan.first_pass_seconds + (len(stats.pass_seconds) - 1) * plan.steady_pass_seconds,
        predicted_steady_seconds=plan.steady_pass_seconds,
        predicted_peak_bytes=plan.peak_bytes,
        steady_bytes=stats.pass_bytes[-1],
        evicted_bytes=stats.evicted_bytes,
        num_agents=plan.num_agents,
        granularity=plan.granularity,
        ring_bytes=plan.ring_bytes,
        resident_bytes=plan.resident_bytes,
    )


main()
