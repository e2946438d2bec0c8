"""A fleet's report as a table and three lines."""

from collections.abc import Callable

from rich import box
from rich.table import Table

from hermes.fleet import FleetReport, ModelReport
from hermes.units import format_bytes, format_seconds

__all__ = ["fleet_lines", "fleet_table"]


def fleet_table(report: FleetReport) -> Table:
    """A row for each model; latency measured, and as predicted for a closed loop."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", min_width=8, overflow="fold")
    columns: dict[str, Callable[[ModelReport], str]] = {
        "asked": lambda model: str(model.requests),
        "failed": lambda model: str(model.failed or ""),
        "late": lambda model: str(model.late or ""),
        "latency": lambda model: format_seconds(model.latency_seconds),
        "predicted": lambda model: format_seconds(model.predicted_latency_seconds),
        "weights": lambda model: format_bytes(model.weight_bytes),
        "quota": lambda model: format_bytes(model.quota_bytes),
        "read": lambda model: format_bytes(model.bytes_read),
    }
    models = report.models.values()
    shown = {name: cell for name, cell in columns.items() if any(cell(model) for model in models)}  # not all empty
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for name, model in report.models.items():
        table.add_row(name, *(cell(model) for cell in shown.values()))
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
