"""From a path to a `Checkpoint`: which files hold the weights, and what each of them holds.

A file is known by its first bytes, not by its suffix. A directory is searched in the order transformers uses. Hub ids
become directories in `hub`; tensor names are left as they are stored.
"""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from hermes.checkpoint.chunks import PackedFile
from hermes.checkpoint.index import Checkpoint, FileStamp, QuantizedTensor, TensorEntry
from hermes.checkpoint.packed import FORMAT, read_packed
from hermes.checkpoint.quantized import FORMAT as QUANTIZED_FORMAT
from hermes.checkpoint.quantized import read_quantized
from hermes.checkpoint.readers import stop_readahead
from hermes.checkpoint.safetensors import read_header
from hermes.checkpoint.torch_zip import read_torch_zip
from hermes.errors import CheckpointError

__all__ = ["WEIGHT_FILES", "open_checkpoint"]

#: Looked for in a directory, in this order.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDEX_SUFFIX = ".index.json"
_MAX_INDEX_BYTES = 100_000_000
_AGAIN = "download or save it again"
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Every tensor of the weight file, index file or Hub-layout directory at `path`; reads headers only.

    Symbolic links are followed (the Hub's cache is made of them). Raises CheckpointError.
    """
    # Absolute: the readers look at the path again later, whatever the working directory is by then.
    found = Path(path).absolute()
    if os.path.isdir(found):
        found = _weights_in(found)
    if found.name.endswith(_INDEX_SUFFIX):
        return _open_shards(found)
    stamp = _stamp(found)
    tensors, packed, quantized = _read_tensors(found, 0)
    return Checkpoint(files=(stamp,), tensors=tensors, packed={0: packed} if packed else {}, quantized=quantized)


def _weights_in(directory: Path) -> Path:
    """The weight or index file of a model directory."""
    for name in WEIGHT_FILES:
        # A dangling link counts as there, so that the message is about it and not about a file that comes later.
        if os.path.lexists(directory / name):
            return directory / name
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".safetensors"))
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed: {error.strerror or error}") from error
    if len(names) == 1:
        return directory / names[0]
    found = f"{len(names)} *.safetensors files and no index" if names else "none of them"
    raise CheckpointError(
        f"{directory}: no weights: looked for {', '.join(WEIGHT_FILES)} or a single *.safetensors, found {found}; "
        "give the weight file itself, or download or save the model again"
    )


def _stamp(path: Path) -> FileStamp:
    """The file as it is now; CheckpointError unless it is a regular file (opening a pipe would wait for ever)."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file{' (a dangling link)' * path.is_symlink()}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file; give a weight file or a model directory")
    return FileStamp(path=path, nbytes=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino)


def _read_tensors(
    path: Path, file: int
) -> tuple[dict[str, TensorEntry], PackedFile | None, dict[str, QuantizedTensor]]:
    """The tensors of one weight file, by what its first bytes say it is, and how they are packed or quantised."""
    packed = None
    quantized: dict[str, QuantizedTensor] = {}
    try:
        with open(path, "rb") as stream:
            stop_readahead(stream.fileno())
            start = stream.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; run git lfs pull, or download the model")
    if start.startswith(_LEGACY_TORCH):
        raise CheckpointError(
            f"{path}: PyTorch's format from before 1.6 cannot be read in place; "
            "load it with torch.load and save it again with torch.save of a recent version"
        )
    if start.startswith(b"PK\x03\x04"):
        tensors = read_torch_zip(path, file)
    elif start[8:9] == b"{" or path.suffix == ".safetensors":
        tensors, metadata = read_header(path, file)
        if metadata.get("format", "").startswith(FORMAT.rpartition("-")[0]):
            tensors, packed = read_packed(path, file, tensors, metadata)
        elif metadata.get("format", "").startswith(QUANTIZED_FORMAT.rpartition("-")[0]):
            quantized = read_quantized(path, tensors, metadata)
    else:
        raise CheckpointError(
            f"{path}: starts with {start[:8]!r}: neither safetensors nor a torch.save archive; "
            "save the model's state_dict in one of the two"
        )
    for name in tensors:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(f"{path}: tensor name {name!r} is not valid text; save the file again") from error
    return tensors, packed, quantized


def _open_shards(index: Path) -> Checkpoint:
    """All tensors of all shards that the index names; where two shards hold one name, the index decides."""
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    files: list[FileStamp] = []
    tensors: dict[str, TensorEntry] = {}
    packed: dict[int, PackedFile] = {}
    quantized: dict[str, QuantizedTensor] = {}
    for number, shard in enumerate(shards):
        path = _shard_path(index, shard)
        if not os.path.exists(path):
            raise CheckpointError(f"{path}: no such file, but {index.name} names it; download or save the model again")
        files.append(_stamp(path))
        found, packing, matrices = _read_tensors(path, number)
        if packing is not None:
            packed[number] = packing
        for name, entry in found.items():
            home = weight_map.get(name)
            if home is None and name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is in two shards, {index.name} has none; save it again")
            if home is None or home == shard:
                tensors[name] = entry
                if name in matrices:
                    quantized[name] = matrices[name]
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{_shard_path(index, shard)}: has no tensor {name!r}, but {index.name} says so; {_AGAIN}"
            )
    return Checkpoint(files=tuple(files), tensors=tensors, packed=packed, quantized=quantized)


def _weight_map(index: Path) -> Mapping[str, str]:
    """The index's table from tensor to shard. Raises CheckpointError."""
    if (nbytes := _stamp(index).nbytes) > _MAX_INDEX_BYTES:
        raise CheckpointError(f"{index}: {nbytes} bytes, an index has at most {_MAX_INDEX_BYTES}; {_AGAIN}")
    try:
        table = json.loads(index.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        fault = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{index}: not valid JSON ({fault}); {_AGAIN}") from error
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map from tensors to shards; {_AGAIN}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index}: weight_map gives no shard for {name!r}; {_AGAIN}")
    return weight_map


def _shard_path(index: Path, shard: str) -> Path:
    """The shard beside its index. An index may not reach out of its directory."""
    relative = PurePosixPath(shard)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts or not shard.isprintable():
        raise CheckpointError(f"{index}: shard {shard[:80]!r} is not inside the index's directory; {_AGAIN}")
    return index.parent / relative
