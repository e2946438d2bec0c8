"""Seeded random weights, written as safetensors in little memory.

A value depends on the dtype, the seed, its tensor's name and its place in it, never on the shard, the order or the
number of threads. Shapes and names are in `synth_archs`.
"""

import functools
import json
import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DTYPES", "SHARD_BYTES", "WeightFile", "plan_shards", "write_shard"]

Values = NDArray[Any]

#: Spelling in safetensors by spelling in configurations, for the dtypes that can be asked for.
DTYPES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD_BYTES = 2_000_000_000

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: 2 MiB as float32. With every thread on one chunk and two waiting to be written this stays far below 64 MiB.
_CHUNK_ELEMENTS = 1 << 19
_MAX_THREADS = 4
_MATRIX_STD = 0.02
_BIAS_STD = 0.002


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """One shard: its file name and what it holds, in the order it is written."""

    name: str
    tensors: Sequence[tuple[str, tuple[int, ...]]]
    dtype: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, without the header."""
        return sum(math.prod(shape) for _, shape in self.tensors) * _ELEMENT_BYTES[self.dtype]

    def header(self) -> bytes:
        """The length word and the JSON after it, padded as safetensors pads: tensors start at a multiple of 8."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in self.tensors:
            begin, end = end, end + math.prod(shape) * _ELEMENT_BYTES[self.dtype]
            entries[name] = {"dtype": DTYPES[self.dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def plan_shards(
    tensors: Sequence[tuple[str, tuple[int, ...]]], dtype: str, *, shard_bytes: int = SHARD_BYTES
) -> list[WeightFile]:
    """Fill shards in model order up to `shard_bytes` each (one larger tensor gets its own), names sorted inside one.

    That is how published checkpoints lie: layer 10 follows layer 1.
    """
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensors:
        nbytes = math.prod(shape) * _ELEMENT_BYTES[dtype]
        if groups[-1] and filled + nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, shape))
        filled += nbytes
    names = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    )
    return [
        WeightFile(name=name, tensors=sorted(group), dtype=dtype) for name, group in zip(names, groups, strict=True)
    ]


def write_shard(shard: WeightFile, directory: Path, *, seed: int, wrote: Callable[[int], None]) -> None:
    """Write the file and see it safely on disk, out of the page cache; `wrote` is called with each chunk's bytes.

    Chunks are made by several threads and written in order by this one.
    """
    num_threads = min(os.cpu_count() or 1, _MAX_THREADS)
    with (
        open(directory / shard.name, "wb", buffering=0) as file,
        ThreadPoolExecutor(num_threads, thread_name_prefix="synth") as pool,
    ):
        _write_all(file.fileno(), memoryview(shard.header()))
        waiting: deque[Future[Values]] = deque()
        for name, shape, chunk, count in _chunks(shard.tensors):
            waiting.append(pool.submit(_values, seed, name, shape, chunk, count, shard.dtype))
            if len(waiting) > num_threads + 1:
                wrote(_write_all(file.fileno(), waiting.popleft().result().data.cast("B")))
        while waiting:
            wrote(_write_all(file.fileno(), waiting.popleft().result().data.cast("B")))
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_all(fd: int, data: memoryview) -> int:
    written = 0
    while written < len(data):
        written += os.write(fd, data[written:])
    return written


def _chunks(tensors: Sequence[tuple[str, tuple[int, ...]]]) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    for name, shape in tensors:
        numel = math.prod(shape)
        for chunk, start in enumerate(range(0, numel, _CHUNK_ELEMENTS)):
            yield name, shape, chunk, min(_CHUNK_ELEMENTS, numel - start)


def _values(seed: int, name: str, shape: tuple[int, ...], chunk: int, count: int, dtype: str) -> Values:
    """One chunk: norms ones, biases close to zero, matrices normal with a trained model's usual spread."""
    if len(shape) == 1 and name.endswith("weight"):
        return _rounded(np.ones(count, dtype=np.float32), dtype)
    std = _BIAS_STD if len(shape) == 1 else _MATRIX_STD
    bits = np.random.SFC64([seed, zlib.crc32(name.encode()), chunk])
    if dtype == "float32":
        values = np.random.Generator(bits).standard_normal(count, dtype=np.float32)
        values *= np.float32(std)
        return values
    return _quantiles(std, dtype).take(bits.random_raw(-(-count // 4)).view(np.uint16)[:count])


@functools.cache
def _quantiles(std: float, dtype: str) -> Values:
    """The normal distribution at 65,536 equally likely places.

    Drawing from them is five times as fast as drawing normals and rounding, and where a value has 8 or 11 significant
    bits only the far tails (one in 65,536) and the very smallest magnitudes show it.
    """
    normal = NormalDist(sigma=std)
    return _rounded(np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], dtype=np.float32), dtype)


def _rounded(values: NDArray[np.float32], dtype: str) -> Values:
    """Finite values in the asked dtype, to nearest, ties to even; bfloat16 as the 16-bit words it is stored in."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    return ((bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)) >> np.uint32(16)).astype(np.uint16)
