"""The packed layout: what goes in comes out, whichever decoder is asked, and nothing corrupt gets through."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hermes.checkpoint import codec, layout
from hermes.checkpoint.decoder import (
    _decode_slowly,
    check_chunks,
    decode_chunks,
    encode_chunk,
    instruction_sets,
    native,
)
from hermes.errors import ReadError

RNG = np.random.default_rng(5)
GAUSSIAN = RNG.normal(0.0, 0.02, layout.CHUNK_ELEMENTS)


def bf16(values):
    return (values.astype("<f4").view("<u4") >> np.uint32(16)).astype("<u2")


def words(kind, count):
    """Elements of one kind, the dtype they are stored in, and the size a chunk of Gaussian ones may have at most."""
    values = GAUSSIAN[:count]
    return {
        "bf16": (bf16(values), "BF16", 0.71),
        "f16": (values.astype("<f2").view("<u2"), "F16", 0.89),
        "f32": (values.astype("<f4").view("<u4"), "F32", 0.8500),
        "f32 that were bf16": (bf16(values).astype("<u4") << np.uint32(16), "F32", 0.36),
        "f32 that were f16": (values.astype("<f2").astype("<f4").view("<u4"), "F32", 0.45),
        "random bits": (RNG.integers(0, 1 << 16, count).astype("<u2"), "BF16", 1.001),
        "constant": (np.full(count, 0x3F80, "<u2"), "BF16", 0.69),
        "integers": (np.arange(count, dtype="<i8"), "I64", 1.001),
    }[kind]


KINDS = ["bf16", "f16", "f32", "f32 that were bf16", "f32 that were f16", "random bits", "constant", "integers"]
DECODERS = ["reference", *instruction_sets()]


def decode(decoder, chunks, nbytes, item_bytes, number=0, skip=0):
    target = bytearray(nbytes)
    if decoder == "reference":
        fault, chunk = _decode_slowly(memoryview(chunks), memoryview(target), item_bytes, number, skip)
        if fault:
            raise ReadError(f"w: chunk {chunk} is corrupt ({fault}); pack the model again, or restore the file")
        return bytes(target)
    decode_chunks(
        memoryview(chunks),
        memoryview(target),
        where="w",
        item_bytes=item_bytes,
        number=number,
        skip=skip,
        instruction_set=decoder,
    )
    return bytes(target)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_in_comes_out_and_is_as_small_as_promised(kind, decoder):
    elements, dtype, share = words(kind, layout.CHUNK_ELEMENTS)
    chunk = encode_chunk(memoryview(elements.tobytes()), dtype, elements.itemsize, 3)
    assert len(chunk) <= share * elements.nbytes
    assert decode(decoder, chunk, elements.nbytes, elements.itemsize, 3) == elements.tobytes()


@pytest.mark.parametrize("decoder", instruction_sets())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [0, 8])
@pytest.mark.parametrize("skip", [0, 1000, 31])
def test_more_than_caches_keep(kind, decoder, shift, skip):
    """So much at once goes around them, where it is aligned."""
    elements, dtype, _ = words(kind, layout.CHUNK_ELEMENTS)
    chunks = b"".join(encode_chunk(memoryview(elements.tobytes()), dtype, elements.itemsize, i) for i in range(33))
    expected = (elements.tobytes() * 33)[skip * elements.itemsize :]
    memory = np.zeros(len(expected) + 4096, np.uint8)
    begin = -memory.ctypes.data % 64 + shift
    target = memoryview(memory)[begin : begin + len(expected)]
    decode_chunks(
        memoryview(chunks),
        target,
        where="w",
        item_bytes=elements.itemsize,
        number=0,
        skip=skip,
        instruction_set=decoder,
    )
    assert target == expected
    assert not memory[:begin].any()
    assert not memory[begin + len(expected) :].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
def test_both_encoders_write_the_same_bytes(kind, count):
    elements, dtype, _ = words(kind, count)
    content = elements.tobytes()
    chunk = codec.encode_chunk(content, dtype, elements.itemsize, 7)
    assert encode_chunk(memoryview(content), dtype, elements.itemsize, 7) == chunk
    for decoder in DECODERS:
        assert decode(decoder, chunk, elements.nbytes, elements.itemsize, 7) == content


ANY_WORDS = st.one_of(
    st.binary(min_size=4, max_size=4 * 300).map(lambda raw: raw[: len(raw) // 4 * 4]),
    st.lists(st.floats(width=32), min_size=1, max_size=300).map(lambda values: np.array(values, "<f4").tobytes()),
    st.lists(st.floats(width=16), min_size=2, max_size=300).map(
        lambda values: np.array(values[: len(values) // 2 * 2], "<f2").tobytes()
    ),
)


@given(content=ANY_WORDS, dtype=st.sampled_from(["BF16", "F16", "F32"]), data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_bits_survive_and_any_range_can_be_had(content, dtype, data):
    item_bytes = 4 if dtype == "F32" else 2
    chunk = codec.encode_chunk(content, dtype, item_bytes, 0)
    assert encode_chunk(memoryview(content), dtype, item_bytes, 0) == chunk
    count = len(content) // item_bytes
    begin = data.draw(st.integers(0, count - 1))
    end = data.draw(st.integers(begin + 1, count))
    wanted = content[begin * item_bytes : end * item_bytes]
    for decoder in DECODERS:
        assert decode(decoder, chunk, len(content), item_bytes) == content
        assert decode(decoder, chunk, len(wanted), item_bytes, 0, begin) == wanted


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_is_noticed_by_every_decoder(place, flip):
    content = bf16(GAUSSIAN[:5000]).tobytes()
    chunk = bytearray(codec.encode_chunk(content, "BF16", 2, 0))
    chunk[int(place * len(chunk))] ^= flip
    for decoder in DECODERS:
        with pytest.raises(ReadError):
            decode(decoder, bytes(chunk), len(content), 2)


@pytest.mark.skipif(native() is None, reason="the native decoder was not built")
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(0, 255), cut=st.sampled_from([0, 0, 1, 30]))
@settings(max_examples=60, deadline=None)
def test_chunks_are_checked_without_being_unpacked(place, flip, cut):
    content = bf16(GAUSSIAN[:5000]).tobytes()
    chunks = bytearray(b"".join(codec.encode_chunk(content, "BF16", 2, number) for number in (7, 8)))
    chunks[int(place * len(chunks))] ^= flip
    found = memoryview(chunks)[: len(chunks) - cut]
    if not flip and not cut:
        check_chunks(found, where="w", number=7)
        return
    with pytest.raises(ReadError, match=r"^w: chunk (7|8|9) is corrupt"):
        check_chunks(found, where="w", number=7)


@given(
    content=st.binary(max_size=400),
    head=st.tuples(*[st.integers(0, 7), st.integers(0, 255), st.just(0), st.just(0), st.integers(0, 200)]),
    item_bytes=st.sampled_from([1, 2, 4, 8]),
    skip=st.integers(0, 200),
    wanted=st.integers(1, 100),
)
@example(content=bytes(8), head=(0, 0, 0, 0, 8), item_bytes=1, skip=0, wanted=9)  # ends where a chunk should begin
@settings(max_examples=150, deadline=None)
def test_decoders_agree_on_nonsense_with_a_right_checksum(content, head, item_bytes, skip, wanted):
    chunk = layout.HEADER.pack(0, *head, len(content)) + content
    chunk = codec.checksum(chunk[8:]).to_bytes(8, "little") + chunk[8:]
    results = set()
    for decoder in DECODERS:
        try:
            results.add(decode(decoder, chunk, wanted * item_bytes, item_bytes, 0, skip))
        except ReadError as error:
            results.add(str(error))
    assert len(results) <= 1


def test_a_chunk_in_another_ones_place_is_named():
    content = bf16(GAUSSIAN).tobytes()
    chunks = encode_chunk(memoryview(content), "BF16", 2, 0) + encode_chunk(memoryview(content), "BF16", 2, 2)
    for decoder in instruction_sets() or [""]:
        with pytest.raises(ReadError, match=r"^w: chunk 1 is corrupt \(header makes no sense\)"):
            decode_chunks(
                memoryview(chunks),
                memoryview(bytearray(2 * len(content))),
                where="w",
                item_bytes=2,
                number=0,
                instruction_set=decoder,
            )


def test_the_reference_decodes_ranges_too(monkeypatch):
    monkeypatch.setattr("hermes.checkpoint.decoder.native", lambda: None)
    content = bf16(GAUSSIAN).tobytes()
    chunks = b"".join(encode_chunk(memoryview(content), "BF16", 2, number) for number in (4, 5))
    target = memoryview(bytearray(70_000))
    decode_chunks(memoryview(chunks), target, where="w", item_bytes=2, number=4, skip=1000)
    assert bytes(target) == (content + content)[2000:72_000]
    with pytest.raises(ReadError, match="chunk 6 is corrupt"):
        decode_chunks(memoryview(chunks), memoryview(bytearray(200_000)), where="w", item_bytes=2, number=4)
