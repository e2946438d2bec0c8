"""Unpacks chunks: by the native decoder where one was built, else by the reference in `codec`, slowly.

The native one takes the best of AVX-512, AVX2, NEON and plain C++ that the processor has; all give the same bytes.
"""

import functools
import logging
from typing import Any

from hermes.checkpoint.layout import ENCODINGS, HEADER_BYTES, largest_chunk
from hermes.errors import CheckpointError, ReadError

__all__ = ["check", "check_chunks", "decode_chunks", "encode_chunk", "instruction_sets", "native", "warn_if_slow"]

logger = logging.getLogger("hermes")

_FAULTS = (
    "", "truncated", "header makes no sense", "encoding of another dtype", "checksum differs",
    "escapes are too few or too many", "ends early",
)  # fmt: skip


@functools.cache
def native() -> Any:
    """The module in C++; None where it was not built."""
    try:
        from hermes.checkpoint import _native  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        return None
    return _native


def instruction_sets() -> list[str]:
    """What the native decoder can use here, best first; empty where none was built."""
    return list(native().paths()) if native() is not None else []


@functools.cache
def warn_if_slow() -> None:
    """Say once that packed weights will be unpacked by the reference."""
    if native() is None:
        logger.warning(
            "the native decoder was not built: packed weights are unpacked slowly; "
            "install a C++ compiler, then install hermes-stream again"
        )


def decode_chunks(
    source: memoryview,
    target: memoryview,
    *,
    where: str,
    item_bytes: int,
    number: int,
    skip: int = 0,
    instruction_set: str = "",
) -> None:
    """Fill `target` from neighbouring chunks, the first of which is number `number`, beginning at its element `skip`.

    Blocks without the interpreter lock, touches no byte outside `source` and `target`, and checks every chunk whole
    before a value of it is used. Safe in any thread. Raises ReadError, which names the chunk and, as `where`, its
    tensor.
    """
    if native() is None:
        _check(*_decode_slowly(source, target, item_bytes, number, skip), where)
    else:
        check(native().decode_chunks(source, target, item_bytes, number, skip, instruction_set), where)


def check_chunks(source: memoryview, *, where: str, number: int) -> None:
    """Find out whether chunks are as they were written; by the native module. Raises ReadError, as `decode_chunks`."""
    check(native().check_chunks(source, number), where)


def check(result: tuple[int, int], where: str) -> None:
    """Raise ReadError, which names the chunk and `where` it is, unless the native module found no fault."""
    _check(_FAULTS[result[0]], result[1], where)


def _check(fault: str, chunk: int, where: str) -> None:
    if fault:
        raise ReadError(f"{where}: chunk {chunk} is corrupt ({fault}); pack the model again, or restore the file")


def encode_chunk(content: memoryview, dtype: str, item_bytes: int, number: int) -> bytes:
    """The chunk that holds these elements; the same bytes as `codec.encode_chunk`."""
    if native() is None:
        from hermes.checkpoint import codec

        return codec.encode_chunk(content, dtype, item_bytes, number)
    target = bytearray(largest_chunk(len(content) // item_bytes, item_bytes))
    nbytes = native().encode_chunk(content, target, item_bytes, bytes(ENCODINGS.get(dtype, ())), number)
    return bytes(target[:nbytes])


def _decode_slowly(source: memoryview, target: memoryview, item_bytes: int, number: int, skip: int) -> tuple[str, int]:
    from hermes.checkpoint import codec

    done = 0
    while done < len(target):
        try:
            *_, payload_bytes = codec.read_chunk_header(source, item_bytes, number)
            chunk, source = source[: HEADER_BYTES + payload_bytes], source[HEADER_BYTES + payload_bytes :]
            content = codec.decode_chunk(chunk, item_bytes, number)
        except CheckpointError as error:
            return str(error), number
        part = content[skip * item_bytes :][: len(target) - done]
        if not part:
            return _FAULTS[-1], number
        target[done : done + len(part)] = part
        done, number, skip = done + len(part), number + 1, 0
    return "", number
