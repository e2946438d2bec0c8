"""How a tensor comes from disk into memory: pure arithmetic over extents, alignment and piece size.

A *load* is one tensor as a block streams it: a slot of memory, and the *pieces* that Loading Agents read to fill it,
each on its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hermes.checkpoint.chunks import PackedFile
from hermes.checkpoint.index import Extent

__all__ = ["Codec", "Load", "Piece", "Place", "plan_load"]

SLOT_BYTES = 64
"""Slots are multiples of this, so that the next one starts where any element type may, even where reads need none."""

Codec = Callable[[memoryview, memoryview], None]
"""Turns stored bytes (first) into the parameter's bytes (second); called by Loading Agents, several at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One read: `length` bytes at `offset` of file number `file`, at least `required` of which must be there.

    Without `bounced` they land at `target` in the slot as they are. With it they land in the agent's own buffer, and
    the `nbytes` from `skip` on are copied, or decoded, to the `target_bytes` at `target`. `unpacked` says that they are
    whole chunks of a packed file, and that `codec` begins by unpacking them. `stored` is its place among the bytes that
    are read for the load.
    """

    file: int
    offset: int
    length: int
    required: int
    target: int
    bounced: bool = False
    skip: int = 0
    nbytes: int = 0
    target_bytes: int = 0
    codec: Codec | None = None
    unpacked: bool = False
    stored: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """One tensor's way into a slot of `slot_bytes`; its `nbytes` begin at `data_offset` of the slot in the end.

    Its pieces may leave it `shift` bytes further up: then it is moved down once all of them are there. `finish` is
    given its bytes then, and whether they are to stay: it raises if they are not what they should be, and may put such
    as stay into an order that is faster to compute with.
    """

    name: str
    slot_bytes: int
    data_offset: int
    nbytes: int
    pieces: tuple[Piece, ...]
    shift: int = 0
    finish: Callable[[memoryview, bool], None] | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes that come from disk for it."""
        return sum(piece.length for piece in self.pieces)

    @property
    def unpacked_bytes(self) -> int:
        """Of its bytes, those that agents unpack."""
        return sum(piece.target_bytes for piece in self.pieces if piece.unpacked)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a load's bytes lie: in the ring or in the resident store, from `offset` on."""

    resident: bool
    offset: int


def plan_load(
    name: str,
    extents: Sequence[Extent],
    nbytes: int,
    *,
    alignment: int,
    piece_bytes: int,
    address_alignment: int = 1,
    codec: Codec | None = None,
    packed: Mapping[int, PackedFile] | None = None,
    finish: Callable[[memoryview, bool], None] | None = None,
) -> Load:
    """The load that fills `nbytes` of a parameter from `extents` in order.

    One extent without codec is read straight into place: the slot holds the superset that is aligned for O_DIRECT, and
    the tensor begins wherever it does in the file, or at the multiple of `address_alignment` below, to which it is then
    moved; only such a load has a `finish`. Several extents, or a codec, go through the agents' buffers of `piece_bytes`
    + 2 x `alignment`. Pieces that are read straight into place are of one length, about `piece_bytes`: a last one of a
    page, as every tensor has that begins within one, takes an agent as long as the reads it waits behind.

    Extents of a file that is `packed` are read as the whole chunks that hold them, each piece at most `piece_bytes` or
    one chunk. The tensor lies in the slot where the unpacked file's would: kernels may round by address.

    **Guarantee.** Every byte of every extent is wanted by exactly one piece, and lands at its own place; the address of
    the tensor is a multiple of `address_alignment` if the slot's is.
    """
    if packed and any(extent.file in packed for extent in extents):
        lead = 0
        if len(extents) == 1 and codec is None:
            lead = extents[0].offset % alignment // address_alignment * address_alignment
        return Load(
            name=name,
            slot_bytes=_align(lead + nbytes, max(alignment, SLOT_BYTES)),
            data_offset=lead,
            nbytes=nbytes,
            pieces=tuple(_chunked(extents, nbytes, alignment, piece_bytes, codec, packed, lead)),
        )
    if len(extents) == 1 and codec is None and extents[0].nbytes:
        (extent,) = extents
        begin = extent.offset // alignment * alignment
        end = extent.offset + extent.nbytes
        length = _even_bytes(end - begin, piece_bytes, alignment)
        pieces = tuple(
            Piece(
                file=extent.file,
                offset=offset,
                length=_align(min(length, end - offset), alignment),
                required=min(length, end - offset),
                target=offset - begin,
            )
            for offset in range(begin, end, length)
        )
        slot_bytes = _align(end - begin, max(alignment, SLOT_BYTES))
        shift = (extent.offset - begin) % address_alignment
        data_offset = extent.offset - begin - shift
        return Load(
            name=name,
            slot_bytes=slot_bytes,
            data_offset=data_offset,
            nbytes=nbytes,
            pieces=pieces,
            shift=shift,
            finish=finish,
        )
    return Load(
        name=name,
        slot_bytes=_align(nbytes, max(alignment, SLOT_BYTES)),
        data_offset=0,
        nbytes=nbytes,
        pieces=tuple(_bounced(extents, nbytes, alignment, piece_bytes, codec)),
    )


def _even_bytes(nbytes: int, piece_bytes: int, alignment: int) -> int:
    """A multiple of the alignment that divides `nbytes` into pieces of `piece_bytes`, give or take a half."""
    count = max(1, (nbytes + piece_bytes // 2) // piece_bytes)
    return _align(-(-nbytes // count), alignment)


def _bounced(
    extents: Sequence[Extent], nbytes: int, alignment: int, piece_bytes: int, codec: Codec | None
) -> Iterator[Piece]:
    stored_bytes = sum(extent.nbytes for extent in extents)
    done = 0
    for extent in extents:
        for start in range(0, extent.nbytes, piece_bytes):
            wanted = min(piece_bytes, extent.nbytes - start)
            begin = (extent.offset + start) // alignment * alignment
            skip = extent.offset + start - begin
            target = done * nbytes // stored_bytes
            yield Piece(
                file=extent.file,
                offset=begin,
                length=_align(skip + wanted, alignment),
                required=skip + wanted,
                target=target,
                bounced=True,
                skip=skip,
                nbytes=wanted,
                target_bytes=(done + wanted) * nbytes // stored_bytes - target,
                codec=codec,
            )
            done += wanted


def _chunked(
    extents: Sequence[Extent],
    nbytes: int,
    alignment: int,
    piece_bytes: int,
    codec: Codec | None,
    packed: Mapping[int, PackedFile],
    lead: int,
) -> Iterator[Piece]:
    stored_bytes = sum(extent.nbytes for extent in extents)
    done = stored = 0
    for extent in extents:
        if extent.file not in packed:
            raise ValueError("a tensor that is partly packed")
        # With a codec the chunks are unpacked aside first, into as much memory as they are read into.
        aside_bytes = None if codec is None else piece_bytes
        for run in packed[extent.file].runs(
            extent.offset, extent.nbytes, run_bytes=piece_bytes, unpacked_bytes=aside_bytes
        ):
            begin = run.offset // alignment * alignment
            skip = run.offset - begin
            target = done * nbytes // stored_bytes
            done += run.unpacked_bytes
            decode = run.decoder()
            length = _align(skip + run.nbytes, alignment)
            yield Piece(
                file=extent.file,
                offset=begin,
                length=length,
                required=skip + run.nbytes,
                target=lead + target,
                bounced=True,
                skip=skip,
                nbytes=run.nbytes,
                target_bytes=done * nbytes // stored_bytes - target,
                codec=decode if codec is None else _both(decode, codec, run.unpacked_bytes),
                unpacked=True,
                stored=stored,
            )
            stored += length


def _both(first: Codec, then: Codec, nbytes: int) -> Codec:
    """One after the other, with `nbytes` between them."""

    def codec(source: memoryview, target: memoryview) -> None:
        between = memoryview(bytearray(nbytes))
        first(source, between)
        then(between, target)

    return codec


def _align(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
