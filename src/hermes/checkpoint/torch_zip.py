"""Where the tensors of a PyTorch zip checkpoint (`torch.save`: .bin, .pt, .pth) lie, without running its pickle.

The pickle is interpreted here, opcode by opcode, over stand-ins of our own: globals become plain names, of which only
those that `torch.load(weights_only=True)` needs are accepted, and calling one never calls anything but `_reduce`.
Python's own Unpickler will not do even with `find_class` overridden: extension opcodes go past it, and one corrupt
memo index makes it allocate tens of gigabytes.

Only stored (uncompressed) records of little-endian files are read in place; the bytes themselves are for `readers`.
"""

import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from hermes.checkpoint.index import DTYPE_BYTES, Extent, TensorEntry
from hermes.checkpoint.readers import forget, stop_readahead
from hermes.errors import CheckpointError

__all__ = ["MAX_PICKLE_BYTES", "read_torch_zip"]

#: The pickle holds names and shapes only; a larger one is corrupt, or hides data where it does not belong.
MAX_PICKLE_BYTES = 100_000_000
_MAX_DIMENSIONS = 64
_MAX_SIZE = 2**63 - 1
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_AGAIN = "download or save it again"
_RESAVE = "load it with torch.load and save its state_dict again with torch.save"

_STORAGES: Mapping[str, str] = {
    "torch.BoolStorage": "BOOL", "torch.ByteStorage": "U8", "torch.CharStorage": "I8", "torch.ShortStorage": "I16",
    "torch.IntStorage": "I32", "torch.LongStorage": "I64", "torch.HalfStorage": "F16", "torch.BFloat16Storage": "BF16",
    "torch.FloatStorage": "F32", "torch.DoubleStorage": "F64", "torch.ComplexFloatStorage": "C64",
    "torch.UntypedStorage": "U8", "torch.storage.UntypedStorage": "U8",
}  # fmt: skip
_DTYPES: Mapping[str, str] = {
    "torch.bool": "BOOL", "torch.uint8": "U8", "torch.int8": "I8", "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2", "torch.int16": "I16", "torch.uint16": "U16", "torch.float16": "F16",
    "torch.bfloat16": "BF16", "torch.int32": "I32", "torch.uint32": "U32", "torch.float32": "F32",
    "torch.int64": "I64", "torch.uint64": "U64", "torch.float64": "F64", "torch.complex64": "C64",
}  # fmt: skip
_TABLES = {"collections.OrderedDict", "collections.Counter", "builtins.dict"}
_TENSORS = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_TYPED_TENSOR = "torch._tensor._rebuild_from_type_v2"
#: Values that no weight depends on: accepted, and never made.
_IGNORED = {
    "builtins.set", "builtins.frozenset", "builtins.complex", "builtins.bytearray", "builtins.slice", "_codecs.encode",
    "torch.device", "torch.serialization._get_layout", "torch.Tensor", "torch.nn.parameter.Parameter",
    "torch.storage.TypedStorage", "torch.complex32", "torch.complex128", "torch.ComplexDoubleStorage",
}  # fmt: skip
_ALLOWED = {*_STORAGES, *_DTYPES, *_TABLES, *_TENSORS, *_PARAMETERS, *_IGNORED, _TYPED_TENSOR, "torch.Size"}


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    dtype: str
    storage_offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_lazy: bool
    """True for a conjugate or negative view: its bytes are not its values."""


_T = TypeVar("_T")
_OPAQUE = object()
_NO_OPERANDS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NEW: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip


def read_torch_zip(path: Path, file: int) -> dict[str, TensorEntry]:
    """Tensors of the state dict in the archive at `path`, number `file` of its checkpoint; tied ones share an extent.

    The state dict is the pickled object itself or lies under "state_dict", "model" or "model_state_dict"; values that
    are no tensors are passed over. Raises CheckpointError; executes nothing.
    """
    try:
        with open(path, "rb") as stream:
            archive = _Archive(path, stream)
            pickled = archive.read("data.pkl")
            try:
                saved = _interpret(pickled)
            except _Refused as error:
                raise CheckpointError(f"{path}: {error}") from error
            # Warning: pickletools gives one for a stray backslash, an exception where warnings are errors.
            except (ValueError, TypeError, IndexError, KeyError, Warning) as error:
                fault = " ".join(str(error).split())[:120]
                raise CheckpointError(f"{path}: data.pkl is corrupt ({fault}); {_AGAIN}") from error
            tensors = _state_dict(path, saved)
            return {name: _entry(archive, file, name, tensor) for name, tensor in tensors.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Archive:
    """Records of a zip file by name, located but not unpacked. `zipfile` reads the directory, zip64 included."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        self._stream = stream
        self._file_bytes = os.fstat(stream.fileno()).st_size
        self._places: dict[str, tuple[int, int]] = {}
        stop_readahead(stream.fileno())
        try:
            with zipfile.ZipFile(stream) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, EOFError, struct.error) as error:
            fault = " ".join(str(error).split())[:120]
            raise CheckpointError(f"{path}: not a whole zip archive ({fault}); {_AGAIN}") from error
        # The directory is at the end, behind every record.
        last = max((info.header_offset for info in infos), default=0)
        forget(stream.fileno(), last, self._file_bytes - last)
        roots = [info.filename.removesuffix("data.pkl") for info in infos if info.filename.endswith("/data.pkl")]
        if len(roots) != 1:
            raise CheckpointError(f"{path}: {len(roots)} data.pkl records, a torch.save archive has one; {_RESAVE}")
        inside = [info for info in infos if info.filename.startswith(roots[0])]
        self._records = {info.filename.removeprefix(roots[0]): info for info in inside}
        if len(self._records) < len(inside):
            raise CheckpointError(f"{path}: two records of the archive have one name; {_RESAVE}")
        if "constants.pkl" in self._records:
            raise CheckpointError(f"{path}: a TorchScript program, not a state dict; save model.state_dict() instead")
        # Written since torch 2.1; before that only little-endian machines wrote such files.
        if "byteorder" in self._records and (order := self.read("byteorder").strip()) != b"little":
            raise CheckpointError(f"{path}: byte order is {order[:20]!r}, only little is read in place; {_RESAVE}")

    def read(self, name: str) -> bytes:
        """A small record's bytes. Its checksum is not looked at: torch can be told to leave it out."""
        offset, nbytes = self.locate(name)
        if nbytes > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{self.path}: {name} has {nbytes} bytes, the limit is {MAX_PICKLE_BYTES}; {_RESAVE}")
        return self._pread(offset, nbytes)

    def locate(self, name: str) -> tuple[int, int]:
        """Offset in the file and bytes of a stored record, all of it inside the file. Raises CheckpointError."""
        if name not in self._places:
            self._places[name] = self._locate(name)
        return self._places[name]

    def _locate(self, name: str) -> tuple[int, int]:
        info = self._records.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: record {name!r} is missing from the archive; {_AGAIN}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise CheckpointError(f"{self.path}: record {name!r} is compressed or encrypted; {_RESAVE}")
        header = self._pread(info.header_offset, 30) if 0 <= info.header_offset < self._file_bytes else b""
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise CheckpointError(
                f"{self.path}: no record starts at byte {info.header_offset}, where {name!r} should; {_AGAIN}"
            )
        # The local name and padding may be longer than the directory's: torch aligns data with them.
        name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
        offset = info.header_offset + 30 + name_bytes + extra_bytes
        if offset + info.file_size > self._file_bytes:
            raise CheckpointError(
                f"{self.path}: record {name!r} ends at byte {offset + info.file_size}, the file at "
                f"{self._file_bytes}: truncated; {_AGAIN}"
            )
        return offset, info.file_size

    def _pread(self, offset: int, nbytes: int) -> bytes:
        self._stream.seek(offset)
        found = self._stream.read(nbytes)
        forget(self._stream.fileno(), offset, nbytes + io.DEFAULT_BUFFER_SIZE)
        return found


class _Refused(Exception):
    """The pickle asks for something that a state dict does not need; the message says what and what to do."""


def _interpret(pickled: bytes) -> object:
    """What the pickle describes, in dicts, lists, tuples, plain values and the stand-ins above.

    No recursion, so no nesting is too deep. What it raises means that the pickle is corrupt or refused.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    num_entries = 0
    for opcode, argument, _ in pickletools.genops(pickled):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case name if name in _NO_OPERANDS:
                stack.append(_NO_OPERANDS[name])
            case name if name in _NEW:
                stack.append(_NEW[name]())
            case name if name in _LITERALS:
                stack.append(argument)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_top(stack, int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(_top(stack, len(stack) - marks.pop())))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = _top(stack, 1 if opcode.name == "APPEND" else len(stack) - marks.pop())
                _of(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = _top(stack, 2 if opcode.name == "SETITEM" else len(stack) - marks.pop())
                _fill(_of(dict, stack[-1]), list(zip(items[::2], items[1::2], strict=True)))
            case "BINPUT" | "LONG_BINPUT":
                memo[_of(int, argument)] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[_of(int, argument)])
            case "GLOBAL":
                module, _, member = str(argument).partition(" ")
                stack.append(_global(module, member))
            case "STACK_GLOBAL":
                module, member = _top(stack, 2)
                stack.append(_global(_of(str, module), _of(str, member)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                name, arguments = _call(*_top(stack, 2))
                # An entry takes a byte of the pickle at least, but one list could be asked for again and again.
                num_entries += sum(len(argument) for argument in arguments if type(argument) is list)
                if num_entries > len(pickled):
                    raise _Refused(
                        f"its pickle of {len(pickled)} bytes makes {num_entries} entries of lists; {_RESAVE}"
                    )
                stack.append(_reduce(name, arguments))
            case "BUILD":
                # Attributes (a state dict's _metadata): no weight depends on them.
                _top(stack, 1)
            case other:
                raise _Refused(f"pickle opcode {other}, which torch.save does not write for weights; {_RESAVE}")
    raise ValueError("no STOP")


def _top(stack: list[Any], count: int) -> list[Any]:
    """Pop the last `count` values, in order."""
    if not 0 <= count <= len(stack):
        raise IndexError("stack underflow")
    values = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return values


def _of(kind: type[_T], value: object) -> _T:
    """The value itself; TypeError unless it is exactly of this kind."""
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} where a {kind.__name__} belongs")
    return value


def _sizes(value: object) -> tuple[int, ...]:
    """A shape or stride as it came; TypeError unless it is a tuple of few whole numbers."""
    sizes = _of(tuple, value)
    if len(sizes) > _MAX_DIMENSIONS or not all(type(size) is int and 0 <= size <= _MAX_SIZE for size in sizes):
        raise TypeError(f"a shape or stride is not made of at most {_MAX_DIMENSIONS} whole numbers")
    return sizes


def _fill(table: dict[str, Any], pairs: Iterable[Sequence[Any]]) -> None:
    # Only text names a weight. Other keys are left out, and never hashed: a nested one could exhaust the C stack.
    table.update((key, value) for key, value in pairs if type(key) is str)


def _global(module: str, member: str) -> _Global:
    name = f"{module.replace('__builtin__', 'builtins')}.{member}"
    if name not in _ALLOWED:
        raise _Refused(f"its pickle refers to {name[:80]!r}, which no state dict needs and is never run; {_RESAVE}")
    return _Global(name)


def _storage(persistent: object) -> _Storage:
    """The storage of a persistent id: ("storage", type, key, location, number of elements)."""
    tag, kind, key, _, numel = _of(tuple, persistent)
    if tag != "storage":
        raise ValueError("a persistent id is not a storage")
    name = _of(_Global, kind).name
    (count,) = _sizes((numel,))
    return _Storage(_STORAGES.get(name, name), _of(str, key), count)


def _call(function: object, arguments: object) -> tuple[str, tuple[Any, ...]]:
    """The name of what is called, and with what; of a tensor of some class, how the tensor is made."""
    name, given = _of(_Global, function).name, _of(tuple, arguments)
    if name == _TYPED_TENSOR:
        function, _, arguments, _ = given
        name, given = _of(_Global, function).name, _of(tuple, arguments)
    return name, given


def _reduce(name: str, arguments: tuple[Any, ...]) -> object:
    """What calling the global would have given, as a stand-in."""
    if name in _TABLES:
        table: dict[str, Any] = {}
        _fill(table, _of(list, arguments[0]) if arguments else ())
        return table
    if name in _TENSORS:
        storage, offset, shape, stride, *rest = arguments
        storage, dtype = _of(_Storage, storage), storage.kind
        if name.endswith("_v3"):
            dtype_name = _of(_Global, rest.pop(2)).name
            dtype = _DTYPES.get(dtype_name, dtype_name)
        (first,) = _sizes((offset,))
        return _Tensor(storage, dtype, first, _sizes(shape), _sizes(stride), bool(rest[2:] and rest[2]))
    if name in _PARAMETERS:
        return arguments[0]
    if name == "torch.Size":
        return _sizes(arguments[0])
    return _OPAQUE


def _state_dict(path: Path, saved: object) -> dict[str, _Tensor]:
    """The tensors by name, out of their wrapper if they are in one."""
    tables = [saved.get(wrapper) for wrapper in _WRAPPERS] if isinstance(saved, dict) else []
    for table in (*tables, saved):
        if isinstance(table, dict):
            tensors = {name: value for name, value in table.items() if isinstance(value, _Tensor)}
            if tensors:
                return tensors
    raise CheckpointError(
        f"{path}: no tensors at the top level or under {', '.join(_WRAPPERS)}: not a state dict; {_RESAVE}"
    )


def _entry(archive: _Archive, file: int, name: str, tensor: _Tensor) -> TensorEntry:
    """Where a tensor's bytes lie; CheckpointError when they are not there, or are not its values in order."""
    path, storage = archive.path, tensor.storage
    for dtype in (storage.kind, tensor.dtype):
        if dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{path}: tensor {name!r} is of {dtype}, a dtype Hermes does not know; convert it")
    if tensor.is_lazy:
        raise CheckpointError(f"{path}: tensor {name!r} is a lazy conj or neg view; re-save it resolved")
    item_bytes = DTYPE_BYTES[tensor.dtype]
    nbytes = math.prod(tensor.shape) * item_bytes
    if nbytes == 0:
        return TensorEntry(
            name=name, dtype=tensor.dtype, shape=tensor.shape, extent=Extent(file=file, offset=0, nbytes=0)
        )
    if not _is_contiguous(tensor):
        raise CheckpointError(f"{path}: tensor {name!r} is non-contiguous; re-save with .contiguous()")
    offset, record_bytes = archive.locate(f"data/{storage.key}")
    storage_bytes = storage.numel * DTYPE_BYTES[storage.kind]
    end = tensor.storage_offset * item_bytes + nbytes
    if end > min(storage_bytes, record_bytes) or storage_bytes > record_bytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} needs {end} bytes of a storage of {storage_bytes}, "
            f"its record has {record_bytes}; download or save the file again"
        )
    extent = Extent(file=file, offset=offset + tensor.storage_offset * item_bytes, nbytes=nbytes)
    return TensorEntry(name=name, dtype=tensor.dtype, shape=tensor.shape, extent=extent)


def _is_contiguous(tensor: _Tensor) -> bool:
    """True when elements follow each other in row-major order; the stride of a single element says nothing."""
    if len(tensor.shape) != len(tensor.stride):
        return False
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True
