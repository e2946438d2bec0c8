"""Packs a checkpoint: a model directory whose weight files hold the same bytes in less. `unpack` is the way back.

Files are read and written from front to back, a few megabytes at a time. A kill leaves a hidden directory, and the same
request goes on from the last whole chunk in it: chunks carry their own sizes and checksums.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hermes.checkpoint.chunks import num_chunks
from hermes.checkpoint.codec import read_chunk_header
from hermes.checkpoint.decoder import decode_chunks, encode_chunk
from hermes.checkpoint.index import DTYPE_BYTES, Checkpoint, TensorEntry
from hermes.checkpoint.layout import CHUNK_ELEMENTS, HEADER_BYTES, largest_chunk
from hermes.checkpoint.open import open_checkpoint
from hermes.checkpoint.packed import FORMAT, SOURCE_HEADER, TABLE_NAME
from hermes.checkpoint.partial import Progress, add_up, copy_beside, partial_directory, sync
from hermes.checkpoint.readers import forget
from hermes.checkpoint.safetensors import read_header_text
from hermes.errors import CheckpointError, InputError, ReadError

__all__ = ["STAMP_NAME", "pack", "shard_names", "write_index"]

STAMP_NAME = "hermes-pack.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CHUNKS_AT_A_TIME = 64


def pack(source: Path, directory: Path, *, progress: Progress | None = None) -> Path:
    """Make `directory` a packed copy of the model directory or weight file at `source`; nothing if it is that already.

    It holds configuration and tokenizer too, and every tensor bit for bit. Holds some 30 MiB, however large the model.
    Raises CheckpointError, and InputError for a directory in the way or a failed write.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.packed:
        raise InputError(f"{source} is packed already; hermes unpack makes it what it was")
    if checkpoint.quantized:
        raise InputError(f"{source} is quantised, and would hardly shrink; use it as it is")
    names = shard_names(checkpoint)
    stamp = {"format": FORMAT, "source": checkpoint.fingerprint(), "files": names}
    try:
        with partial_directory(directory, STAMP_NAME, stamp) as partial:
            if partial is not None:
                _pack_into(partial, source, checkpoint, names, progress)
    except OSError as error:
        raise InputError(
            f"cannot write {directory}: {error.strerror or error}; then run the same again: it goes on where it stopped"
        ) from error
    return directory


def shard_names(checkpoint: Checkpoint) -> list[str]:
    """Names of the files in one directory: the source's, or safetensors' usual ones.

    The usual ones where the source is in another format, or several folders of it have files of one name.
    """
    names = [stamp.path.name for stamp in checkpoint.files]
    if all(name.endswith(".safetensors") for name in names) and len(set(names)) == len(names):
        return names
    count = len(names)
    if count == 1:
        return [WEIGHTS_NAME]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def write_index(directory: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Say which file each tensor is in; not where that is the one that is looked for without an index."""
    if set(weight_map.values()) != {WEIGHTS_NAME}:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _pack_into(
    partial: Path, source: Path, checkpoint: Checkpoint, names: Sequence[str], progress: Progress | None
) -> None:
    advance = add_up(progress, sum(entry.extent.nbytes for entry in checkpoint.tensors.values()))
    weight_map = {}
    for number, (stamp, name) in enumerate(zip(checkpoint.files, names, strict=True)):
        entries = [entry for entry in checkpoint.tensors.values() if entry.extent.file == number]
        entries.sort(key=lambda entry: (entry.extent.offset, entry.extent.nbytes, entry.name))
        weight_map.update({entry.name: name for entry in entries})
        if (partial / name).exists():
            advance(sum(entry.extent.nbytes for entry in entries))
            continue
        unfinished = partial / f"{name}.unfinished"
        _pack_file(stamp.path, entries, unfinished, advance)
        sync(unfinished)
        unfinished.rename(partial / name)
    write_index(partial, weight_map, sum((partial / name).stat().st_size for name in names))
    if source.is_dir():
        copy_beside(source, partial)
        # A stamp of `hermes synth` would say that these are its files.
        (partial / "hermes-synth.json").unlink(missing_ok=True)


def _pack_file(path: Path, entries: Sequence[TensorEntry], target: Path, advance: Callable[[int], None]) -> None:
    """Write one packed file, from the last whole chunk on if some of it is there."""
    plan = _Layout(path, entries)
    target.touch()
    with open(path, "rb") as source, open(target, "r+b") as out, ThreadPoolExecutor(_num_threads()) as pool:
        sizes = _recover(out, entries, plan.data_start)
        out.seek(plan.data_start + sum(map(sum, sizes)))
        out.truncate()
        for entry, done in zip(entries, sizes, strict=True):
            item_bytes = DTYPE_BYTES[entry.dtype]
            advance(min(len(done) * CHUNK_ELEMENTS * item_bytes, entry.extent.nbytes))
            for first, content in _groups(source, entry, len(done)):
                chunk_bytes = CHUNK_ELEMENTS * item_bytes
                parts = [content[begin : begin + chunk_bytes] for begin in range(0, len(content), chunk_bytes)]
                chunks = [
                    pool.submit(encode_chunk, part, entry.dtype, item_bytes, number)
                    for number, part in enumerate(parts, first)
                ]
                for chunk in (future.result() for future in chunks):
                    out.write(chunk)
                    done.append(len(chunk))
                advance(len(content))
        out.write(np.array([size for done in sizes for size in done], dtype="<u4").tobytes())
        out.seek(0)
        out.write(plan.header([sum(done) for done in sizes], 4 * sum(map(len, sizes))))


def _num_threads() -> int:
    return min(4, os.cpu_count() or 1)


def _groups(source: BinaryIO, entry: TensorEntry, first: int) -> Iterator[tuple[int, memoryview]]:
    """The tensor's bytes from chunk number `first` on, some chunks at a time; nothing stays in the page cache."""
    chunk_bytes = CHUNK_ELEMENTS * DTYPE_BYTES[entry.dtype]
    for number in range(first, num_chunks(entry.numel), CHUNKS_AT_A_TIME):
        begin = number * chunk_bytes
        nbytes = min(CHUNKS_AT_A_TIME * chunk_bytes, entry.extent.nbytes - begin)
        source.seek(entry.extent.offset + begin)
        content = source.read(nbytes)
        forget(source.fileno(), entry.extent.offset + begin, nbytes)
        if len(content) < nbytes:
            raise CheckpointError(f"{source.name}: truncated in tensor {entry.name!r}; restore it and run again")
        yield number, memoryview(content)


def _recover(out: BinaryIO, entries: Sequence[TensorEntry], start: int) -> list[list[int]]:
    """Sizes of the chunks that an earlier run has written, tensor by tensor: each is read, and as it should be."""
    sizes: list[list[int]] = [[] for _ in entries]
    out.seek(start)
    for entry, done in zip(entries, sizes, strict=True):
        item_bytes = DTYPE_BYTES[entry.dtype]
        for number in range(num_chunks(entry.numel)):
            elements = min(CHUNK_ELEMENTS, entry.numel - number * CHUNK_ELEMENTS)
            head = out.read(HEADER_BYTES)
            try:
                *_, found, payload_bytes = read_chunk_header(head, item_bytes, number)
                chunk = head + out.read(payload_bytes)
                if found != elements:
                    return sizes
                decode_chunks(
                    memoryview(chunk),
                    memoryview(bytearray(elements * item_bytes)),
                    where=out.name,
                    item_bytes=item_bytes,
                    number=number,
                )
            except (CheckpointError, ReadError):
                return sizes
            done.append(len(chunk))
    return sizes


class _Layout:
    """The header of a packed file, of which the length is settled before the sizes of tensors are known."""

    def __init__(self, path: Path, entries: Sequence[TensorEntry]) -> None:
        self._entries = entries
        self._source_header = _source_header(path, entries)
        if any(entry.name == TABLE_NAME for entry in entries):
            raise CheckpointError(f"{path}: has a tensor {TABLE_NAME!r}, as packed files do; rename it")
        largest = [
            num_chunks(entry.numel) * largest_chunk(CHUNK_ELEMENTS, DTYPE_BYTES[entry.dtype]) for entry in entries
        ]
        text = self._text(largest, 4 * sum(num_chunks(entry.numel) for entry in entries))
        self._text_bytes = -(-len(text) // 4096) * 4096 - 8
        if self._text_bytes < len(text):
            self._text_bytes += 4096
        self.data_start = 8 + self._text_bytes

    def header(self, sizes: Sequence[int], table_bytes: int) -> bytes:
        """Length word and JSON, filled up with spaces."""
        return self._text_bytes.to_bytes(8, "little") + self._text(sizes, table_bytes).ljust(self._text_bytes)

    def _text(self, sizes: Sequence[int], table_bytes: int) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": FORMAT, SOURCE_HEADER: self._source_header}}
        end = 0
        for name, nbytes in [
            *((entry.name, nbytes) for entry, nbytes in zip(self._entries, sizes, strict=True)),
            (TABLE_NAME, table_bytes),
        ]:
            begin, end = end, end + nbytes
            header[name] = {"dtype": "U8", "shape": [nbytes], "data_offsets": [begin, end]}
        return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def _source_header(path: Path, entries: Sequence[TensorEntry]) -> str:
    """The header of the unpacked file as it is, or as safetensors would write it where that is in another format.

    A file of which only some tensors are used (its index decides) is packed as one that holds these alone.
    """
    if path.suffix == ".safetensors":
        text, _ = read_header_text(path)
        described = json.loads(text).keys() - {"__metadata__"}
        if described == {entry.name for entry in entries}:
            return text.decode()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.extent.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    made = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return made + " " * (-len(made.encode()) % 8)
