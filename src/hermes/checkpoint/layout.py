"""The numbers of the packed layout, for those who must know them without encoding or decoding. No numpy here."""

import struct
from enum import IntEnum

__all__ = [
    "BIT_PLANES",
    "BLOCK",
    "CHUNK_ELEMENTS",
    "ENCODINGS",
    "ESCAPE",
    "HEADER",
    "HEADER_BYTES",
    "LOW_BYTES",
    "Encoding",
    "largest_chunk",
]

CHUNK_ELEMENTS = 32768
"""Of each chunk but a tensor's last one: 64 KiB of bf16. Looking up one row reads and checks whole chunks."""
BLOCK = 64
"""Elements whose codes are three words of 64 bits; the last block of a chunk is filled up with zeros."""
ESCAPE = 7
HEADER = struct.Struct("<QBBHIII")
"""Checksum of all that follows it, encoding, lowest exponent of the window, 0, number, elements, payload bytes."""
HEADER_BYTES = HEADER.size


class Encoding(IntEnum):
    """How a chunk's elements are stored."""

    RAW = 0
    """As they are."""
    BF16 = 1
    F16 = 2
    F32 = 3
    F32_AS_BF16 = 4
    """float32 whose lower 16 bits are all zero."""
    F32_AS_F16 = 5
    """float32 whose lower 13 bits are all zero, as those that were rounded to float16."""


#: Planes of a block behind its codes: bit planes, and bytes of the plane of low halves.
BIT_PLANES = {Encoding.F16: 3, Encoding.F32_AS_F16: 3}
LOW_BYTES = {Encoding.F32: 2 * BLOCK}
#: Encodings to try for a dtype, the smallest first.
ENCODINGS = {
    "BF16": (Encoding.BF16,),
    "F16": (Encoding.F16,),
    "F32": (Encoding.F32_AS_BF16, Encoding.F32_AS_F16, Encoding.F32),
}


def largest_chunk(elements: int, item_bytes: int) -> int:
    """Bytes that no chunk of so many elements exceeds while it is encoded."""
    return HEADER_BYTES + elements * (item_bytes + 1) + 8 * BLOCK
