"""How fast one core unpacks packed weights."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hermes.checkpoint.decoder import decode_chunks, encode_chunk
from hermes.checkpoint.index import DTYPE_BYTES, Checkpoint
from hermes.checkpoint.layout import CHUNK_ELEMENTS
from hermes.memory.arena import Arena
from hermes.memory.probe import num_cores

__all__ = ["measure_unpacking"]

NUM_CHUNKS = 256
ROUNDS = 3


def measure_unpacking(checkpoint: Checkpoint) -> float:
    """Unpacked bytes per second of one core, for the dtype that most of the packed weights are of; 0 without any.

    All cores at once, which share the memory's bandwidth: random values with the spread of weights, out of and into
    more memory than a core's own caches hold. Blocking, for some 20 ms with the native decoder, a second without.
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
    target.touch()
    size, cores = CHUNK_ELEMENTS * item_bytes, num_cores()

    def unpack(core: int) -> None:
        for number in range(core, NUM_CHUNKS, cores):
            decode_chunks(
                source.view[number * len(chunk) : (number + 1) * len(chunk)],
                target.view[number * size : (number + 1) * size],
                where="a sample",
                item_bytes=item_bytes,
                number=0,
            )

    seconds = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            list(pool.map(unpack, range(cores)))
            seconds.append(time.perf_counter() - start)
    source.close()
    target.close()
    return NUM_CHUNKS * size / max(min(seconds), 1e-9) / cores


def _content(dtype: str, item_bytes: int) -> bytes:
    values = np.random.default_rng(0).normal(0.0, 0.02, CHUNK_ELEMENTS)
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> np.uint32(16)).astype("<u2").tobytes()
    if dtype in ("F16", "F32"):
        return values.astype("<f2" if dtype == "F16" else "<f4").tobytes()
    return bytes(CHUNK_ELEMENTS * item_bytes)
