"""FLEET.toml: which models share a budget, and what is asked of them. Read and checked before torch is imported."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hermes.errors import InputError
from hermes.units import parse_bytes

__all__ = ["FleetFile", "ModelEntry", "read_fleet_file"]


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One table [models.NAME].

    Attributes:
        model: a directory in Hugging Face layout, or a Hub id; or
        module, weights: "FILE.py:NAME" of a class or function that makes a module, and its state-dict file.
        shape: of one input of a module, filled with seeded random numbers in [0, 1); or
        inputs: a safetensors file, each tensor of which is one input, taken in the order of their names.
        requests: how many; inputs are taken again from the first.
        rate: of them in a second; None: the next when the last is answered.
        importance, deadline: as in `Fleet.add`; seconds.
        batch, seq: of a transformers model.
    """

    model: str | None = None
    module: str | None = None
    weights: Path | None = None
    shape: tuple[int, ...] | None = None
    inputs: Path | None = None
    requests: int = 1
    rate: float | None = None
    importance: float = 1.0
    deadline: float | None = None
    batch: int = 1
    seq: int = 128


@dataclass(frozen=True, kw_only=True)
class FleetFile:
    """The whole file."""

    models: Mapping[str, ModelEntry]
    budget: str | None = None
    policy: str = "auto"
    device: str = "cpu"


_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,), "module": (str,), "weights": (str,), "inputs": (str,), "shape": (list,), "requests": (int,),
    "rate": (int, float), "importance": (int, float), "deadline": (int, float), "batch": (int,), "seq": (int,),
}  # fmt: skip


def read_fleet_file(path: Path) -> FleetFile:
    """Paths in it are relative to it. Raises InputError, naming file and key, and OSError."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    models = content.pop("models", None)
    if not isinstance(models, dict) or not models:
        raise InputError(f"{path}: no models; add a table [models.NAME] for each")
    unknown = sorted(set(content) - {"budget", "policy", "device"})
    if unknown:
        raise InputError(f"{path}: unknown key {unknown[0]}; there are budget, policy, device and [models.NAME]")
    if "budget" in content:
        parse_bytes(content["budget"])
    return FleetFile(models={name: _entry(f"{path}: {name}", table, path.parent) for name, table in models.items()},
                     **content)  # fmt: skip


def _entry(where: str, table: Any, directory: Path) -> ModelEntry:
    if not isinstance(table, dict):
        raise InputError(f"{where}: must be a table, [models.NAME]")
    for key, value in table.items():
        if key not in _KINDS:
            raise InputError(f"{where}: unknown key {key}; there are {', '.join(_KINDS)}")
        if not isinstance(value, _KINDS[key]) or isinstance(value, bool):
            raise InputError(f"{where}: {key} = {value!r} is no {_KINDS[key][-1].__name__}")
        if isinstance(value, int | float) and value <= 0:
            raise InputError(f"{where}: {key} = {value} must be above 0")
    values = dict(table)
    if ("model" in values) == ("module" in values):
        raise InputError(f'{where}: give model = "DIRECTORY", or module = "FILE.py:NAME" and weights = "FILE"')
    if "module" in values:
        if "weights" not in values or ("shape" in values) == ("inputs" in values):
            raise InputError(f"{where}: a module needs weights, and either shape = [1, 3, 224, 224] or inputs")
        if not all(isinstance(n, int) and n > 0 for n in values.get("shape", ())):
            raise InputError(f"{where}: shape = {values['shape']} must be numbers above 0")
        file, colon, name = values["module"].rpartition(":")
        if not colon or not name.isidentifier():
            raise InputError(f'{where}: module = "{values["module"]}" is not of the form FILE.py:NAME')
        values["module"] = f"{directory / file}:{name}"
    elif set(values) & {"weights", "shape", "inputs"}:
        raise InputError(f"{where}: weights, shape and inputs go with a module; a model has its own")
    elif (directory / values["model"]).is_dir():
        values["model"] = str(directory / values["model"])
    values |= {key: directory / values[key] for key in ("weights", "inputs") if key in values}
    if "shape" in values:
        values["shape"] = tuple(values["shape"])
    return ModelEntry(**values)
