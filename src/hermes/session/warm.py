"""How much memory to find beside the preparations for a run, and what touching memory costs after that."""

from collections.abc import Sequence
from pathlib import Path

from hermes.checkpoint import open_checkpoint, resolve_model
from hermes.memory.probe import num_cores, resident_bytes
from hermes.memory.warm import Warmed, WarmUp
from hermes.plan import TOUCH_STEP_BYTES
from hermes.profile import measure_touch
from hermes.session.session import memory_limit
from hermes.session.workload import Workload

__all__ = ["start_warm_up", "touch_when_warm"]

MIB = 2**20
PREPARING_BYTES = 300 * MIB
"""What importing transformers and tracing a model take, in this process and in its child."""
LEAST_BYTES = 440 * MIB
"""All of a process that has just been started, likewise."""
ONE_PASS_BYTES = 256 * MIB
"""A single pass keeps nothing: all it needs is a window."""
SAMPLE_BYTES = 16 * MIB


def start_warm_up(model: str | Path, revision: str | None, budget_bytes: int, workload: Workload) -> WarmUp:
    """Of what the weights will take at most, and only as far as the preparations leave the budget free."""
    checkpoint = open_checkpoint(resolve_model(model, revision=revision))
    # What is packed stays so, and files are then smaller than what is in them.
    weight_bytes = min(checkpoint.nbytes, sum(file.nbytes for file in checkpoint.files))
    preparing_bytes = max(LEAST_BYTES, resident_bytes() + PREPARING_BYTES)
    wanted_bytes = min(weight_bytes, ONE_PASS_BYTES) if workload.num_passes == 1 else weight_bytes
    return WarmUp(max(0, min(wanted_bytes, memory_limit(budget_bytes) - preparing_bytes)))


def touch_when_warm(known: Sequence[float], warmed: Warmed) -> tuple[float, ...]:
    """Seconds for each byte that is written to for the first time, for each further `TOUCH_STEP_BYTES`.

    Cheap as far as the warm-up came; what comes after that costs what its last bytes did, but agents touch memory on
    all cores. As `known` from before where it came nowhere.
    """
    num_steps = warmed.nbytes // TOUCH_STEP_BYTES
    if not num_steps:
        return tuple(known)
    (at_hand,) = measure_touch(SAMPLE_BYTES, step_bytes=SAMPLE_BYTES)
    return (at_hand,) * num_steps + (warmed.seconds_per_byte / num_cores(),)
