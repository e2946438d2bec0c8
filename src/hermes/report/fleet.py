"""A fleet's report as a table and three lines."""

from rich import box
from rich.table import Table

from hermes.fleet import FleetReport
from hermes.units import format_bytes, format_seconds

__all__ = ["fleet_lines", "fleet_table"]


def fleet_table(report: FleetReport) -> Table:
    """A row for each model; latency measured, and as predicted for a closed loop."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", min_width=8, overflow="fold")
    for name in ("asked", "failed", "late", "latency", "predicted", "weights", "quota", "read"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, model in report.models.items():
        table.add_row(
            name,
            str(model.requests),
            str(model.failed or ""),
            str(model.late or ""),
            format_seconds(model.latency_seconds),
            format_seconds(model.predicted_latency_seconds),
            format_bytes(model.weight_bytes),
            format_bytes(model.quota_bytes),
            format_bytes(model.bytes_read),
        )
    return table


def fleet_lines(report: FleetReport) -> list[str]:
    """Policy, memory against the budget, time against prediction and bound."""
    predicted = ", ".join(f"{policy} {format_seconds(s)}" for policy, s in report.predicted_seconds.items())
    return [
        f"policy  {report.policy}, {report.max_active} under way at once",
        f"memory  peak {format_bytes(report.peak_bytes)} of {format_bytes(report.budget_bytes)} "
        f"({format_bytes(report.floor_bytes)} before any weight)",
        f"time    {format_seconds(report.makespan_seconds)} (predicted for a closed loop: {predicted}; "
        f"bound {format_seconds(report.bound_seconds)})",
    ]
