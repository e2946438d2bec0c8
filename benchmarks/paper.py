"""The paper's tables with ours beside them, row by row, and its headlines against PipeSwitch."""

import statistics
from collections.abc import Iterator

from conditions import ENCODERS, median
from rows import Row, Rows, above_floor, bound_seconds, cold_pass, first_seconds, has, steady_seconds

from hermes.units import format_bytes

PAPER = {
    "bert-large": ("1627 MB", "931 MB", "15.9 s", "3.51 s"),
    "vit-large": ("600 MB", "159 MB", "345 ms", "43 ms"),
    "gpt2-medium": ("1400 MB", "563 MB", "1.66 s", "1.12 s"),
    "gpt-j-6b": ("12.35 GB", "3.24 GB", "31.33 s", "29.64 s"),
}
"""Baseline's and Hermes's memory, their latency: Han et al. 2024, eight cores of a Xeon Gold 6248R, six agents."""
HEADLINES = {"bert-large": (4.24, 0.867), "vit-large": (4.24, 0.867), "gpt2-medium": (2.58, 0.903),
             "gpt-j-6b": (2.58, 0.903)}  # fmt: skip
"""Against PipeSwitch: the paper's largest speed-up, and its largest saving of memory, from different settings."""


def paper_tables(rows: Rows) -> list[str]:
    """The paper's rows, ours beside them."""
    lines = [
        "## The paper's tables, and ours",
        "",
        "*Ours*: memory and first output from cold of the baseline with room for everything, and of Hermes at the "
        "smallest cap measured, disk as it is. *Above the floor*: less what each process holds before any weight.",
        "",
        "| model | paper: memory | paper: latency | ours: memory | ours: first output | memory above the floor |",
        "|---|---|---|---|---|---|",
    ]
    for model, (their_memory, our_memory, their_seconds, our_seconds) in PAPER.items():
        base = rows.one(model=model, peer="baseline", cap="100", disk="free")
        ours = rows.where(model=model, peer="hermes", disk="free")
        memory = seconds = less = "not measured"
        if base and ours:
            peaks = [format_bytes(int(median(row["runs"], "peak_bytes"))) for row in (base, ours[0])]
            firsts = [f"{median(row['runs'], 'first_seconds'):.2f} s" for row in (base, ours[0])]
            memory, seconds = " -> ".join(peaks), " -> ".join(firsts)
            less = f"{above_floor(ours[0]) / above_floor(base) - 1:+.1%}"
        lines.append(
            f"| {model} | {their_memory} -> {our_memory} | {their_seconds} -> {our_seconds} | {memory} | {seconds} "
            f"| {less} |"
        )
    lines += [
        "",
        "The headlines against PipeSwitch, which the paper has from different settings; ours at one, PipeSwitch "
        "reading per-layer `torch.save` files, with room for the whole model that it holds at the end. *First output* "
        "is from the start of loading, the building of modules in Python included; a *cold pass* begins when they are "
        "built, and PipeSwitch has its embeddings by then. *A token with nothing kept*: PipeSwitch's cold pass against "
        "a steady pass of Hermes with no weight resident. *Possible*: PipeSwitch's seconds over max(weights / disk "
        "rate, a resident pass of Hermes), which nothing that reads all weights can exceed; a cold pass also finds "
        "kernels' code and memory for its buffers. With memory for the whole model the later tokens of either run at "
        "resident speed (the rows at the largest cap).",
        "",
        "| model | what | paper, at most | ours: faster by | possible | ours: less memory above the floor "
        "| Hermes's cap |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, what, speed, saved, possible, row in headlines(rows):
        speed_up, memory = HEADLINES[model]
        most = "" if possible is None else f"{possible:.2f}x"
        lines.append(
            f"| {model} | {what} | {speed_up}x, {memory:.1%} | {speed:.2f}x | {most} | {saved:.1%} "
            f"| {format_bytes(row['cap_bytes'])} |"
        )
    return [*lines, ""]


def headlines(rows: Rows) -> Iterator[tuple[str, str, float, float, float | None, Row]]:
    """Model, what is compared, times faster, share of memory saved, times that are possible, and Hermes's row.

    That row is the fastest of those that save enough, or the one that saves most. What is possible is the comparator's
    seconds over max(weights / the disk's rate, a resident pass). It is not known where Python builds modules.
    """
    for model, (_, memory) in HEADLINES.items():
        theirs = rows.one(model=model, peer="pipeswitch-torch", disk="free")
        if theirs is None:
            continue
        nothing_kept = rows.where(model=model, peer="hermes-nothing-resident", disk="free")
        either = nothing_kept + rows.where(model=model, peer="hermes", disk="free")
        kinds = [("first output", either, first_seconds, first_seconds), ("cold pass", either, cold_pass, cold_pass)]
        if model not in ENCODERS:
            kinds.append(("a token with nothing kept", nothing_kept, cold_pass, steady_seconds))
        for what, candidates, theirs_of, ours_of in kinds:
            measured = [
                (theirs_of(theirs) / ours_of(row), 1 - above_floor(row) / above_floor(theirs), row)
                for row in candidates
            ]
            if measured:
                enough = [entry for entry in measured if entry[1] >= memory]
                speed, saved, row = max(enough or measured, key=lambda entry: entry[0] if enough else entry[1])
                possible = None
                if what != "first output" and has(row, "resident_seconds"):
                    bounds = [bound_seconds(run, row["weight_bytes"]) for run in row["runs"]]
                    possible = theirs_of(theirs) / statistics.median(bounds)
                yield model, what, speed, saved, possible, row
