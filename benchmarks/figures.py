"""The plots of docs/results.md, as SVG: latency against budget with every peer as a line, and a timeline of agents."""

from pathlib import Path

import matplotlib
from comparators import PEERS
from conditions import MIB, median
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "hermes", "font.size": 9}
COLOURS = dict(zip(PEERS, [*matplotlib.colormaps["tab20"].colors[::2], "black", "gold"], strict=True))


def latency(rows: list[dict], path: Path, title: str) -> bool:
    """Seconds over the cap, and over the disk's rate at the smallest cap that was throttled; False if nothing to draw.

    Both axes of seconds are logarithmic. A peer that was killed at a cap has no point there.
    """
    free = [row for row in rows if row["disk"] == "free"]
    throttled = {row["cap"] for row in rows if row["disk"] != "free"}
    by_disk = [row for row in rows if row["cap"] in throttled]
    if not free:
        return False
    panels = [
        ("first output from cold", free, "first_seconds", cap_mib, "memory cap, MiB"),
        ("steady pass", free, "steady_seconds", cap_mib, "memory cap, MiB"),
    ]
    if by_disk:
        panels.append(("steady pass, smallest cap", by_disk, "steady_seconds", disk_rate, "disk, MB/s"))
    figure = Figure(figsize=(4 * len(panels), 4.6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, chosen, field, x_of, x_name) in zip(axes, panels, strict=True):
        for peer in PEERS:
            points = sorted((x_of(row), median(row["runs"], field)) for row in chosen if row["peer"] == peer)
            if points:
                thick = 2.5 if peer in ("hermes", "hermes-packed") else 1.2
                axis.plot(*zip(*points, strict=True), "o-", ms=4, lw=thick, color=COLOURS[peer], label=PEERS[peer].what)
        axis.set(title=name, xlabel=x_name, ylabel="seconds", yscale="log")
        if x_of is disk_rate:
            axis.set_xscale("log")
        for ticks in (axis.yaxis, axis.xaxis):
            ticks.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(panels), fontsize=8)
    save(figure, path)
    return True


def cap_mib(row: dict) -> float:
    return row["cap_bytes"] / MIB


def disk_rate(row: dict) -> float:
    """In MB/s, as limited or as measured."""
    return sorted(row["disk_rates"])[len(row["disk_rates"]) // 2] / 1e6 if row["disk"] == "free" else float(row["disk"])


def timeline(events: list[dict], path: Path) -> None:
    """A Chrome trace as bars, a line for each agent, with the resident set below."""
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    figure = Figure(figsize=(12, 4), layout="constrained")
    bars, memory = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for line, (tid, name) in enumerate(sorted(names.items(), key=lambda item: -item[0])):
        spans = [
            (event["ts"] / 1e6, event["dur"] / 1e6)
            for event in events
            if event["ph"] == "X" and event["tid"] == tid and "wait" not in event["name"]
        ]
        colour = COLOURS["baseline"] if name == "inference" else COLOURS["hermes"]
        bars.broken_barh(spans, (line - 0.4, 0.8), facecolors=colour, linewidth=0, rasterized=True)  # thousands
    bars.set_yticks(range(len(names)), [name for _, name in sorted(names.items(), key=lambda item: -item[0])])
    counted = [(event["ts"] / 1e6, event["args"]["bytes"] / MIB) for event in events if event["ph"] == "C"]
    if counted:
        memory.plot(*zip(*counted, strict=True), color="black", lw=1)
    memory.set(xlabel="seconds", ylabel="resident, MiB", ylim=(0, None))
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """The same rows give the same bytes."""
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
