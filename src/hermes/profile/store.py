"""Profiles as JSON files, one for each model and dtype; one of other files or another machine is refused."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path

import msgspec

from hermes.errors import ProfileError
from hermes.profile.records import PROFILE_VERSION, MachineRecord, Profile

__all__ = ["latest_profile", "load_profile", "profile_path", "save_profile"]


def profile_path(model: Path, model_class: str, dtype: str) -> Path:
    """Where `hermes profile` keeps the profile of a model: under $XDG_CACHE_HOME, or ~/.cache."""
    key = hashlib.sha256(f"{model.resolve()}|{model_class}|{dtype}".encode()).hexdigest()[:16]
    return _directory() / f"{model.resolve().name}-{key}.json"


def latest_profile(model: Path) -> Profile | None:
    """The last that was stored of a model of this name, for whichever class and dtype; nobody asks if it is valid."""
    name = model.resolve().name
    some = (path for path in _directory().glob("*.json") if path.stem.rpartition("-")[0] == name)
    with contextlib.suppress(OSError, ValueError):
        if path := max(some, key=lambda path: path.stat().st_mtime_ns, default=None):
            profile = _decode(path.read_bytes())
            return profile if profile.version == PROFILE_VERSION else None
    return None


def save_profile(profile: Profile, path: Path) -> None:
    """Write atomically; the directory is made."""
    fields = {field.name: getattr(profile, field.name) for field in dataclasses.fields(profile) if field.init}
    text = json.dumps(fields, default=_plain, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)


def load_profile(path: Path, *, checkpoint: str, machine: MachineRecord, model_class: str, dtype: str) -> Profile:
    """Read a profile that must be of this checkpoint, machine and dtype.

    Raises ProfileError where it is stale, of another version, or makes no sense.
    """
    again = "run `hermes profile` again"
    try:
        profile = _decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: not a profile: {error}; {again}") from None
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read: {error.strerror}; {again}") from None
    if profile.version != PROFILE_VERSION:
        raise ProfileError(f"{path}: profile version {profile.version}, this Hermes writes {PROFILE_VERSION}; {again}")
    if (problem := _nonsense(profile)) is not None:
        raise ProfileError(f"{path}: makes no sense: {problem}; {again}")
    if profile.checkpoint != checkpoint:
        raise ProfileError(f"{path}: stale, the checkpoint's files have changed since; {again}")
    for what, was, now in (("model class", profile.model_class, model_class), ("dtype", profile.dtype, dtype)):
        if was != now:
            raise ProfileError(f"{path}: is for {what} {was}, not {now}; {again}")
    for field in dataclasses.fields(MachineRecord):
        was, now = getattr(profile.machine, field.name), getattr(machine, field.name)
        if was != now:
            raise ProfileError(f"{path}: from another machine: {field.name} was {was}, is {now}; {again}")
    return profile


def _directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hermes" / "profiles"


@functools.lru_cache(maxsize=1)
def _decode(content: bytes) -> Profile:
    return msgspec.json.decode(content, type=Profile)


def _nonsense(profile: Profile) -> str | None:
    if not profile.units or not profile.bandwidths:
        return "no units or no bandwidths"
    if profile.batch_size < 1 or profile.sequence_length < 1 or profile.floor_bytes < 0:
        return "batch, sequence or floor is negative"
    if not all(0 <= seconds < 1e-6 for seconds in profile.touch_seconds_per_byte):
        return f"{max(profile.touch_seconds_per_byte)} seconds to touch a byte"
    for what, rate, most in (
        ("bytes a second unpacked", profile.unpack_bytes_per_second, 1e13),
        ("bytes a second streamed", profile.streaming_bytes_per_second, 1e13),
        ("operations a second", profile.speed, 1e18),
        ("seconds longer when cold", profile.cold_seconds, 1e6),
        ("seconds between blocks", profile.boundary_seconds, 1e6),
        ("refaults a second", profile.refaults_per_second, 1e9),
    ):
        if not 0 <= rate < most:
            return f"{rate} {what}"
    sizes = [nbytes for nbytes, _ in profile.windows]
    if sizes != sorted(set(sizes)) or not all(nbytes >= 1 and 0 < share < 1e3 for nbytes, share in profile.windows):
        return f"windows {profile.windows}"
    if not all(tokens >= 1 and 0 < share <= 1 for tokens, share in profile.quiet):
        return f"quiet {profile.quiet}"
    for bandwidth in profile.bandwidths:
        if bandwidth.num_agents < 1 or bandwidth.piece_bytes < 1 or not 0 < bandwidth.bytes_per_second < 1e13:
            return f"bandwidth {bandwidth}"
    for unit in profile.units:
        seconds = [*unit.load_seconds.values(), *(seconds for _, seconds in unit.compute.samples)]
        tokens = [tokens for tokens, _ in unit.compute.samples]
        if unit.nbytes < 0 or not unit.compute.samples or min(tokens) < 1 or len(set(tokens)) < len(tokens):
            return f"unit {unit.name}"
        if not all(math.isfinite(value) and value >= 0 for value in seconds):
            return f"unit {unit.name}: seconds are negative or not finite"
    return None


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(type(value).__name__)
