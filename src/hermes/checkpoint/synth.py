"""Makes seeded random checkpoints offline, laid out as on the Hub: the real shapes without the download.

Covers the directory as a whole. Architectures are in `synth_archs`, values and files in `synth_weights`, the tokenizer
in `synth_tokenizer`.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hermes.checkpoint.partial import Progress, add_up
from hermes.checkpoint.synth_archs import ARCHS, Arch
from hermes.checkpoint.synth_tokenizer import tokenizer_files
from hermes.checkpoint.synth_weights import DTYPES, WeightFile, plan_shards, write_shard
from hermes.errors import InputError
from hermes.units import format_bytes

__all__ = ["ARCHS", "STAMP_NAME", "synth"]

#: Says what a directory holds, so that the same request again costs nothing.
STAMP_NAME = "hermes-synth.json"
_VERSION = 1
#: Tokenizer, index and configuration, generously.
_OTHER_BYTES = 16 << 20


def synth(
    arch: str,
    directory: Path,
    *,
    dtype: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write a model directory of random weights and return it; the same arguments give the same bytes.

    Works in a few tens of MiB whatever the model's size. The directory appears whole or not at all. If it already
    holds exactly this request, nothing is written.

    Args:
        arch: a name in ARCHS.
        directory: where to; must not exist, be empty, or hold this same synth.
        dtype: float32, bfloat16 or float16; None for the one the architecture is published in.
        seed: any non-negative number.
        progress: called with (bytes written, bytes in all) of the weights.

    Raises:
        InputError: unknown arch or dtype, a directory in the way, not enough free disk, or a failed write.
    """
    if arch not in ARCHS:
        raise InputError(f"no architecture {arch!r}; choose from {', '.join(ARCHS)}")
    dtype = ARCHS[arch].dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise InputError(f"cannot write dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    if seed < 0:
        raise InputError(f"seed is {seed}; it must be 0 or more")
    stamp = {"arch": arch, "dtype": dtype, "seed": seed, "version": _VERSION}
    directory = directory.expanduser().absolute()
    try:
        if _holds(directory, stamp):
            return directory
        shards = plan_shards(ARCHS[arch].tensors(), dtype)
        _check_free_disk(arch, directory, sum(shard.weight_bytes for shard in shards) + _OTHER_BYTES)
        partial = directory.parent / f".{directory.name}.{os.getpid()}.partial"
        partial.mkdir(parents=True)
        try:
            _write(partial, ARCHS[arch], shards, seed=seed, progress=progress)
            _write_json(partial / STAMP_NAME, stamp)
            partial.rename(directory.resolve())  # an empty directory, behind a link or not, is replaced
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror or error}") from error
    return directory


def _holds(directory: Path, stamp: Mapping[str, Any]) -> bool:
    """True if the directory is this very synth, False if it is free to take."""
    if not directory.exists():
        return False
    if not directory.is_dir():
        raise InputError(f"{directory} is a file; give a directory that does not exist yet")
    names = {path.name for path in directory.iterdir()}
    if not names:
        return False
    try:
        found = json.loads((directory / STAMP_NAME).read_bytes()) if STAMP_NAME in names else None
    except ValueError:
        found = None
    if found == stamp:
        return True
    holds = f"holds another synth {json.dumps(found)}" if found else f"is not empty ({len(names)} entries)"
    raise InputError(f"{directory} {holds}; give an empty or new directory")


def _check_free_disk(arch: str, directory: Path, needed_bytes: int) -> None:
    place = next(parent for parent in directory.parents if parent.exists())
    free_bytes = shutil.disk_usage(place).free
    if needed_bytes > free_bytes:
        raise InputError(
            f"{arch} needs {format_bytes(needed_bytes)} of disk, {place} has {format_bytes(free_bytes)} free; "
            "free some, or give a directory on another disk"
        )


def _write(
    directory: Path,
    arch: Arch,
    shards: list[WeightFile],
    *,
    seed: int,
    progress: Progress | None,
) -> None:
    total_bytes = sum(shard.weight_bytes for shard in shards)
    wrote = add_up(progress, total_bytes)
    for shard in shards:
        write_shard(shard, directory, seed=seed, wrote=wrote)
    if len(shards) > 1:
        weight_map = {name: shard.name for shard in shards for name, _ in shard.tensors}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", {**arch.config, "torch_dtype": shards[0].dtype})
    for name, content in {**tokenizer_files(arch.config), **_other_files(arch.config)}.items():
        _write_json(directory / name, content)


def _other_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if config["model_type"] == "vit":
        side = {"height": config["image_size"], "width": config["image_size"]}
        half = [0.5] * config["num_channels"]
        image = {
            "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": half, "image_std": half,
            "image_processor_type": "ViTImageProcessor", "resample": 2, "rescale_factor": 1 / 255, "size": side,
        }  # fmt: skip
        return {"preprocessor_config.json": image}
    if "eos_token_id" in config:
        tokens = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
        return {"generation_config.json": {"_from_model_config": True, **tokens}}
    return {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
