"""How fast one core unpacks packed weights."""

import time
from collections import Counter

import numpy as np

from hermes.checkpoint.decoder import decode_chunks, encode_chunk
from hermes.checkpoint.index import DTYPE_BYTES, Checkpoint
from hermes.checkpoint.layout import CHUNK_ELEMENTS
from hermes.memory.arena import Arena

__all__ = ["measure_unpacking"]

NUM_CHUNKS = 64
ROUNDS = 3


def measure_unpacking(checkpoint: Checkpoint) -> float:
    """Unpacked bytes per second of one core, for the dtype that most of the packed weights are of; 0 without any.

    Random values with the spread of weights, out of and into memory that the processor's caches hold in part, as what
    a disk has just written. Blocking, for some 10 ms with the native decoder, 100 without.
    """
    stored = Counter[str]()
    for entry in checkpoint.tensors.values():
        if entry.extent.file in checkpoint.packed:
            stored[entry.dtype] += entry.extent.nbytes
    if not stored:
        return 0.0
    ((dtype, _),) = stored.most_common(1)
    item_bytes = DTYPE_BYTES[dtype]
    chunk = encode_chunk(memoryview(_content(dtype, item_bytes)), dtype, item_bytes, 0)
    source, target = Arena(NUM_CHUNKS * len(chunk)), Arena(NUM_CHUNKS * CHUNK_ELEMENTS * item_bytes)
    source.view[: NUM_CHUNKS * len(chunk)] = chunk * NUM_CHUNKS
    size = CHUNK_ELEMENTS * item_bytes
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for number in range(NUM_CHUNKS):
            decode_chunks(
                source.view[number * len(chunk) : (number + 1) * len(chunk)],
                target.view[number * size : (number + 1) * size],
                where="a sample",
                item_bytes=item_bytes,
                number=0,
            )
        seconds.append(time.perf_counter() - start)
    source.close()
    target.close()
    return NUM_CHUNKS * size / max(min(seconds), 1e-9)


def _content(dtype: str, item_bytes: int) -> bytes:
    values = np.random.default_rng(0).normal(0.0, 0.02, CHUNK_ELEMENTS)
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> np.uint32(16)).astype("<u2").tobytes()
    if dtype in ("F16", "F32"):
        return values.astype("<f2" if dtype == "F16" else "<f4").tobytes()
    return bytes(CHUNK_ELEMENTS * item_bytes)
