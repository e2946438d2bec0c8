"""The budget is real: a model of 1.4 GB in a memory cgroup of less than half of that, leaving nothing behind."""

import ctypes
import json
import mmap
import os
import sys
from pathlib import Path

import pytest

from capped import requires_cgroup, run_capped
from hermes.checkpoint.synth import synth
from hermes.units import parse_bytes

BUDGET = "560MiB"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model() -> Path:
    """GPT-2 medium, made once."""
    return synth("gpt2-medium", ROOT / "models" / "gpt2-medium")


def run(model: Path, budget: str, home: Path, limit: str | None = None):
    return run_capped(
        [sys.executable, "-m", "hermes", "run", str(model), "--budget", budget, "--prompt", "Once upon a time",
         "--max-new-tokens", "4", "--json"],
        limit_bytes=parse_bytes(limit or budget),
        env={**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home)},
        cwd=home,
    )  # fmt: skip


def cached_pages(path: Path) -> int:
    """Pages of a file in the page cache."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    nbytes = path.stat().st_size
    vector = (ctypes.c_ubyte * (-(-nbytes // mmap.PAGESIZE)))()
    with path.open("rb") as file:
        base = ctypes.c_void_p(libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0))
        assert libc.mincore(base, ctypes.c_size_t(nbytes), vector) == 0
        libc.munmap(base, ctypes.c_size_t(nbytes))
    return sum(byte & 1 for byte in vector)


@pytest.mark.cgroup
@requires_cgroup
def test_a_run_stays_inside_its_budget_and_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    before = cached_pages(model / "model.safetensors")
    done = run(model, BUDGET, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.oom_kills == 0
    result = json.loads(done.stdout)
    assert result["peak_bytes"] <= parse_bytes(BUDGET)
    assert result["peak_bytes"] <= 1.1 * result["predicted_peak_bytes"]  # less, where the Daemon Agent gave some back
    assert result["bytes_read"] > 3 * 10**9  # every pass streamed most of the weights
    # torch makes an empty folder for a compiler that is never used.
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    # Pages of the header were read through the cache; the weights were not.
    assert cached_pages(model / "model.safetensors") <= before + 64


@pytest.mark.cgroup
@requires_cgroup
def test_a_cgroup_tighter_than_the_budget_holds(model: Path, tmp_path: Path) -> None:
    done = run_capped(
        [sys.executable, "-m", "hermes", "run", str(model), "--budget", "2GiB", "--prompt", "Once upon a time",
         "--max-new-tokens", "2", "--json"],
        limit_bytes=parse_bytes(BUDGET),
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.oom_kills == 0
    assert json.loads(done.stdout)["peak_bytes"] <= parse_bytes(BUDGET)


@pytest.mark.cgroup
@requires_cgroup
def test_a_cgroup_too_small_for_torch_is_said_and_not_killed(model: Path, tmp_path: Path) -> None:
    done = run(model, "600MiB", tmp_path, limit="200MiB")
    assert (done.returncode, done.oom_kills) == (2, 0)
    (line,) = done.stderr.splitlines()
    assert "limit of 200 MiB is below" in line


@pytest.mark.cgroup
@requires_cgroup
def test_too_small_a_budget_names_one_that_works(model: Path, tmp_path: Path) -> None:
    done = run(model, "300MiB", tmp_path, limit="700MiB")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    smallest = line.rpartition("--budget ")[2]
    assert parse_bytes(smallest) > parse_bytes("300MiB")
    again = run(model, smallest, tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["peak_bytes"] <= parse_bytes(smallest)
