"""The header of a packed file, read without trusting it: the tensors of the unpacked file, and the places of chunks.

What is done with the places is in `chunks`; `docs/format.md` describes the file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hermes.checkpoint.chunks import PackedFile, PackedTensor, num_chunks
from hermes.checkpoint.decoder import warn_if_slow
from hermes.checkpoint.index import DTYPE_BYTES, TensorEntry
from hermes.checkpoint.layout import HEADER_BYTES
from hermes.checkpoint.readers import forget, stop_readahead
from hermes.checkpoint.safetensors import parse_header
from hermes.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["FORMAT", "SOURCE_HEADER", "TABLE_NAME", "read_packed"]

FORMAT = "hermes-pack-1"
"""Of the metadata's "format"; transformers refuses a format that it does not know."""
SOURCE_HEADER = "source_header"
"""In the metadata: the header of the unpacked file, padding included."""
TABLE_NAME = "hermes.chunk_bytes"
"""The last tensor: the size of every chunk, four bytes each, tensor by tensor."""
_AGAIN = "pack the model again"


def read_packed(
    path: Path, file: int, stored: Mapping[str, TensorEntry], metadata: Mapping[str, str]
) -> tuple[dict[str, TensorEntry], PackedFile]:
    """The tensors as they are in the unpacked file, and where their chunks are; `stored` are those of the header.

    Every chunk lies inside its own tensor's bytes. Raises CheckpointError.
    """
    import numpy as np  # only where something is packed: it costs memory

    if metadata["format"] != FORMAT:
        raise CheckpointError(f"{path}: packed as {metadata['format']}, this Hermes reads {FORMAT}; {_AGAIN}")
    warn_if_slow()
    text = metadata.get(SOURCE_HEADER, "").encode()
    entries, _ = parse_header(path, file, text, None)
    if {*entries, TABLE_NAME} != set(stored):
        raise CheckpointError(f"{path}: packed tensors are not those of the unpacked file's header; {_AGAIN}")
    table = _read_table(path, stored[TABLE_NAME])
    tensors = []
    position = 0
    for name, entry in entries.items():
        count = num_chunks(entry.numel)
        home = stored[name]
        sizes = table[position : position + count]
        position += count
        if home.dtype != "U8" or sizes.size < count or int(sizes.sum()) != home.extent.nbytes:
            raise CheckpointError(f"{path}: tensor {name!r} is not as long as its {count} chunks; {_AGAIN}")
        if sizes.size and int(sizes.min()) <= HEADER_BYTES:
            raise CheckpointError(f"{path}: tensor {name!r} has a chunk of {int(sizes.min())} bytes; {_AGAIN}")
        if entry.extent.nbytes:
            places = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64) + home.extent.offset
            tensors.append(
                PackedTensor(
                    name=name,
                    path=path,
                    item_bytes=DTYPE_BYTES[entry.dtype],
                    begin=entry.extent.offset,
                    nbytes=entry.extent.nbytes,
                    places=places,
                )
            )
    if position != table.size:
        raise CheckpointError(f"{path}: {table.size} chunk sizes for {position} chunks; {_AGAIN}")
    return entries, PackedFile(tensors=tensors)


def _read_table(path: Path, entry: TensorEntry) -> "NDArray[np.int64]":
    import numpy as np

    if entry.dtype != "U8" or entry.extent.nbytes % 4:
        raise CheckpointError(f"{path}: its table of chunks is {entry.extent.nbytes} of {entry.dtype}; {_AGAIN}")
    try:
        with open(path, "rb") as stream:
            stop_readahead(stream.fileno())
            stream.seek(entry.extent.offset)
            content = stream.read(entry.extent.nbytes)
            forget(stream.fileno(), entry.extent.offset, entry.extent.nbytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(content) < entry.extent.nbytes:
        raise CheckpointError(f"{path}: truncated in its table of chunks; {_AGAIN}")
    return np.frombuffer(content, dtype="<u4").astype(np.int64)
