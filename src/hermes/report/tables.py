"""Records as rich tables: plans, sweeps of plans, profiles, and lists of facts.

Pure: a record in, a table out. Who prints it, and where to, is the command's choice; plots are in `plot`.
"""

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from hermes.plan import TOUCH_STEP_BYTES, Plan
from hermes.profile import ComputeRecord, LinearFit, Profile, UnitRecord
from hermes.report.outcome import describe_blocks
from hermes.units import format_bytes, format_rate, format_seconds

__all__ = [
    "FoldedUnits",
    "bandwidth_table",
    "budget_table",
    "delay_facts",
    "facts_table",
    "fold_units",
    "merge_blocks",
    "plan_table",
    "profile_table",
    "sweep_table",
    "touch_fact",
]


@dataclass(frozen=True, kw_only=True)
class FoldedUnits:
    """Units that differ only in the numbers of their names; seconds are the median of theirs."""

    pattern: str
    count: int
    unit: UnitRecord


def facts_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns, no lines: what, and its value."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def plan_table(plan: Plan, *, num_passes: int, num_row_ranges: int, smallest_bytes: int, measured: bool) -> Table:
    """What was settled and what it is predicted to cost; `num_passes` is the workload's."""
    blocks = describe_blocks(plan.granularity, len(plan.resident), num_row_ranges)
    return facts_table(
        f"Plan for {format_bytes(plan.budget_bytes)}",
        [
            ("first pass", format_seconds(plan.first_pass_seconds)),
            ("steady pass", format_seconds(plan.steady_pass_seconds)),
            ("total", f"{format_seconds(plan.total_seconds)} for {_count(num_passes, 'pass', 'passes')}"),
            ("limited by", f"{plan.bound}: {format_seconds(plan.bound_seconds)} a pass at least"),
            ("read per pass", format_bytes(plan.pass_bytes)),
            ("agents", f"{plan.num_agents}, {format_bytes(plan.piece_bytes)} a read"),
            ("granularity", blocks + ", one at a time" * plan.sequential),
            ("peak memory", format_bytes(plan.peak_bytes)),
            ("smallest budget", format_bytes(smallest_bytes)),
            ("costs", "measured" if measured else "estimated; `hermes profile` measures them"),
        ],
    )


def budget_table(plan: Plan) -> Table:
    """Where the budget goes; the rows add up to it."""
    streams = plan.pass_bytes + plan.packed_bytes > 0
    window = plan.ring_bytes if streams else 0
    known = plan.floor_bytes + plan.heap_bytes + plan.pinned_bytes + plan.resident_bytes + plan.packed_bytes + window
    rows = [
        ("floor", plan.floor_bytes, "the process before any weight"),
        ("heap", plan.heap_bytes, "activations, key-value cache, row buffers"),
        ("pinned", plan.pinned_bytes, "small and shared weights"),
        ("window", window, "streamed blocks pass through" if streams else "nothing streams"),
        ("resident", plan.resident_bytes, "weights kept between passes"),
        ("packed", plan.packed_bytes, "likewise, as they lie on disk; unpacked at every pass"),
        ("buffers", plan.peak_bytes - known, "of the Loading Agents"),
        ("spare", plan.budget_bytes - plan.peak_bytes, "safety margin, and what no block fits in"),
        ("budget", plan.budget_bytes, ""),
    ]
    table = _table("Where the budget goes", "part", "bytes", "share")
    table.add_column("what")
    for name, nbytes, what in rows:
        if nbytes:
            table.add_row(name, format_bytes(nbytes), f"{nbytes / plan.budget_bytes:.0%}", what)
    return table


def sweep_table(plans: Sequence[Plan]) -> Table:
    """Latency against budget, a row for each plan."""
    table = _table("Latency against budget", "budget", "first pass", "steady", "read/pass", "resident", "agents")
    table.add_column("blocks", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    for plan in plans:
        table.add_row(
            format_bytes(plan.budget_bytes),
            format_seconds(plan.first_pass_seconds),
            format_seconds(plan.steady_pass_seconds),
            format_bytes(plan.pass_bytes),
            format_bytes(plan.resident_bytes),
            str(plan.num_agents),
            plan.granularity,
            plan.bound,
        )
    return table


def profile_table(profile: Profile, *, by_unit: bool = False) -> Table:
    """Costs of each layer (or of each unit), those alike folded into one row; seconds are in ms, to fit 80 columns."""
    records = profile.units if by_unit else merge_blocks(profile.units)
    agents = sorted({count for record in records for count in record.load_seconds})
    tokens = sorted({count for record in records for count, _ in record.compute.samples})
    table = _table(
        f"{'Units' if by_unit else 'Layers'} in {profile.dtype}; loading by agents, computing by tokens, in ms"
    )
    table.box = None
    table.add_column("\nunit" if by_unit else "\nlayer", overflow="fold", min_width=12)
    names = ["\nbytes", "\nFLOPs", "activa-\ntions"]
    names += [f"load\nby {count}" for count in agents] + [f"compute\n{count}" for count in tokens]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for folded in fold_units(records):
        record = folded.unit
        computes = dict(record.compute.samples)
        table.add_row(
            folded.pattern if folded.count == 1 else f"{folded.count} x {folded.pattern}",
            format_bytes(record.nbytes),
            _format_flops(record.flops),
            format_bytes(record.activation_bytes),
            *(_format_milliseconds(record.load_seconds.get(count)) for count in agents),
            *(_format_milliseconds(computes.get(count)) for count in tokens),
        )
    return table


def bandwidth_table(profile: Profile) -> Table:
    """The disk: rates by agents (rows) and piece sizes (columns)."""
    sizes = sorted({record.piece_bytes for record in profile.bandwidths})
    rates = {(record.num_agents, record.piece_bytes): record.bytes_per_second for record in profile.bandwidths}
    table = _table("Disk, past the page cache", "agents", *(f"{format_bytes(size)} a read" for size in sizes))
    for count in sorted({record.num_agents for record in profile.bandwidths}):
        cells = [format_rate(rates[count, size]) if (count, size) in rates else "" for size in sizes]
        table.add_row(str(count), *cells)
    return table


def delay_facts(profile: Profile) -> list[tuple[str, str]]:
    """The delay model in words: what is linear in what, and how well that explains what was measured."""
    delays = profile.delays
    if delays is None:
        return []
    facts = [(f"{name} (loading)", _fit(fit)) for name, fit in (("t_in", delays.t_in),) if fit is not None]
    if delays.t_ex is not None:
        facts.append(("t_ex (computing)", _fit(delays.t_ex)))
    if delays.t_ex_flops is not None and delays.t_ex != delays.t_ex_flops:
        facts.append(("t_ex by FLOPs alone", f"{_fit(delays.t_ex_flops)}: memory decides, too"))
    return facts


def _fit(fit: LinearFit) -> str:
    """Its terms, which only add up to something: a layer has more bytes and more units at once, so none is a rate."""
    scales = {
        "nbytes": (2**20, "MiB"),
        "flops": (10**9, "GFLOP"),
        "activation_bytes": (2**20, "MiB of activations"),
        "depth": (1, "unit"),
    }
    terms = [(factor * scales[term][0], scales[term][1]) for term, factor in fit.coefficients.items()]
    sums = " + ".join(f"{seconds * 1e3:.2g} ms a {what}" for seconds, what in [*terms, (fit.constant, "block")])
    return f"{sums}; R^2 {fit.r_squared:.3f} over {fit.num_samples} blocks"


def touch_fact(seconds_per_byte: Sequence[float]) -> tuple[str, str]:
    """How fast memory is written to for the first time: the median, and how far the steps are apart."""
    rates = [1 / max(seconds, 1e-12) for seconds in seconds_per_byte]
    steps = f"{len(rates)} steps of {format_bytes(TOUCH_STEP_BYTES)}"
    spread = f"{format_rate(min(rates))} to {format_rate(max(rates))} over {steps}"
    return "touching memory first", f"{format_rate(statistics.median(rates))}; {spread}"


def merge_blocks(units: Iterable[UnitRecord]) -> list[UnitRecord]:
    """Units of the same layer as one record: sums, and the highest activations. In order of first appearance.

    A number of agents or tokens that was not measured for every unit of a layer is left out of the layer.
    """
    members: dict[str, list[UnitRecord]] = {}
    for unit in units:
        members.setdefault(unit.block, []).append(unit)
    return [_sum(block, records) for block, records in members.items()]


def fold_units(units: Iterable[UnitRecord]) -> list[FoldedUnits]:
    """Units alike in size, operations and name (but for its numbers) as one; in order of first appearance."""
    alike: dict[tuple[str, int, int], list[UnitRecord]] = {}
    for unit in units:
        alike.setdefault((re.sub(r"\d+", "*", unit.name), unit.nbytes, unit.flops), []).append(unit)
    return [
        FoldedUnits(
            pattern=pattern if len(records) > 1 else records[0].name, count=len(records), unit=_median(pattern, records)
        )
        for (pattern, _, _), records in alike.items()
    ]


def _table(title: str, *numbers: str) -> Table:
    """Without side lines, to fit 80 columns; `numbers` are columns flush right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _sum(block: str, records: Sequence[UnitRecord]) -> UnitRecord:
    agents = set.intersection(*(set(record.load_seconds) for record in records))
    tokens = set.intersection(*({count for count, _ in record.compute.samples} for record in records))
    computes = [dict(record.compute.samples) for record in records]
    return UnitRecord(
        name=block,
        block=block,
        nbytes=sum(record.nbytes for record in records),
        flops=sum(record.flops for record in records),
        activation_bytes=max(record.activation_bytes for record in records),
        load_seconds={count: sum(record.load_seconds[count] for record in records) for count in sorted(agents)},
        compute=ComputeRecord(
            samples=tuple((count, sum(compute[count] for compute in computes)) for count in sorted(tokens))
        ),
    )


def _median(pattern: str, records: Sequence[UnitRecord]) -> UnitRecord:
    loads: dict[int, list[float]] = {}
    computes: dict[int, list[float]] = {}
    for record in records:
        for count, seconds in record.load_seconds.items():
            loads.setdefault(count, []).append(seconds)
        for count, seconds in record.compute.samples:
            computes.setdefault(count, []).append(seconds)
    return UnitRecord(
        name=pattern,
        block=records[0].block,
        nbytes=records[0].nbytes,
        flops=records[0].flops,
        activation_bytes=max(record.activation_bytes for record in records),
        load_seconds={count: statistics.median(seconds) for count, seconds in sorted(loads.items())},
        compute=ComputeRecord(
            samples=tuple((count, statistics.median(seconds)) for count, seconds in sorted(computes.items()))
        ),
    )


def _format_milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def _format_flops(flops: float) -> str:
    for unit in ("", "k", "M", "G"):
        if flops < 1000:
            return f"{flops:.3g}{' ' * bool(unit)}{unit}"
        flops /= 1000
    return f"{flops:.3g} T"


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"
