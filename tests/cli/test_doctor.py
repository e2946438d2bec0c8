"""`hermes doctor`: with and without a model, and nothing left behind."""

import json

import pytest

from hermes.checkpoint.synth import synth
from hermes.cli import doctor as module
from hermes.cli.doctor import doctor, instruction_sets
from hermes.errors import CheckpointError, HermesError, InputError

FLOOR = {
    "anon_bytes": 200 << 20, "file_bytes": 90 << 20, "shmem_bytes": 0, "torch": "2.13.0", "threads": 2,
    "devices": ["cuda:0 (a GPU): 9 GiB free, its own"],
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """A small sample, and a floor that costs no second process."""
    monkeypatch.setattr(module, "SAMPLE_BYTES", 16 << 20)
    monkeypatch.setattr(module, "_floor", lambda: dict(FLOOR))


def test_without_a_model(small, tmp_path, capsys):
    doctor(path=tmp_path)
    shown = capsys.readouterr().out
    for word in (
        "cores",
        "instruction sets",
        "2.13.0, 2 threads",
        "cgroup",
        "direct I/O",
        "1: ",
        "290 MiB",
        "(a GPU): 9 GiB",
    ):
        assert word in shown
    assert list(tmp_path.iterdir()) == []


def test_json_with_a_model(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = synth("tiny-bert", tmp_path / "model")
    before = sorted(model.iterdir())
    doctor(str(model), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == found["path"] == str(model)
    assert found["floor_bytes"] == 290 << 20
    assert found["smallest_budget_bytes"] > found["floor_bytes"]
    assert all(rate > 0 for rate in found["bytes_per_second"].values())
    assert sorted(model.iterdir()) == before


def test_the_floor_is_that_of_a_run():
    floor = module._floor()
    # A run imports no compiler and gives back what only loading needed: 210-230 MiB with this torch; 350 without.
    assert 50 << 20 < sum(floor[name] for name in ("anon_bytes", "file_bytes", "shmem_bytes")) < 260 << 20
    assert floor["threads"] >= 1


def test_a_floor_that_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(module, "_FLOOR_SCRIPT", "raise SystemExit('no torch here')")
    with pytest.raises(HermesError, match="no torch here"):
        module._floor()


def test_a_directory_that_cannot_be_written(small, tmp_path):
    with pytest.raises(InputError, match="--path"):
        doctor(path=tmp_path / "missing")


def test_a_model_that_is_not_there(small):
    with pytest.raises(CheckpointError, match="no such file"):
        doctor("/no/such/model")


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        (
            "processor : 0\nflags\t\t: fpu sse avx2 avx avx512f amx_bf16 amx_tile lm\nprocessor : 1\nflags : none\n",
            ("amx_bf16", "amx_tile", "avx", "avx2", "avx512f"),
        ),
        ("processor\t: 0\nFeatures\t: fp asimd crc32 sve bf16\n", ("asimd", "bf16", "sve")),
        ("", ()),
    ],
)
def test_instruction_sets(cpuinfo, found):
    assert instruction_sets(cpuinfo) == found
