"""The suite's rows, to be asked: which there are, their medians, ratios of medians, and the bound of a pass."""

import json
import statistics

from conditions import DOCS, median

Row = dict


def stored(name: str) -> list[Row]:
    """The rows of docs/NAME.json."""
    path = DOCS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


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

    def compute_seconds(self, model: str) -> float | None:
        """Of a fully resident steady pass; None where none was measured."""
        row = self.one(model=model, peer="baseline", cap="100", disk="free")
        return median(row["runs"], "steady_seconds") if row else None

    def of_bound(self, row: Row) -> float | None:
        """Share of max(bytes streamed / the disk's rate then, resident compute) that the steady pass reached."""
        if "steady_bytes" not in row["runs"][0]:
            return None
        return self.bound_seconds(row, median(row["runs"], "steady_bytes")) / median(row["runs"], "steady_seconds")

    def bound_seconds(self, row: Row, nbytes: float) -> float:
        """Of a pass that reads so much: the longer of that and resident compute, as if neither slowed the other."""
        return max(nbytes / rate(row), self.compute_seconds(row["model"]) or 0.0)

    def possible_of_bound(self, row: Row) -> float | None:
        """Share of the bound that is left where the products of one token take memory from the disk's transfers.

        While they run, which in a resident pass is all the time, the disk gives less; None where that is not measured.
        """
        resident = self.one(model=row["model"], peer="hermes", cap="100", disk="free")
        if not row.get("rates_beside_memory") or resident is None:
            return None
        computing, nbytes = median(resident["runs"], "steady_seconds"), median(row["runs"], "steady_bytes")
        left = nbytes - computing * statistics.median(row["rates_beside_memory"])
        return min(1.0, self.bound_seconds(row, nbytes) / (computing + max(0.0, left) / rate(row)))


def above_floor(row: Row) -> float:
    """Bytes at the peak, less what the process held before any weight."""
    return median(row["runs"], "peak_bytes") - median(row["runs"], "floor_bytes")


def ratio(theirs: Row, ours: Row, field: str) -> float:
    """Of medians."""
    return median(theirs["runs"], field) / median(ours["runs"], field)


def first_seconds(row: Row) -> float:
    """From the start of loading to the first output."""
    return median(row["runs"], "first_seconds")


def cold_pass(row: Row) -> float:
    """Seconds of the first pass, when the modules are built: weights are read while it runs."""
    return sorted(run["pass_seconds"][0] for run in row["runs"])[len(row["runs"]) // 2]


def steady_seconds(row: Row) -> float:
    """Of a later pass."""
    return median(row["runs"], "steady_seconds")


def rate(row: Row) -> float:
    """The disk's, in bytes a second, beside the row's runs."""
    return sorted(row["disk_rates"])[len(row["disk_rates"]) // 2]
