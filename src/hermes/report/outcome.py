"""What one `hermes run` came to: the record that --json prints, and its summary in three lines."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hermes.units import format_bytes, format_rate, format_seconds

__all__ = ["Outcome", "describe_blocks", "seconds_per_pass"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Measured and predicted side by side; None where it does not apply (a resident run has no plan).

    Attributes:
        model: as it was asked for.
        task: as transformers names it.
        outputs: one for each input.
        budget_bytes: what was allowed.
        floor_bytes: the process before any weight.
        peak_bytes: its largest resident set.
        load_seconds: from the start of the process to the start of inference.
        seconds: of inference.
        first_output_seconds: until the first token, or all of it where there are none.
        seconds_per_pass: the median of all passes but the first, which is cold.
        passes: sweeps over the weights.
        bytes_read: from disk.
        stall_seconds: that inference waited for weights.
        predicted_seconds: of as many passes.
        predicted_peak_bytes: of the process.
        plan: what the planner settled.
        device: where it was computed, and what that took there; None on the CPU.
    """

    model: str
    task: str
    outputs: Sequence[dict[str, Any]]
    budget_bytes: int | None
    floor_bytes: int | None
    peak_bytes: int
    load_seconds: float
    seconds: float
    first_output_seconds: float
    seconds_per_pass: float | None
    passes: int
    bytes_read: int | None
    stall_seconds: float | None
    predicted_seconds: float | None
    predicted_peak_bytes: int | None
    plan: dict[str, Any] | None
    device: dict[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def summary(self) -> list[str]:
        """For people: the plan, memory against the budget, time against prediction."""
        lines = []
        if self.plan is not None:
            lines.append(
                f"plan    {_blocks(self.plan)}; "
                f"{self.plan['num_agents']} agents, window {format_bytes(self.plan['ring_bytes'])}, "
                f"{format_bytes(self.plan['resident_bytes'])} resident; bound by {self.plan['bound']}"
            )
        if self.device is not None:
            lines.append(_device_line(self.device))
        peak = f"memory  peak {format_bytes(self.peak_bytes)}"
        if self.budget_bytes is not None and self.predicted_peak_bytes is not None and self.floor_bytes is not None:
            peak += (
                f" of {format_bytes(self.budget_bytes)} (predicted {format_bytes(self.predicted_peak_bytes)}; "
                f"{format_bytes(self.floor_bytes)} before any weight)"
            )
        lines.append(peak)
        time = f"time    {format_seconds(self.seconds)}"
        if self.predicted_seconds is not None:
            time += f" (predicted {format_seconds(self.predicted_seconds)})"
        if self.passes:
            time += f", {self.passes} {'pass' if self.passes == 1 else 'passes'}"
        if self.passes > 1 and self.seconds_per_pass is not None:
            time += f" of {format_seconds(self.seconds_per_pass)}"
        if self.bytes_read:
            time += f"; {format_bytes(self.bytes_read)} read, {format_rate(self.bytes_read / max(self.seconds, 1e-9))}"
        if self.stall_seconds is not None:
            time += f", {format_seconds(self.stall_seconds)} waiting for weights"
        return [*lines, time]


def _blocks(plan: dict[str, Any]) -> str:
    return describe_blocks(plan["granularity"], plan["num_blocks"], plan["num_row_ranges"])


def _device_line(device: dict[str, Any]) -> str:
    line = f"device  {device['name']}: peak {format_bytes(device['peak_bytes'])}"
    if device["budget_bytes"] is None:
        return line + "; weights in the memory it shares with the host"
    return (
        f"{line} of {format_bytes(device['budget_bytes'])}, {format_bytes(device['staying_bytes'])} of weights stay, "
        f"window {format_bytes(device['ring_bytes'])}; {format_bytes(device['pass_bytes'])} copied in each pass"
    )


def describe_blocks(granularity: str, num_blocks: int, num_row_ranges: int) -> str:
    """What a plan's blocks are: ranges of a matrix's rows are blocks of their own at every granularity."""
    ranges = f", {num_row_ranges} of them ranges of a matrix's rows" if num_row_ranges else ""
    return f"{granularity}, {num_blocks} blocks{ranges}"


def seconds_per_pass(pass_seconds: Sequence[float]) -> float | None:
    """The median of the passes after the first, or the only one; None of none."""
    steady = pass_seconds[1:] or pass_seconds
    return statistics.median(steady) if steady else None
