"""The suite's rows, to be asked: which there are, their medians, ratios of medians, and the bound of a pass."""

import itertools
import json
import statistics

from conditions import DISKS, DOCS, MODELS, median

Row = dict


def stored(name: str) -> list[Row]:
    """The rows of docs/NAME.json."""
    path = DOCS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def keep(name: str, new: list[Row], *, keys: tuple[str, ...]) -> None:
    """Write docs/NAME.json with these rows in the place of those that have the same under `keys`.

    And of those of other processors that they would stand beside: ratios are of one machine.
    """
    replaced = {tuple(row[key] for key in keys) for row in new}
    cpus = {_beside(row): row["taken"]["cpu"] for row in new}
    rows = [
        row
        for row in stored(name)
        if tuple(row[key] for key in keys) not in replaced
        and row["taken"]["cpu"] == cpus.get(_beside(row), row["taken"]["cpu"])
    ] + new
    rows.sort(key=_place)
    (DOCS / f"{name}.json").write_text(json.dumps({"rows": rows}, indent=1))


def _beside(row: Row) -> tuple[object, ...]:
    return row.get("kind"), row["model"], row.get("disk")


def _place(row: Row) -> tuple[object, ...]:
    """In the order of the lists of models and disks; rows of one place stay as they came."""
    model, disk = row["model"], row.get("disk", "free")
    return row.get("kind", ""), model not in MODELS, model in MODELS and MODELS.index(model), DISKS.index(disk)


def failed(row: Row) -> str | None:
    """Why there are no figures."""
    return next((run["error"] for run in row["runs"] if "error" in run), None)


class Rows:
    """Rows of the suite, to be asked."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def where(self, **wanted: str) -> list[Row]:
        """Those with figures and these fields, smallest cap first."""
        chosen = (r for r in self.rows if all(r[key] == value for key, value in wanted.items()) and not failed(r))
        return sorted(chosen, key=lambda row: row["cap_bytes"])

    def one(self, **wanted: str) -> Row | None:
        """The one with the largest cap."""
        return (self.where(**wanted) or [None])[-1]

    def resident_seconds(self, model: str) -> float | None:
        """Of a fully resident pass, over all yardsticks of this model."""
        runs = itertools.chain.from_iterable(row["runs"] for row in self.where(model=model))
        found = [run["resident_seconds"] for run in runs if "resident_seconds" in run]
        return statistics.median(found) if found else None


def has(row: Row, field: str) -> bool:
    """Whether every run has it."""
    return all(field in run for run in row["runs"])


def bound_seconds(run: dict, nbytes: float) -> float:
    """Of a pass that reads so much: the longer of that and resident computing, as if neither slowed the other.

    Both as they were found beside this run.
    """
    return max(nbytes / run["disk_rate"], run["resident_seconds"])


def of_bound(row: Row) -> float | None:
    """Share of its bound that the steady pass reached: the median of the runs' own; None without yardsticks."""
    if not has(row, "resident_seconds"):
        return None
    return statistics.median(bound_seconds(run, run["steady_bytes"]) / run["steady_seconds"] for run in row["runs"])


def possible_of_bound(row: Row) -> float | None:
    """The share that a resident pass reaches while the same bytes are read beside it, which slows both."""
    if not has(row, "beside_seconds"):
        return None
    return statistics.median(
        min(1.0, bound_seconds(run, run["steady_bytes"]) / run["beside_seconds"]) for run in row["runs"]
    )


def above_floor(row: Row) -> float:
    """Bytes at the peak, less what the process held before any weight."""
    return median(row["runs"], "peak_bytes") - median(row["runs"], "floor_bytes")


def ratio(theirs: Row, ours: Row, field: str) -> float:
    """Of medians."""
    return median(theirs["runs"], field) / median(ours["runs"], field)


def rate(row: Row) -> float:
    """The disk's, in bytes a second, over the row's samples."""
    return statistics.median(row["disk_rates"])


def first_seconds(row: Row) -> float:
    """From the start of loading to the first output."""
    return median(row["runs"], "first_seconds")


def cold_pass(row: Row) -> float:
    """Seconds of the first pass, when the modules are built: weights are read while it runs."""
    return sorted(run["pass_seconds"][0] for run in row["runs"])[len(row["runs"]) // 2]


def steady_seconds(row: Row) -> float:
    """Of a later pass."""
    return median(row["runs"], "steady_seconds")
