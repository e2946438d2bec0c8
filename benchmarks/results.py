"""docs/results.md and its plots, from docs/results.json, batch.json and predictions.json: what was measured, as it is.

Every figure is a median over a row's samples, and every ratio one of medians; the raw samples stay in the JSON.
"""

from pathlib import Path

import figures
from commands_table import SHELL_REACH, commands_tables, draft_ratios, shell_ratios
from comparators import PEERS
from conditions import DOCS, ENCODERS, MODELS, ROOT, median
from paper import HEADLINES, headlines, paper_tables
from rows import Row, Rows, failed, of_bound, possible_of_bound, ratio, stored

from hermes.units import format_bytes

HEADER = """\
| cap | disk | who | peak | first output, s | Hermes is faster by | steady pass, s | Hermes is faster by | of bound \
| same bits | source |
|---|---|---|---|---|---|---|---|---|---|---|"""


def table(rows: Rows, model: str) -> list[str]:
    """One model's."""
    lines = [HEADER]
    order = list(PEERS)
    chosen = [row for row in rows.rows if row["model"] == model]
    for row in sorted(chosen, key=lambda r: (-disk_number(r["disk"]), r["cap_bytes"], order.index(r["peer"]))):
        disk = "as it is" if row["disk"] == "free" else f"{row['disk']} MB/s"
        where = f"| {format_bytes(row['cap_bytes'])} | {disk} "
        who = PEERS[row["peer"]].what
        if (why := failed(row)) is not None:
            lines.append(f"{where}| {who} | {why} | | | | | | | |")
            continue
        ours = rows.one(model=model, peer="hermes", cap=row["cap"], disk=row["disk"])
        first = steady = bits = ""
        if ours is not None and ours is not row:
            first = f"{ratio(row, ours, 'first_seconds'):.2f}x"
            steady = f"{ratio(row, ours, 'steady_seconds'):.2f}x"
            theirs, digest = row["runs"][0].get("digest"), ours["runs"][0].get("digest")
            bits = "" if theirs is None else "yes" if theirs == digest else "no"
        bound = of_bound(row)
        lines.append(
            f"{where}| {who} | {format_bytes(int(median(row['runs'], 'peak_bytes')))} | "
            f"{median(row['runs'], 'first_seconds'):.2f} | {first} | {median(row['runs'], 'steady_seconds'):.3f} | "
            f"{steady} | {'' if bound is None else f'{bound:.2f}'} | {bits} | {row['taken']['commit']} |"
        )
    return lines


def disk_number(disk: str) -> float:
    """MB/s, for sorting."""
    return float("inf") if disk == "free" else float(disk)


PIPESWITCH = ("pipeswitch-torch", "pipeswitch-safetensors")
PACKED = (
    ("llama-3b", "3GiB", "hermes", 1.5), ("llama-3b", "3GiB", "llama.cpp", 3.0), ("llama-3b", "100", "llama.cpp", 1.0),
    ("gpt-j-6b", "4GiB", "hermes", 1.0), ("gpt-j-6b", "4GiB", "accelerate", 3.0),
)  # fmt: skip
"""Model, cap, who is left behind by packed weights, and how many times at least."""


def targets(rows: Rows, batch: list[Row], predictions: list[Row], commands: list[Row]) -> list[str]:
    """What was asked of every measurement, and what came out: the number, at the cap it was taken."""
    lines = [
        "## Against the targets",
        "",
        "*Possible*: for steady passes, what Hermes reaches with all weights resident while the same bytes are read "
        "beside each pass, into a window as large, and nobody waits for them: products slow the disk's transfers, and "
        "those the products. In other rows, with Hermes's pass at its bound, or at what was possible for it.",
        "",
        "| target | where | measured | asked | |",
        "|---|---|---|---|---|",
    ]

    def line(
        target: str, where: str, measured: float, asked: float, unit: str = "x", possible: float | None = None
    ) -> None:
        verdict = "met" if measured >= asked else "missed"
        if possible is not None and measured < asked:
            verdict += f"; {possible:.2f}{unit} is possible"
        lines.append(f"| {target} | {where} | {measured:.2f}{unit} | {asked:.2f}{unit} | {verdict} |")

    for row in sorted(rows.where(peer="hermes"), key=lambda r: (-disk_number(r["disk"]), MODELS.index(r["model"]))):
        share = of_bound(row)
        if row["cap"] != "100" and row["disk"] != "90" and share is not None:
            line("steady pass, of its bound", place(row), share, 0.95, "", possible_of_bound(row))
    for model, what, speed, saved, possible, row in headlines(rows):
        where = f"{place(row)}, {saved:.1%} less memory"
        line(f"against PipeSwitch, {what}", where, speed, HEADLINES[model][0], possible=possible)
    for peer, asked in (("llama.cpp", 2.0), ("accelerate", 2.8), ("airllm", 5.0)):
        for theirs in rows.where(model="llama-3b", peer=peer, cap="3GiB", disk="free"):
            if ours := rows.one(model="llama-3b", peer="hermes", cap=theirs["cap"], disk="free"):
                line(f"decoding, {PEERS[peer].what}", place(ours), ratio(theirs, ours, "steady_seconds"), asked)
    for model, cap, peer, asked in PACKED:
        ours = rows.one(model=model, peer="hermes-packed", cap=cap, disk="free")
        theirs = rows.one(model=model, peer=peer, cap=cap, disk="free")
        if ours and theirs:
            line(f"packed, against {PEERS[peer].what}", place(ours), ratio(theirs, ours, "steady_seconds"), asked)
    for model in ENCODERS:
        for theirs in rows.where(model=model, peer="accelerate", disk="free"):
            ours = rows.one(model=model, peer="hermes", cap=theirs["cap"], disk="free")
            if ours and theirs["cap"] != "100":
                faster = ratio(theirs, ours, "steady_seconds")
                share, possible_share = of_bound(ours), possible_of_bound(ours)
                possible = None if share is None else faster / share * (possible_share or 1.0)
                line("forward, accelerate", place(ours), faster, 2.5, possible=possible)
    for model in MODELS:
        ours = rows.one(model=model, peer="hermes", cap="100", disk="free")
        for what, peers in (("transformers", ("baseline",)), ("PipeSwitch, the faster port", PIPESWITCH)):
            others = [rows.one(model=model, peer=peer, cap="100", disk="free") for peer in peers]
            if ours and (ratios := [ratio(other, ours, "steady_seconds") for other in others if other]):
                line(f"all resident: not slower than {what}", place(ours), min(ratios), 1.0)
    for row in batch:
        if "outputs" in row:
            share = median(row["resident"], "seconds") / median(row["streamed"], "seconds")
            line("a file of sentences, of resident throughput", row["model"], share, 0.9, "")
    for row in commands:
        where = f"{row['model']}, {row['budget']}"
        if row["kind"] == "shell":
            for what, share in shell_ratios(row, rows).items():
                line(f"importing ({what}) and the bound, of hermes run", where, 1 / share, 1 / SHELL_REACH, "")
        else:
            ratios = draft_ratios(row)
            line("a sweep over 1 token, of one over 8", where, 1 / ratios["sweep"], 1 / 1.15, "")
            line("a draft for text that does not repeat", where, ratios["does not repeat"], 0.97)
    grid = [row for row in predictions if row["kind"] == "grid"]
    for field, reach in WITHIN.items():
        if grid:
            share = sum(abs(error(row, field)) <= reach for row in grid) / len(grid)
            line(
                f"{field.partition('_')[0]} predicted within {reach:.0%}, of rows", f"{len(grid)} rows", share, 1.0, ""
            )
    for row in predictions:
        if row["kind"] == "choice":
            line("the chosen plan, of the best one's speed", f"{row['model']}, {row['budget']}", of_best(row), 0.95, "")
    return [*lines, ""]


def other_processors(rows: Rows, cpu: str) -> str:
    """Which rows of the suite are not of this one; never two processors' of one model and disk."""
    others: dict[str, dict[str, None]] = {}
    for row in rows.rows:
        if row["taken"]["cpu"] != cpu:
            disk = "" if row["disk"] == "free" else f" at {row['disk']} MB/s"
            others.setdefault(row["taken"]["cpu"], {})[f"{row['model']}{disk}"] = None
    return "".join(f" Of {other}: {', '.join(places)}." for other, places in others.items())


def place(row: Row) -> str:
    """Model, cap and disk."""
    disk = "" if row["disk"] == "free" else f", disk at {row['disk']} MB/s"
    return f"{row['model']}, {format_bytes(row['cap_bytes'])}{disk}"


def batch_table(rows: list[Row]) -> list[str]:
    """A file of sentences: `hermes run --input` inside a budget beside the same with everything resident."""
    rows = [row for row in rows if "outputs" in row]
    if not rows:
        return []
    lines = [
        "## A file of sentences",
        "",
        "`python benchmarks/batch.py`: sentences of Python's language reference, 3 to 100 words, embedded by `hermes "
        "run --input`, in a memory cgroup of the budget; *resident* is the same command with `--resident`, uncapped. "
        "The budget is a third of the resident process's peak, or the smallest that works where that is more. Seconds "
        "are of the sweeps; the model is read in both cases before. Outputs differ by rounding where the budget made "
        "batches smaller: kernels round by the number of rows.",
        "",
        "| model | sentences | tokens | budget | of resident memory | peak | resident, tokens/s | streamed, tokens/s "
        "| of resident throughput | outputs | source |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        resident, streamed = median(row["resident"], "seconds"), median(row["streamed"], "seconds")
        run = row["streamed"][0]
        lines.append(
            f"| {row['model']} | {run['records']} | {run['tokens']} | {format_bytes(run['budget_bytes'])} "
            f"| {run['budget_bytes'] / median(row['resident'], 'peak_bytes'):.2f} "
            f"| {format_bytes(int(median(row['streamed'], 'peak_bytes')))} | {run['tokens'] / resident:.0f} "
            f"| {run['tokens'] / streamed:.0f} | {resident / streamed:.2f} | {row['outputs']} "
            f"| {row['taken']['commit']} |"
        )
    return [*lines, ""]


WITHIN = {"seconds": 0.10, "peak_bytes": 0.05}
"""How far what happens may be from what was predicted."""


def predictions_tables(rows: list[Row]) -> list[str]:
    """What the planner said, and what came; its choice among all plans."""
    grid = [row for row in rows if row["kind"] == "grid"]
    choices = [row for row in rows if row["kind"] == "choice"]
    lines = []
    if grid:
        errors = {field: sorted(abs(error(row, field)) for row in grid) for field in ("seconds", "peak_bytes")}
        shares = [
            f"{field.partition('_')[0]} within {WITHIN[field]:.0%} in {sum(e <= WITHIN[field] for e in found)} of "
            f"{len(grid)} rows (median {found[len(grid) // 2]:.1%}, worst {found[-1]:.1%})"
            for field, found in errors.items()
        ]
        lines += [
            "## What was predicted, and what came",
            "",
            f"`python benchmarks/predictions.py`: a capped process for each row. {'; '.join(shares)}.",
            "",
            "| model | budget | disk | seconds | predicted | off by | peak | predicted | off by | plan |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in grid:
            measured, said = row["measured"], row["predicted"]
            disk = "as it is" if row["disk"] == "free" else f"{row['disk']} MB/s"
            lines.append(
                f"| {row['model']} | {row['budget']} | {disk} | {measured['seconds']:.2f} | {said['seconds']:.2f} "
                f"| {error(row, 'seconds'):+.0%} | {format_bytes(int(measured['peak_bytes']))} "
                f"| {format_bytes(int(said['peak_bytes']))} | {error(row, 'peak_bytes'):+.1%} | {row['plan']} |"
            )
        lines.append("")
    if choices:
        lines += [
            "Every plan that the search could make (granularity x agents x window) was run once; the chosen one and "
            "the three fastest then in turns, three times each. *Slower by*: the planner's choice against the fastest "
            "of those medians.",
            "",
            "| model | budget | plans tried | chosen | s | fastest | s | slower by |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in choices:
            chosen, best = row["finalists"][0], min(row["finalists"], key=lambda plan: plan["seconds"])
            lines.append(
                f"| {row['model']} | {row['budget']} | {len(row['tried'])} "
                f"| {chosen['plan']} | {chosen['seconds']:.2f} | {best['plan']} | {best['seconds']:.2f} "
                f"| {chosen['seconds'] / best['seconds'] - 1:+.1%} |"
            )
        lines.append("")
    return lines


def of_best(row: Row) -> float:
    """Speed of the planner's choice, as a share of the fastest finalist's."""
    return min(plan["seconds"] for plan in row["finalists"]) / row["finalists"][0]["seconds"]


def error(row: Row, field: str) -> float:
    """Measured against predicted."""
    return row["measured"][field] / row["predicted"][field] - 1


README = """\
| model | budget | peak | same bits | seconds a pass | GB read a pass | of bound | all resident: s a pass, peak |
|---|---|---|---|---|---|---|---|"""
"""The README's table: Hermes where its weights stream, the disk as it is, beside plain transformers."""


def readme_table(rows: Rows) -> str:
    """One line for each budget, and the resident passes that outputs are compared with."""
    lines = [README]
    for model in MODELS:
        whole = rows.one(model=model, peer="baseline", cap="100", disk="free")
        for row in rows.where(model=model, peer="hermes", disk="free"):
            if whole is None or row["cap"] == "100" or (share := of_bound(row)) is None:
                continue
            same = {run["digest"] for run in row["runs"]} == {whole["runs"][0]["digest"]}
            peak, whole_peak = (format_bytes(int(median(r["runs"], "peak_bytes"))) for r in (row, whole))
            seconds, whole_seconds = (median(r["runs"], "steady_seconds") for r in (row, whole))
            gigabytes = median(row["runs"], "steady_bytes") / 1e9
            lines.append(
                f"| {model} | {format_bytes(row['cap_bytes'])} | {peak} | {'yes' if same else 'no'} | {seconds:.2f} "
                f"| {gigabytes:.2f} | {share:.2f} | {whole_seconds:.2f}, {whole_peak} |"
            )
    return "\n".join(lines)


def write_readme(rows: Rows) -> None:
    """The table, between its marks."""
    path = ROOT / "README.md"
    before, begin, rest = path.read_text().partition("<!-- results:begin -->")
    _, end, after = rest.partition("<!-- results:end -->")
    path.write_text(f"{before}{begin}\n{readme_table(rows)}\n{end}{after}")


def write() -> None:
    """docs/results.md, docs/results-MODEL.svg, docs/timeline.svg, and the README's table."""
    rows = Rows(stored("results"))
    last = max((row["taken"] for row in rows.rows), key=lambda taken: taken["date"], default=None)
    text = ["# Hermes beside its peers", ""]
    if last is not None:
        text += [
            f"Made by `python benchmarks/suite.py`, last on {last['date']} (UTC): {last['cpu']}, {last['cores']} "
            "cores. Every run is a process of its own in a memory cgroup of the cap, swap off, all files evicted. "
            "Encoders: 128 tokens or one 224x224 image, five passes; decoders: 16 tokens of prompt, 8 more."
            + other_processors(rows, last["cpu"]),
            "",
        ]
    text += [
        "*First output*: from the start of loading (packages imported) to the first output. *Steady pass*: the median "
        "of later passes (for decoders, seconds a token). Medians over samples, taken in turns. *Of bound*: "
        "max(bytes streamed / the best direct-read rate that fio or Hermes's own reader reached then, a resident pass "
        "of Hermes in a process right behind it) over the steady pass, run by run. *Source*: the last commit that "
        "changed src/ when the row was taken. The raw samples, with bytes read and page faults, are in results.json.",
        "",
        *targets(rows, stored("batch"), stored("predictions"), stored("commands")),
    ]
    for model in MODELS:
        if chosen := [row for row in rows.rows if row["model"] == model]:
            text += [f"## {model}, {format_bytes(chosen[0]['weight_bytes'])} of weights", ""]
            if figures.latency([row for row in chosen if not failed(row)], DOCS / f"results-{model}.svg", model):
                text += [f"![latency against budget and disk](results-{model}.svg)", ""]
            text += [*table(rows, model), ""]
    if (DOCS / "timeline.svg").exists():
        text += [
            "## The agents at work",
            "",
            "gpt2-medium in 600 MiB, from `hermes run --trace`: a bar is a read, or a block's computation.",
            "",
            "![timeline of the agents](timeline.svg)",
            "",
        ]
    write_readme(rows)
    text += commands_tables(stored("commands"), rows)
    text += [*batch_table(stored("batch")), *predictions_tables(stored("predictions")), *paper_tables(rows)]
    Path(DOCS / "results.md").write_text("\n".join(text))
