"""A directory that appears whole or not at all, and is gone on with where a kill has left it."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hermes.errors import InputError

__all__ = ["Progress", "add_up", "copy_beside", "lock", "partial_directory", "sync"]

Progress = Callable[[int, int], None]
"""Told how many bytes are done, of how many."""

#: Weights in any format, and what belongs to them: never copied.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot"}
_LARGEST_BESIDE_BYTES = 64 << 20


@contextlib.contextmanager
def partial_directory(directory: Path, stamp_name: str, stamp: Mapping[str, Any]) -> Iterator[Path | None]:
    """A place beside `directory`, which becomes it once the block has ended well; None where that has happened before.

    `stamp` says what is made: what an earlier run has left of the same thing is still there, of another it is gone.
    Raises InputError for a directory in the way, or where another process is at it.
    """
    directory = directory.expanduser().absolute()
    if directory.exists():
        if not directory.is_dir():
            raise InputError(f"{directory} is a file; give a directory that does not exist yet")
        if _read_stamp(directory / stamp_name) == stamp:
            yield None
            return
        if number := sum(1 for _ in directory.iterdir()):
            raise InputError(f"{directory} is not empty ({number} entries); give an empty or new directory")
    partial = directory.parent / f".{directory.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        if _read_stamp(partial / stamp_name) != stamp:
            for path in partial.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            (partial / stamp_name).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        yield partial
        partial.rename(directory.resolve())  # an empty directory is replaced


def copy_beside(source: Path, directory: Path) -> None:
    """Configuration, tokenizer and all else that lies beside weights: no weights, no index, nothing hidden."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if any(part.startswith(".") for part in relative.parts) or path.suffix in _WEIGHTS:
            continue
        if path.name.endswith(".index.json") or not path.is_file() or path.stat().st_size > _LARGEST_BESIDE_BYTES:
            continue
        (directory / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, directory / relative)


def sync(path: Path) -> None:
    """Have a file's bytes on the disk before anything says that it is whole."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_stamp(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY)
    try:
        lock(fd, directory)
        yield
    finally:
        os.close(fd)


def lock(fd: int, path: Path) -> None:
    """Hold an open file or directory until it is closed or this process ends, however it does.

    Raises InputError where another process holds it.
    """
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{path} is being written by another process; wait for it to end") from error


def add_up(progress: Progress | None, total_bytes: int) -> Callable[[int], None]:
    """What is to be told of each few bytes that are done, for `progress` to hear of all of them."""
    done_bytes = 0

    def advance(nbytes: int) -> None:
        nonlocal done_bytes
        done_bytes += nbytes
        if progress is not None:
            progress(done_bytes, total_bytes)

    return advance
