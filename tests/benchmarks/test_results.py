"""What docs/results.md makes of rows: ratios, shares of bounds, failures shown. No run, no model."""

import importlib
import sys
from pathlib import Path

import pytest

MIB = 2**20
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def results():
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("results")
    finally:
        sys.path[:] = before


def row(peer, cap, *, first=4.0, steady=1.0, peak=500, floor=200, disk="free", model="bert-large", **run):
    run = {
        "first_seconds": first,
        "steady_seconds": steady,
        "peak_bytes": peak * MIB,
        "floor_bytes": floor * MIB,
        "pass_seconds": [first - 1.0, steady],
        **run,
    }
    return {
        "model": model,
        "cap": cap,
        "disk": disk,
        "peer": peer,
        "cap_bytes": 10 * MIB * int(cap),
        "weight_bytes": 1000 * MIB,
        "disk_rates": [2e9],
        "taken": {"commit": "abc1234", "date": "2026-01-01"},
        "runs": [run],
    }


def test_the_bound_is_the_disk_or_the_resident_pass_beside_the_same_run(results):
    disk_bound = {"steady_seconds": 1.0, "steady_bytes": 1.8e9, "disk_rate": 2e9, "resident_seconds": 0.4}
    compute_bound = {"steady_seconds": 0.5, "steady_bytes": 0.2e9, "disk_rate": 2e9, "resident_seconds": 0.4}
    slow_disk = disk_bound | {"disk_rate": 1.8e9}
    assert results.of_bound({"runs": [disk_bound]}) == pytest.approx(0.9)
    assert results.of_bound({"runs": [disk_bound, compute_bound, slow_disk]}) == pytest.approx(0.9)
    assert results.of_bound(row("hermes", "75", steady_bytes=1e9)) is None  # no yardstick beside it


def test_a_headline_counts_memory_above_each_floor_and_takes_the_fastest_that_saves_enough(results):
    # 100 MiB above its floor: 92 % less.
    small = row("hermes", "10", first=2.0, peak=330, floor=230, disk_rate=2e9, resident_seconds=0.8)
    large = row("hermes", "50", first=1.5, peak=900, floor=230)
    theirs = row("pipeswitch-torch", "100", first=9.0, peak=1650, floor=400)  # 1250 MiB
    rows = results.Rows([small, large, theirs])
    first, cold = results.headlines(rows)
    assert first == ("bert-large", "first output", pytest.approx(4.5), pytest.approx(1 - 100 / 1250), None, small)
    assert cold[1:3] == ("cold pass", pytest.approx(8.0))
    assert cold[4] == pytest.approx(10.0)  # 8 s against 0.8 s of resident computing: reading 1000 MiB takes less


def test_a_token_with_nothing_kept_is_compared_with_a_cold_pass(results):
    theirs = row("pipeswitch-torch", "100", model="gpt2-medium", first=3.0, steady=0.1)
    ours = row("hermes-nothing-resident", "10", model="gpt2-medium", steady=0.5)
    *_, (_, what, speed, _, _, _) = results.headlines(results.Rows([theirs, ours]))
    assert (what, speed) == ("a token with nothing kept", pytest.approx(4.0))


def test_a_failed_row_is_shown_with_its_reason(results):
    killed = row("baseline", "25") | {"runs": [{"error": "killed: out of memory"}]}
    rows = results.Rows([killed, row("hermes", "25", steady_bytes=1e9, digest="a")])
    assert any("killed: out of memory" in line for line in results.table(rows, "bert-large"))
    assert rows.one(peer="baseline") is None


def test_a_target_that_is_missed_says_so(results):
    rows = results.Rows([row("hermes", "25", steady_bytes=1e9), row("accelerate", "25", steady=2.0)])
    lines = results.targets(rows, [], [], [])
    assert any("forward, accelerate" in line and "2.00x | 2.50x | missed" in line for line in lines)


def test_predictions_count_the_rows_within_reach(results):
    def grid(predicted):
        return {
            "kind": "grid",
            "model": "bert-large",
            "budget": "600MiB",
            "disk": "free",
            "plan": "leaf",
            "measured": {"seconds": 1.0, "peak_bytes": 500 * MIB},
            "predicted": {"seconds": predicted, "peak_bytes": 510 * MIB},
        }

    text = "\n".join(results.predictions_tables([grid(0.95), grid(0.5)]))
    assert "seconds within 10% in 1 of 2 rows" in text
    assert "peak within 5% in 2 of 2 rows" in text


def test_what_is_possible_is_a_resident_pass_beside_the_same_reads(results):
    run = {"steady_seconds": 1.3, "steady_bytes": 2e9, "disk_rate": 2e9, "resident_seconds": 0.4}
    assert results.possible_of_bound({"runs": [run | {"beside_seconds": 1.25}]}) == pytest.approx(0.8)
    assert results.possible_of_bound({"runs": [run | {"beside_seconds": 0.9}]}) == 1.0  # the disk's rate is a sample
    assert results.possible_of_bound({"runs": [run]}) is None


def test_a_command_is_compared_with_importing_and_the_bound_of_a_pass(results):
    shell = {
        "kind": "shell", "model": "bert-large", "budget": "600MiB", "disk_rates": [2e9],
        "runs": {"run": [4.0, 6.0, 5.0], "packages": [2.0, 2.0, 2.0], "classes": [4.0, 4.0, 4.0]},
    }  # fmt: skip
    drafted = {
        text: {
            way: [{"seconds": seconds, "passes": 4, "tokens": [1, 2]}]
            for way, seconds in (("plain", 2.0), ("draft", s))
        }
        for text, s in (("does not repeat", 2.0), ("repeats", 0.5))
    }
    draft = {"kind": "draft", "model": "gpt2-medium", "budget": "1GiB",
             "runs": {"sweeps": {"1": [1.0], "8": [1.1]}, **drafted}}  # fmt: skip
    rows = results.Rows([row("hermes", "100", resident_seconds=1.0, steady_bytes=0, disk_rate=2e9)])
    text = "\n".join(results.targets(rows, [], [], [shell, draft]))
    assert "importing (packages) and the bound, of hermes run | bert-large, 600MiB | 0.60 | 0.80 | missed" in text
    assert "importing (classes) and the bound, of hermes run | bert-large, 600MiB | 1.00 | 0.80 | met" in text
    assert "a sweep over 1 token, of one over 8 | gpt2-medium, 1GiB | 0.91 | 0.87 | met" in text
    text = "\n".join(importlib.import_module("commands_table").commands_tables([shell, draft], rows))
    assert "| 2.0 s, 4 sweeps | 2.0 s, 4 sweeps | 2.0 s, 4 sweeps | 0.5 s, 4 sweeps | yes |" in text
