"""Every byte of every extent, once, in its place: for random extents, alignments and piece sizes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes.checkpoint import Extent
from hermes.pipeload import plan_load

NUM_FILES = 2
FILE_BYTES = 3 * 4096 + 77
FILES = [random.Random(seed).randbytes(FILE_BYTES) for seed in range(NUM_FILES)]


def extents_of(max_size):
    def extent(file, offset, nbytes):
        return Extent(file=file, offset=offset, nbytes=min(nbytes, FILE_BYTES - offset))

    one = st.builds(extent, st.integers(0, NUM_FILES - 1), st.integers(0, FILE_BYTES), st.integers(0, FILE_BYTES))
    return st.lists(one, min_size=1, max_size=max_size)


def widen(source, target):
    """Each stored byte becomes itself and its complement."""
    target[::2] = source
    target[1::2] = bytes(255 - byte for byte in source)


def narrow(source, target):
    """Of each two stored bytes the first."""
    target[:] = source[::2]


def carry_out(load, alignment, buffer_bytes):
    """Read the pieces in random order, as a direct reader would: the slot, and how often each byte was wanted."""
    slot = bytearray(load.slot_bytes)
    wanted = [[0] * FILE_BYTES for _ in range(NUM_FILES)]
    pieces = list(load.pieces)
    random.Random(1).shuffle(pieces)
    for piece in pieces:
        assert piece.offset % alignment == 0
        assert piece.length % alignment == 0
        assert 0 < piece.required <= piece.length
        found = FILES[piece.file][piece.offset : piece.offset + piece.length]
        assert len(found) >= piece.required
        if piece.bounced:
            assert piece.length <= buffer_bytes
            assert piece.skip + piece.nbytes <= piece.required
            assert piece.target + piece.target_bytes <= load.slot_bytes
            source = memoryview(found)[piece.skip : piece.skip + piece.nbytes]
            target = memoryview(slot)[piece.target : piece.target + piece.target_bytes]
            if piece.codec is None:
                target[:] = source
            else:
                piece.codec(source, target)
            begin, end = piece.offset + piece.skip, piece.offset + piece.skip + piece.nbytes
        else:
            assert piece.target % alignment == 0
            assert piece.target + piece.length <= load.slot_bytes
            slot[piece.target : piece.target + len(found)] = found
            begin, end = piece.offset, piece.offset + piece.required
        for place in range(begin, end):
            wanted[piece.file][place] += 1
    assert load.read_bytes == sum(piece.length for piece in load.pieces)
    begin = load.data_offset + load.shift
    slot[load.data_offset : load.data_offset + load.nbytes] = slot[begin : begin + load.nbytes]
    return slot, wanted


def stored(extents):
    return b"".join(FILES[e.file][e.offset : e.offset + e.nbytes] for e in extents)


def times_wanted(extents):
    wanted = [[0] * FILE_BYTES for _ in range(NUM_FILES)]
    for extent in extents:
        for place in range(extent.offset, extent.offset + extent.nbytes):
            wanted[extent.file][place] += 1
    return wanted


@settings(max_examples=60, deadline=None)
@given(
    extents=extents_of(4),
    alignment=st.sampled_from([1, 512, 4096]),
    pieces=st.integers(1, 4),
    address_alignment=st.sampled_from([1, 2, 8, 64]),
)
def test_plain_bytes_arrive_once_and_in_place(extents, alignment, pieces, address_alignment):
    piece_bytes = pieces * max(alignment, 512)
    expected = stored(extents)
    load = plan_load(
        "w",
        extents,
        len(expected),
        alignment=alignment,
        piece_bytes=piece_bytes,
        address_alignment=address_alignment,
    )
    slot, wanted = carry_out(load, alignment, piece_bytes + 2 * alignment)
    assert slot[load.data_offset : load.data_offset + load.nbytes] == expected
    assert load.slot_bytes % max(alignment, 64) == 0
    assert load.data_offset % address_alignment == 0
    assert load.data_offset + load.shift + load.nbytes <= load.slot_bytes
    for found, needed in zip(wanted, times_wanted(extents), strict=True):
        # Straight into place, the superset from the block's beginning comes along.
        assert all(count >= need for count, need in zip(found, needed, strict=True))
        assert sum(found) - sum(needed) < alignment


@settings(max_examples=60, deadline=None)
@given(extents=extents_of(3), alignment=st.sampled_from([1, 512, 4096]), pieces=st.integers(1, 4), widens=st.booleans())
def test_decoded_bytes_arrive_once_and_in_place(extents, alignment, pieces, widens):
    piece_bytes = pieces * max(alignment, 512)
    extents = [Extent(file=e.file, offset=e.offset, nbytes=e.nbytes // 2 * 2) for e in extents]
    raw = stored(extents)
    expected = bytearray(2 * len(raw) if widens else len(raw) // 2)
    codec = widen if widens else narrow
    codec(raw, memoryview(expected))
    load = plan_load("w", extents, len(expected), alignment=alignment, piece_bytes=piece_bytes, codec=codec)
    slot, wanted = carry_out(load, alignment, piece_bytes + 2 * alignment)
    assert slot[load.data_offset : load.data_offset + load.nbytes] == expected
    assert wanted == times_wanted(extents)


def test_one_aligned_extent_is_read_straight_into_place():
    load = plan_load("w", [Extent(file=0, offset=5000, nbytes=6000)], 6000, alignment=4096, piece_bytes=4096)
    assert [(p.offset, p.length, p.required, p.target, p.bounced) for p in load.pieces] == [
        (4096, 4096, 4096, 0, False),
        (8192, 4096, 2808, 4096, False),
    ]
    assert (load.slot_bytes, load.data_offset) == (8192, 904)


@given(offset=st.integers(0, 4095), nbytes=st.integers(1, 2**20), piece_bytes=st.sampled_from([4096, 16384, 65536]))
def test_pieces_of_a_plain_tensor_are_of_one_length(offset, nbytes, piece_bytes):
    extent = Extent(file=0, offset=offset, nbytes=nbytes)
    pieces = plan_load("t", [extent], nbytes, alignment=4096, piece_bytes=piece_bytes).pieces
    assert all(piece.length == pieces[0].length <= 1.5 * piece_bytes + 4096 for piece in pieces[:-1])
    assert len(pieces) == 1 or pieces[0].length - pieces[-1].length < 4096 * len(pieces)


def test_an_address_that_does_not_suit_is_moved_down_in_place():
    load = plan_load(
        "w", [Extent(file=0, offset=5001, nbytes=800)], 800, alignment=4096, piece_bytes=4096, address_alignment=64
    )
    assert not any(piece.bounced for piece in load.pieces)
    assert (load.data_offset, load.shift) == (896, 9)


@pytest.mark.parametrize("num_extents", [1, 2])
@pytest.mark.parametrize("offset", [0, 5001])
def test_an_empty_tensor_reads_nothing(num_extents, offset):
    extents = [Extent(file=0, offset=offset, nbytes=0)] * num_extents
    load = plan_load("w", extents, 0, alignment=4096, piece_bytes=4096)
    assert (load.pieces, load.slot_bytes, load.read_bytes) == ((), 0, 0)
