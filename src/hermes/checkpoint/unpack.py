"""From a packed checkpoint back to what it was: as files, into memory, or only to see that it can be done."""

import mmap
from collections.abc import Iterator
from pathlib import Path

from hermes.checkpoint.index import Checkpoint, Extent
from hermes.checkpoint.open import open_checkpoint
from hermes.checkpoint.pack import STAMP_NAME, shard_names, write_index
from hermes.checkpoint.packed import SOURCE_HEADER
from hermes.checkpoint.partial import Progress, copy_beside, partial_directory, sync
from hermes.checkpoint.readers import Reader, open_reader
from hermes.checkpoint.safetensors import read_header
from hermes.errors import CheckpointError, InputError

__all__ = ["read_unpacked", "unpack", "verify"]

_AT_A_TIME_BYTES = 4 << 20
_STAMP_NAME = "hermes-unpack.json"


def unpack(source: Path, directory: Path, *, progress: Progress | None = None) -> Path:
    """Make `directory` what the packed directory or file at `source` was made from; nothing if it is that already.

    safetensors files come out byte for byte. Raises CheckpointError, ReadError for a chunk that is corrupt, and
    InputError for a directory in the way or a failed write.
    """
    checkpoint = _open_packed(source)
    names = shard_names(checkpoint)
    total_bytes = _weight_bytes(checkpoint)
    done_bytes = 0
    try:
        with partial_directory(directory, _STAMP_NAME, {"source": checkpoint.fingerprint()}) as partial:
            if partial is None:
                return directory
            with open_reader(checkpoint) as reader:
                for number, (stamp, name) in enumerate(zip(checkpoint.files, names, strict=True)):
                    target = partial / name
                    entries = [entry for entry in checkpoint.tensors.values() if entry.extent.file == number]
                    if target.exists():
                        done_bytes += sum(entry.extent.nbytes for entry in entries)
                        continue
                    unfinished = partial / f"{target.name}.unfinished"
                    _, metadata = read_header(stamp.path, number)
                    text = metadata[SOURCE_HEADER].encode()
                    with open(unfinished, "wb") as out:
                        out.write(len(text).to_bytes(8, "little") + text)
                        for entry in sorted(entries, key=lambda entry: entry.extent.offset):
                            for part in read_unpacked(reader, checkpoint, entry.extent):
                                out.write(part)
                                done_bytes += len(part)
                                if progress is not None:
                                    progress(done_bytes, total_bytes)
                    sync(unfinished)
                    unfinished.rename(target)
            if source.is_dir():
                homes = {entry.name: names[entry.extent.file] for entry in checkpoint.tensors.values()}
                write_index(partial, homes, total_bytes)
                copy_beside(source, partial)
                (partial / STAMP_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write {directory}: {error.strerror or error}; then run the same again: it goes on where it stopped"
        ) from error
    return directory


def verify(source: Path, original: Path | None = None, *, progress: Progress | None = None) -> int:
    """Unpack every chunk and look at its checksum, and compare with `original` where that is given; bytes looked at.

    Nothing is written. Raises ReadError for a chunk that is corrupt, CheckpointError for a tensor that differs.
    """
    checkpoint = _open_packed(source)
    other = None if original is None else open_checkpoint(original)
    if other is not None and other.tensors.keys() != checkpoint.tensors.keys():
        names = sorted(other.tensors.keys() ^ checkpoint.tensors.keys())
        raise CheckpointError(f"{source}: {names[0]!r} is not in both it and {original}; pack the model again")
    total_bytes, done_bytes = _weight_bytes(checkpoint), 0
    with open_reader(checkpoint) as reader, open_reader(other or checkpoint) as beside:
        for name, entry in checkpoint.tensors.items():
            twin = None if other is None else other.tensors[name]
            if twin is not None and (twin.dtype, twin.shape) != (entry.dtype, entry.shape):
                raise CheckpointError(f"{source}: tensor {name!r} is of another dtype or shape than in {original}")
            position = 0
            for part in read_unpacked(reader, checkpoint, entry.extent):
                if twin is not None:
                    there = Extent(file=twin.extent.file, offset=twin.extent.offset + position, nbytes=len(part))
                    if beside.read_bytes(there) != part:
                        raise CheckpointError(
                            f"{source}: tensor {name!r} differs from {original} behind byte {position}; pack it again"
                        )
                position += len(part)
                done_bytes += len(part)
                if progress is not None:
                    progress(done_bytes, total_bytes)
    return done_bytes


def read_unpacked(reader: Reader, checkpoint: Checkpoint, extent: Extent) -> Iterator[memoryview]:
    """The bytes of an extent of the unpacked files, a few megabytes at a time; each part is gone with the next.

    Of a file that is not packed, too.
    """
    packed = checkpoint.packed.get(extent.file)
    if packed is None:
        for begin in range(0, extent.nbytes, _AT_A_TIME_BYTES):
            nbytes = min(_AT_A_TIME_BYTES, extent.nbytes - begin)
            yield memoryview(reader.read_bytes(Extent(file=extent.file, offset=extent.offset + begin, nbytes=nbytes)))
        return
    alignment = reader.alignment
    room = max(_AT_A_TIME_BYTES, packed.largest_chunk_bytes) + 2 * alignment
    buffer = memoryview(mmap.mmap(-1, room))
    aside = memoryview(bytearray(max(_AT_A_TIME_BYTES, packed.largest_unpacked_bytes)))
    for run in packed.runs(extent.offset, extent.nbytes, run_bytes=_AT_A_TIME_BYTES, unpacked_bytes=_AT_A_TIME_BYTES):
        skip = run.offset % alignment
        needed = skip + run.nbytes
        whole = -(-needed // alignment) * alignment
        reader.read_into(extent.file, run.offset - skip, buffer[:whole], needed)
        part = aside[: run.unpacked_bytes]
        run.decoder()(buffer[skip:needed], part)
        yield part


def _open_packed(source: Path) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    if len(checkpoint.packed) < len(checkpoint.files):
        raise InputError(f"{source} is not packed; hermes pack makes a packed copy")
    return checkpoint


def _weight_bytes(checkpoint: Checkpoint) -> int:
    return sum(entry.extent.nbytes for entry in checkpoint.tensors.values())
