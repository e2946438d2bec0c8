"""What docs/results.md says of commands (docs/commands.json): the shell's seconds, and drafts."""

import itertools
import statistics

from conditions import median
from rows import Row, Rows, rate

SHELL_REACH = 1.25
"""Of importing and the bound together."""
TEXTS = ("does not repeat", "repeats")
WAYS = ("plain", "draft")


def shell_bound(row: Row, rows: Rows) -> float:
    """Seconds that a first pass takes at least: all weights from the disk, or resident compute."""
    weights = next(r["weight_bytes"] for r in rows.rows if r["model"] == row["model"])
    return max(weights / rate(row), rows.resident_seconds(row["model"]) or 0.0)


def shell_ratios(row: Row, rows: Rows) -> dict[str, float]:
    """Seconds of the command over those of importing (by what is imported) and the bound: medians over samples."""
    bound = shell_bound(row, rows)
    return {
        what: statistics.median(
            run / (imports + bound) for run, imports in zip(row["runs"]["run"], row["runs"][what], strict=True)
        )
        for what in ("packages", "classes")
    }


def draft_ratios(row: Row) -> dict[str, float]:
    """By name: what a sweep over 8 tokens takes, of one over 1; plain over drafted seconds for each text."""
    runs = row["runs"]
    one, eight = (statistics.median(runs["sweeps"][rows]) for rows in ("1", "8"))
    plain, draft = ({text: median(runs[text][way], "seconds") for text in TEXTS} for way in WAYS)
    return {"sweep": eight / one} | {text: plain[text] / draft[text] for text in TEXTS}


def same_tokens(row: Row) -> bool:
    """Whether every run of each text gave the same."""
    texts = (row["runs"][text] for text in TEXTS)
    return all(len({tuple(run["tokens"]) for way in text.values() for run in way}) == 1 for text in texts)


def commands_tables(commands: list[Row], rows: Rows) -> list[str]:
    """Both tables."""
    lines: list[str] = []
    for row in (row for row in commands if row["kind"] == "shell"):
        medians = {what: statistics.median(seconds) for what, seconds in row["runs"].items()}
        bound, ratios = shell_bound(row, rows), shell_ratios(row, rows)
        lines += [
            "## From the shell",
            "",
            f"`python benchmarks/commands.py shell`: `hermes run` on {row['model']} at {row['budget']}, one text of "
            "131 tokens, from process start to output, in turns with processes that only import; libraries are evicted "
            f"too. *Of both*: the command's seconds over those of importing and the bound of one pass, {bound:.2f} s.",
            "",
            "| process | seconds | hermes run, of both |",
            "|---|---|---|",
            f"| hermes run | {medians['run']:.2f} | |",
            f"| import torch, transformers | {medians['packages']:.2f} | {ratios['packages']:.2f} |",
            f"| with AutoModel, AutoTokenizer, BertModel | {medians['classes']:.2f} | {ratios['classes']:.2f} |",
            "",
        ]
    if drafts := [row for row in commands if row["kind"] == "draft"]:
        lines += [
            "## Several tokens a sweep",
            "",
            "`python benchmarks/commands.py draft`: `--draft prompt-lookup`, one process, in turns; seconds and sweeps "
            "behind the prompt's own. Prose is gone on with under a penalty on repeating, so that nothing does.",
            "",
            "| model | budget | 8 tokens a sweep, of 1 | does not repeat: plain | draft | repeats: plain | draft "
            "| same tokens |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in drafts:
            cells = []
            for text, way in itertools.product(TEXTS, WAYS):
                runs = row["runs"][text][way]
                cells.append(f"{median(runs, 'seconds'):.1f} s, {runs[0]['passes']} sweeps")
            lines.append(
                f"| {row['model']} | {row['budget']} | {draft_ratios(row)['sweep']:.2f} | {' | '.join(cells)} "
                f"| {'yes' if same_tokens(row) else 'no'} |"
            )
        lines.append("")
    return lines
