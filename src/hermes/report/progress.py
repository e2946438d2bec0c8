"""What a person sees while a model runs: its text as it comes, and a line of pass, block, disk rate and memory.

The line is drawn only on a terminal, and only then is rich imported. With nobody looking, text goes straight through.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hermes.engine import EngineStats
from hermes.memory.probe import resident_bytes
from hermes.units import format_bytes, format_rate

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

__all__ = ["ProgressLine", "byte_progress", "import_terminal", "show_progress"]

REFRESHES_PER_SECOND = 4
RATE_WINDOW_SECONDS = 1.0


class ProgressLine:
    """The line itself, as text; a new one at each call.

    Args:
        stats: the engine's, read while it runs.
        num_blocks: of a pass.
        num_passes: expected.
        budget_bytes: what memory is held against.
        clock: seconds, for the disk rate.
    """

    def __init__(
        self,
        stats: EngineStats,
        *,
        num_blocks: int,
        num_passes: int,
        budget_bytes: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._stats = stats
        self._num_blocks = num_blocks
        self._num_passes = num_passes
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._marks = [(clock(), stats.bytes_read)]

    def __call__(self) -> str:
        """Pass, block, bytes per second over the last second or so, memory against the budget."""
        now, nbytes = self._clock(), self._stats.bytes_read
        self._marks.append((now, nbytes))
        while len(self._marks) > 2 and now - self._marks[1][0] >= RATE_WINDOW_SECONDS:
            del self._marks[0]
        then, before = self._marks[0]
        rate = (nbytes - before) / (now - then) if now > then else 0.0
        block = self._stats.current_block
        parts = [f"pass {min(self._stats.passes + 1, self._num_passes)}/{self._num_passes}"]
        if block is not None:
            parts.append(f"block {block + 1}/{self._num_blocks}")
        parts.append(format_rate(rate))
        parts.append(f"{format_bytes(resident_bytes())} of {format_bytes(self._budget_bytes)}")
        return " · ".join(parts)


def import_terminal() -> None:
    """Import now what drawing will need, if there is a terminal: memory is planned with what is there by then."""
    if sys.stderr.isatty():
        import rich.live  # noqa: F401


@contextmanager
def byte_progress(task: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar for a job that counts bytes, told how many are done, of how many; None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(line, completed=done, total=total)


@contextmanager
def show_progress(line: Callable[[], str] | None) -> Iterator[Callable[[str], None]]:
    """Draw `line` while the block runs, if there is a terminal to draw on; yields the way to say text meanwhile.

    Text reaches standard output: at once where that is not the terminal of the line, else above the line, and whole
    when the block ends.
    """
    if line is None or not sys.stderr.isatty():
        yield _say
        return
    from rich.console import Console
    from rich.live import Live

    if not sys.stdout.isatty():
        with Live(
            console=Console(stderr=True),
            get_renderable=line,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=False,
        ):
            yield _say
        return
    yield from _shared_terminal(Console(), line, Live)


def _shared_terminal(
    console: "Console", line: Callable[[], str], live: "type[Live]"
) -> Iterator[Callable[[str], None]]:
    """Text and line on one terminal, both drawn by rich: of a long text its end while it grows."""
    from rich.console import Group
    from rich.text import Text

    said: list[str] = []

    def draw() -> "RenderableType":
        rows = Text("".join(said)).wrap(console, console.width)
        return Group(*rows[-max(1, console.height - 2) :], Text(line(), style="dim"))

    try:
        with live(console=console, get_renderable=draw, refresh_per_second=REFRESHES_PER_SECOND, transient=True):
            yield said.append
    finally:
        if said:
            _say("".join(said))


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
