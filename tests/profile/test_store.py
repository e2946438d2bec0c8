"""A stored profile is used as it was written, or refused with a line that says why."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from hermes.errors import ProfileError
from hermes.profile import (
    PROFILE_VERSION,
    BandwidthRecord,
    ComputeRecord,
    MachineRecord,
    Profile,
    UnitRecord,
    latest_profile,
    load_profile,
    profile_path,
    save_profile,
)

MACHINE = MachineRecord(
    cpu="c", num_cores=2, num_threads=2, memory_bytes=1, torch="2", transformers="5", file_system="1"
)
PROFILE = Profile(
    checkpoint="abc",
    machine=MACHINE,
    model_class="M",
    dtype="float32",
    batch_size=1,
    sequence_length=16,
    floor_bytes=5,
    bandwidths=(BandwidthRecord(num_agents=2, piece_bytes=8, bytes_per_second=1e9),),
    units=(
        UnitRecord(
            name="a",
            block="a",
            nbytes=10,
            flops=3,
            activation_bytes=4,
            load_seconds={1: 0.5, 4: 0.25},
            compute=ComputeRecord(samples=((1, 0.1), (16, 0.4))),
        ),
    ),
)
RIGHT = {"checkpoint": "abc", "machine": MACHINE, "model_class": "M", "dtype": "float32"}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "profile.json"
    save_profile(PROFILE, path)
    return path


def test_comes_back_as_it_was(stored: Path) -> None:
    assert load_profile(stored, **RIGHT) == PROFILE
    assert [path.name for path in stored.parent.iterdir()] == ["profile.json"]


def test_the_latest_is_found_whatever_it_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tmp_path / "model"
    assert latest_profile(model) is None
    for number, dtype in enumerate(("float32", "bfloat16")):
        path = profile_path(model, "M", dtype)
        save_profile(replace(PROFILE, dtype=dtype), path)
        os.utime(path, (number, number))
    for other in ("other", "model-large"):
        save_profile(replace(PROFILE, dtype="float16"), profile_path(tmp_path / other, "M", "float16"))
    latest = latest_profile(model)
    assert latest is not None
    assert latest.dtype == "bfloat16"
    path.write_text("{")
    assert latest_profile(model) is None
    save_profile(replace(PROFILE, version=PROFILE_VERSION - 1), path)
    assert latest_profile(model) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"checkpoint": "xyz"}, "stale"),
        ({"machine": replace(MACHINE, num_cores=4)}, "num_cores was 2, is 4"),
        ({"model_class": "N"}, "model class M, not N"),
        ({"dtype": "bfloat16"}, "float32, not bfloat16"),
    ],
)
def test_of_something_else(stored: Path, wrong: dict, message: str) -> None:
    with pytest.raises(ProfileError, match=message) as refusal:
        load_profile(stored, **RIGHT | wrong)
    assert "run `hermes profile` again" in str(refusal.value)


def edit(path: Path, *keys, value) -> None:
    document = json.loads(path.read_text())
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("version",), PROFILE_VERSION + 1),
        (("bandwidths", 0, "bytes_per_second"), -1.0),
        (("bandwidths",), []),
        (("units",), []),
        (("units", 0, "compute", "samples"), [[1, -3.0]]),
        (("units", 0, "compute", "samples"), [[1, 0.1], [1, 0.2]]),
        (("units", 0, "load_seconds"), {"1": "NaN"}),
        (("units", 0, "nbytes"), "many"),
        (("touch_seconds_per_byte",), [7.0]),
        (("windows",), [[1, 0.0]]),
        (("windows",), [[2, 1.0], [1, 0.5]]),
        (("windows",), [[1, 0.5], [1, 1.0]]),
        (("windows",), [[0, 1.0]]),
        (("streaming_bytes_per_second",), -1.0),
        (("unpack_bytes_per_second",), -1.0),
        (("boundary_seconds",), -1.0),
        (("cold_seconds",), -1.0),
        (("refaults_per_second",), -1.0),
        (("speed",), -1.0),
        (("machine",), None),
        (("batch_size",), 0),
    ],
)
def test_edited_into_nonsense(stored: Path, keys: tuple, value) -> None:
    edit(stored, *keys, value=value)
    with pytest.raises(ProfileError, match="again"):
        load_profile(stored, **RIGHT)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"version": 1}'])
def test_not_a_profile(stored: Path, content: bytes) -> None:
    stored.write_bytes(content)
    with pytest.raises(ProfileError, match="again"):
        load_profile(stored, **RIGHT)
    stored.unlink()
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile(stored, **RIGHT)


def test_paths_differ_by_model_class_and_dtype(tmp_path: Path) -> None:
    paths = {profile_path(tmp_path / m, c, d) for m in "ab" for c in ("X", "Y") for d in ("float32", "bfloat16")}
    assert len(paths) == 8


def test_seconds_between_and_beyond_what_was_measured() -> None:
    compute = ComputeRecord(samples=((1, 0.1), (11, 0.2)))
    assert compute.seconds(1) == pytest.approx(0.1)
    assert compute.seconds(6) == pytest.approx(0.15)
    assert compute.seconds(21) == pytest.approx(0.3)
    assert ComputeRecord(samples=((10, 0.2),)).seconds(30) == pytest.approx(0.6)
    assert ComputeRecord(samples=((10, 0.2),)).seconds(1) == pytest.approx(0.2)
    # A unit that measured faster on more tokens (noise) never goes below zero, nor gets faster still.
    assert ComputeRecord(samples=((1, 0.2), (10, 0.1))).seconds(1000) == pytest.approx(0.1)


def test_a_unit_never_measured() -> None:
    with pytest.raises(ProfileError, match="knows no unit b"):
        PROFILE.compute_of("b")
