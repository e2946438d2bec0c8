"""What goes on beside the preparations for a run: memory is found for it. And what touching the rest will cost."""

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from hermes.checkpoint import Checkpoint
from hermes.memory.pages import drop_idle_pages, fetch_code
from hermes.memory.probe import available_bytes, num_cores, resident_bytes
from hermes.memory.warm import Warmed, WarmUp
from hermes.plan import TOUCH_STEP_BYTES
from hermes.profile import Profile
from hermes.session.workload import Workload

__all__ = ["Beside", "touch_when_warm"]

MIB = 2**20
IMPORTING_BYTES = 64 * MIB
"""What transformers' code for one model takes, and the model's skeleton; 40 MiB were seen."""
FIRST_IMPORT_BYTES = 96 * MIB
"""The same where nothing of transformers is there yet."""
TRACING_BYTES = 300 * MIB
"""What tracing a model takes, in this process and in its child."""
ONE_PASS_BYTES = 256 * MIB
"""A single pass keeps nothing: all it needs is a window."""


class Beside:
    """Finds memory for the weights while a model is prepared; `with` ends it.

    As far as the preparations leave the limit free; where that is not far, pages of library code are given back first.
    The preparations say when they are `tracing`, and `stop` in the end.

    Args:
        checkpoint: whose weights will be read.
        limit_bytes: of this process; 0 finds nothing.
        workload: what for.
        likely: the profile that will probably be planned with: it knows the code that preparing uses, which is fetched
            at once, instead of in a read of megabytes for each fault on it.
    """

    def __init__(self, checkpoint: Checkpoint, limit_bytes: int, workload: Workload, likely: Profile | None) -> None:
        self._limit_bytes = min(limit_bytes, resident_bytes() + available_bytes())
        # What is packed stays so, and files are then smaller than what is in them.
        weight_bytes = min(checkpoint.nbytes, sum(file.nbytes for file in checkpoint.files))
        wanted_bytes = min(weight_bytes, ONE_PASS_BYTES) if workload.num_passes == 1 else weight_bytes
        importing_bytes = IMPORTING_BYTES if "transformers" in sys.modules else FIRST_IMPORT_BYTES
        if self._free_bytes() - importing_bytes < min(wanted_bytes, importing_bytes):
            drop_idle_pages()  # torch's, lest they come on top of those that the imports need
        if likely is not None:
            fetch_code(likely.preparing_code)
        free_bytes = max(0, self._free_bytes() - importing_bytes)
        self._warm_up = WarmUp(min(wanted_bytes, free_bytes), min(2 * weight_bytes, self._limit_bytes))  # a window, too

    @property
    def held_bytes(self) -> int:
        """Memory that was found and not given back yet."""
        return self._warm_up.nbytes

    def tracing(self) -> None:
        """A child is about to trace the model: makes room for it."""
        self._warm_up.shrink(self._free_bytes() + self.held_bytes - TRACING_BYTES)

    def stop(self) -> Warmed:
        """The memory that was found, as much of it as is left."""
        return self._warm_up.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._warm_up.stop()

    def _free_bytes(self) -> int:
        return self._limit_bytes - resident_bytes()


def touch_when_warm(known: Sequence[float], warmed: Warmed) -> tuple[float, ...]:
    """Seconds for each byte that is written to for the first time, for each further `TOUCH_STEP_BYTES`.

    None as far as memory was found; what comes after that costs what the last of it did, but agents touch memory on all
    cores. As `known` from before where none was.
    """
    num_steps = warmed.nbytes // TOUCH_STEP_BYTES
    if not num_steps:
        return tuple(known)
    return (0.0,) * num_steps + (warmed.seconds_per_byte / num_cores(),)
