"""The packed layout, chunk by chunk, and its reference encoder and decoder in numpy. `docs/format.md` has the figures.

A tensor is packed in chunks of `CHUNK_ELEMENTS` elements, each of which is decoded and checked on its own. Signs and
mantissas of trained weights look random and are kept as they are; exponents crowd into a few values. Each chunk chooses
a window of seven neighbouring exponents: one in the window costs three bits, any other the code 7 and a byte in a side
stream. Codes are stored as bit planes, because vector units take those for masks.

What is here is slow and allocates; `_native` does the same in C++, and `decoder` chooses. Where chunks lie in a file is
in `packed`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hermes.checkpoint.layout import (
    BIT_PLANES,
    BLOCK,
    CHUNK_ELEMENTS,
    ENCODINGS,
    ESCAPE,
    HEADER,
    HEADER_BYTES,
    LOW_BYTES,
    Encoding,
)
from hermes.errors import CheckpointError

__all__ = ["checksum", "decode_chunk", "encode_chunk", "read_chunk_header"]

_CHECKED_FROM = 8
_GOLDEN = 0x9E3779B97F4A7C15

Buffer = bytes | memoryview
Bytes = NDArray[np.uint8]
Words = NDArray[Any]


def checksum(content: Buffer) -> int:
    """64 bits of the NH family (UMAC): each half of each word is offset by a key that depends on its place.

    Words of 8 bytes, the last filled up with zeros; key number t is (t + 1) x the golden ratio in 64 bits.
    """
    data = np.frombuffer(content, dtype=np.uint8)
    words = np.zeros(-(-data.size // 8), dtype="<u8")
    words.view(np.uint8)[: data.size] = data
    with np.errstate(over="ignore"):
        keys = np.arange(1, words.size + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        low = words.astype(np.uint32) + keys.astype(np.uint32)
        high = (words >> np.uint64(32)).astype(np.uint32) + (keys >> np.uint64(32)).astype(np.uint32)
        total = np.sum(low.astype(np.uint64) * high, dtype=np.uint64) + np.uint64(data.size) * np.uint64(_GOLDEN)
    return int(total)


def encode_chunk(content: Buffer, dtype: str, item_bytes: int, number: int) -> bytes:
    """Chunk number `number`: its header and the smallest payload that holds these elements' bytes exactly."""
    raw = np.frombuffer(content, dtype=np.uint8)
    best: tuple[Encoding, int, Bytes] = (Encoding.RAW, 0, raw)
    for encoding in ENCODINGS.get(dtype, ()):
        words = raw.view("<u4" if item_bytes == 4 else "<u2")
        if _fits(words, encoding):
            base, payload = _encode(words, encoding)
            if payload.size < raw.size:
                best = (encoding, base, payload)
            break
    encoding, base, payload = best
    fields = HEADER.pack(0, encoding, base, 0, number, raw.size // item_bytes, payload.size)[_CHECKED_FROM:]
    checked = fields + payload.tobytes()
    return checksum(checked).to_bytes(8, "little") + checked


def decode_chunk(chunk: Buffer, item_bytes: int, number: int) -> bytes:
    """The elements of one whole chunk. Raises CheckpointError, which names the fault but not the tensor."""
    view = memoryview(chunk).cast("B")
    encoding, base, elements, payload_bytes = read_chunk_header(view, item_bytes, number)
    if HEADER_BYTES + payload_bytes != len(view):
        raise CheckpointError(f"{len(view)} bytes, its header says {HEADER_BYTES + payload_bytes}")
    if checksum(view[_CHECKED_FROM:]) != int.from_bytes(view[:_CHECKED_FROM], "little"):
        raise CheckpointError("checksum differs")
    payload = np.frombuffer(view[HEADER_BYTES:], dtype=np.uint8)
    if encoding is Encoding.RAW:
        return payload.tobytes()
    return _decode(payload, encoding, base, elements).tobytes()


def read_chunk_header(view: Buffer, item_bytes: int, number: int) -> tuple[Encoding, int, int, int]:
    """Encoding, lowest exponent, elements and payload bytes. Raises CheckpointError where they make no sense."""
    header = memoryview(view)[:HEADER_BYTES]
    if len(header) < HEADER_BYTES:
        raise CheckpointError("truncated")
    _, code, base, zero, found, elements, payload_bytes = HEADER.unpack(header)
    if code > max(Encoding) or zero or not 0 < elements <= CHUNK_ELEMENTS or found != number:
        raise CheckpointError("header makes no sense")
    encoding = Encoding(code)
    if encoding is Encoding.RAW:
        if base or payload_bytes != elements * item_bytes:
            raise CheckpointError("header makes no sense")
    elif item_bytes != (2 if encoding in (Encoding.BF16, Encoding.F16) else 4):
        raise CheckpointError("encoding of another dtype")
    elif base > _largest_base(encoding) or payload_bytes < _fixed_bytes(encoding, elements):
        raise CheckpointError("header makes no sense")
    return encoding, base, elements, payload_bytes


def _largest_base(encoding: Encoding) -> int:
    """With it, no code leads beyond the largest exponent."""
    return (31 if encoding is Encoding.F16 else 255) - ESCAPE


def _fixed_bytes(encoding: Encoding, elements: int) -> int:
    """Of a payload, all but its escapes."""
    return -(-elements // BLOCK) * (3 * 8 + BIT_PLANES.get(encoding, 0) * 8 + BLOCK + LOW_BYTES.get(encoding, 0))


def _fits(words: Words, encoding: Encoding) -> bool:
    zeros = {Encoding.F32_AS_BF16: 0xFFFF, Encoding.F32_AS_F16: 0x1FFF}.get(encoding, 0)
    return not zeros or not np.any(words & np.uint32(zeros))


def _encode(words: Words, encoding: Encoding) -> tuple[int, Bytes]:
    """The lowest exponent of the window, and the payload."""
    filled = np.zeros(-(-words.size // BLOCK) * BLOCK, dtype=words.dtype)
    filled[: words.size] = words
    bits: list[Bytes] = []
    low = np.zeros(0, dtype=np.uint8)
    if encoding is Encoding.F16:
        exponents = (filled >> 10).astype(np.uint8) & 31
        rest = filled.astype(np.uint8)
        bits = [_bit(filled, 8), _bit(filled, 9), _bit(filled, 15)]
    else:
        top = filled if encoding is Encoding.BF16 else (filled >> np.uint32(16)).astype(np.uint16)
        exponents = (top >> 7).astype(np.uint8)
        rest = ((top >> 8) & 0x80 | top & 0x7F).astype(np.uint8)
        if encoding is Encoding.F32:
            low = filled.astype("<u2").view(np.uint8)
        elif encoding is Encoding.F32_AS_F16:
            bits = [_bit(filled, 13), _bit(filled, 14), _bit(filled, 15)]
    counts = np.bincount(exponents[: words.size], minlength=256)
    sums = np.convolve(counts, np.ones(ESCAPE, dtype=counts.dtype), "valid")[: _largest_base(encoding) + 1]
    base = int(np.argmax(sums))
    codes = np.minimum(exponents - np.uint8(base), ESCAPE)  # what lies below wraps around to the top
    codes[words.size :] = 0
    escapes = exponents[codes == ESCAPE]
    planes = [_interleaved([_bit(codes, place) for place in range(3)]), _interleaved(bits), rest, low, escapes]
    return base, np.concatenate(planes)


def _decode(payload: Bytes, encoding: Encoding, base: int, elements: int) -> Words:
    num_blocks = -(-elements // BLOCK)
    sizes = [3 * 8, BIT_PLANES.get(encoding, 0) * 8, BLOCK, LOW_BYTES.get(encoding, 0)]
    ends = np.cumsum([size * num_blocks for size in sizes])
    codes_plane, bits_plane, rest, low, escapes = np.split(payload, ends)
    first, second, third = _separated(codes_plane, 3)
    codes = first | second << 1 | third << 2
    exponents = codes + np.uint8(base)
    escaped = np.flatnonzero(codes == ESCAPE)
    if escaped.size != escapes.size or (escaped.size and escaped[-1] >= elements):
        raise CheckpointError("escapes are too few or too many")
    exponents[escaped] = escapes
    if encoding is Encoding.F16:
        m8, m9, sign = _separated(bits_plane, 3)
        high = exponents << 2 & 0x7C | m8 | m9 << 1 | sign << 7
        return (high.astype("<u2") << 8 | rest)[:elements]
    top = (rest & 0x80).astype("<u2") << 8 | exponents.astype("<u2") << 7 | rest & 0x7F
    if encoding is Encoding.BF16:
        return top[:elements]
    words = top.astype("<u4") << np.uint32(16)
    if encoding is Encoding.F32:
        words |= low.view("<u2")
    elif encoding is Encoding.F32_AS_F16:
        for place, plane in enumerate(_separated(bits_plane, 3), 13):
            words |= plane.astype("<u4") << np.uint32(place)
    return words[:elements]


def _bit(words: Words, place: int) -> Bytes:
    """One bit of each word, 8 to a byte, the first lowest."""
    return np.packbits((words >> words.dtype.type(place)).astype(np.uint8) & 1, bitorder="little")


def _interleaved(planes: list[Bytes]) -> Bytes:
    """A word of 64 bits from each plane in turn."""
    if not planes:
        return np.zeros(0, dtype=np.uint8)
    return np.stack([plane.reshape(-1, 8) for plane in planes], axis=1).reshape(-1)


def _separated(planes: Bytes, count: int) -> list[Bytes]:
    """The bits of each plane, a byte for each element."""
    words = planes.reshape(-1, count, 8)
    return [
        np.unpackbits(np.ascontiguousarray(words[:, place]).reshape(-1), bitorder="little") for place in range(count)
    ]
