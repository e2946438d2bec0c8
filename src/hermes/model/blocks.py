"""From units to what the engine moves (`Load`s) and what the model sees (`Bound` parameters over that memory)."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hermes.checkpoint.chunks import PackedFile
from hermes.checkpoint.index import DTYPE_BYTES, Extent
from hermes.model.mapping import Source, is_plain_linear, weight_of
from hermes.model.product import PackedRows, Ranges, finish, linear, multiply_range
from hermes.model.quantized import SCALE_BYTES, QuantizedRows
from hermes.model.stray import Stray
from hermes.model.units import Unit
from hermes.pipeload import Codec, Load, Place, plan_load

__all__ = ["Block", "Bound", "LoadFactory", "Matrix", "torch_dtype"]

_TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip

CACHE_LINE_BYTES = 64


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors spelling."""
    return _TORCH_DTYPES[name]


class Home:
    """Where a model looks for one tensor: every module that has it, tied ones included."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.tensor = tensor
        self.tables: list[tuple[dict[str, Any], str]] = []
        self._placeholder = tensor

    def put(self, tensor: torch.Tensor) -> None:
        """Let the model find this."""
        for table, name in self.tables:
            table[name] = tensor

    def vacate(self) -> None:
        """Let the model find the placeholder on the meta device."""
        self.put(self._placeholder)

    def watch(self, adopt: Callable[[str], torch.Tensor], device: torch.device) -> None:
        """From now on the placeholder, which says that it is on `device`, calls `adopt` when it is computed with; once.

        What it brings stays, for the next time.
        """
        if isinstance(self.tensor, nn.Parameter):
            self._placeholder = Stray(self.tensor, functools.cache(functools.partial(adopt, self.name)), device)
        self.vacate()


class Bound:
    """One parameter (or row range of one) as the model sees it while its bytes are in memory.

    `bind` points the live tensor at the bytes and puts it where the module looks for it; `unbind` puts the placeholder
    back. A range of rows has no home: whoever asked for it takes `live`.
    """

    def __init__(
        self,
        home: Home,
        loads: range,
        source: Source,
        rows: tuple[int, int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        tensor = home.tensor
        self.loads = loads
        self.live: torch.Tensor = torch.empty(0, dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            self.live = nn.Parameter(self.live, tensor.requires_grad)  # torch chooses products by that, too
        self._home = home if rows is None else None
        self._whole_rows = None if rows is None else tensor.shape[0]
        self._shape = tuple(tensor.shape) if rows is None else (rows[1] - rows[0], *tensor.shape[1:])
        self._stride = _contiguous_stride(self._shape)
        self._item_bytes = tensor.element_size()
        self._source = source
        self._place: Place | None = None

    @property
    def is_view(self) -> bool:
        """Whether it takes no memory but the loads' own."""
        return self._source.convert is None

    def bind(self, memory: Callable[[Place], torch.UntypedStorage], places: Sequence[Place]) -> None:
        """Point at the bytes; `places` are those of all loads of the block."""
        if self._source.convert is None:
            place = places[self.loads.start]
            if place != self._place:  # resident ones stay where they are
                with torch.no_grad():
                    self.live.set_(memory(place), place.offset // self._item_bytes, self._shape, self._stride)
                self._place = place
        else:
            with torch.no_grad():
                self.live.set_(self._convert(memory, places))  # type: ignore[call-overload]
        if self._home is not None:
            self._home.put(self.live)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`product.linear` with what is bound."""
        return linear(x, self.live, bias, self._whole_rows)

    def multiply_range(self, ranges: Ranges, begin: int, bias: torch.Tensor | None) -> None:
        """`product.multiply_range` with what is bound."""
        multiply_range(ranges, begin, self.live, bias, self._whole_rows or self._shape[0])

    def write_to(self, target: torch.Tensor) -> None:
        """Copy what is bound."""
        target.copy_(self.live)

    def unbind(self) -> None:
        """Forget the bytes; they may be anybody's from now on."""
        if self._home is not None:
            self._home.vacate()

    def _convert(self, memory: Callable[[Place], torch.UntypedStorage], places: Sequence[Place]) -> torch.Tensor:
        source = self._source
        if source.convert is None or source.shapes is None:
            raise ValueError("nothing to convert")
        dtype = torch_dtype(source.dtype)
        raw = []
        for load, shape in zip(self.loads, source.shapes, strict=True):
            place, tensor = places[load], torch.empty(0, dtype=dtype, device=self.live.device)
            tensor.set_(memory(place), place.offset // tensor.element_size(), shape, _contiguous_stride(shape))
            raw.append(tensor)
        return source.convert(raw).to(self.live.dtype).contiguous()


Matrix = Bound | PackedRows | QuantizedRows


@dataclass(frozen=True, kw_only=True)
class Block:
    """What is loaded, computed and released together.

    Attributes:
        name: its unit's, or the first one's and the last one's.
        loads: in order.
        bound: every parameter of it.
        matrices: those of linear layers that are all their module has or are quantised, by module.
    """

    name: str
    loads: tuple[Load, ...]
    bound: tuple[Matrix, ...]
    matrices: Mapping[str, Matrix] = field(default_factory=dict)


class LoadFactory:
    """Makes blocks of one skeleton, for one reader's alignment and one piece size.

    Tensors lie in memory as they would if they were resident, because kernels may round by address: MKL's fp32
    matrix-vector product differs, on some CPUs, where the matrix begins at an odd multiple of 8 bytes. transformers
    maps safetensors files into memory, so there a tensor lies as in its file; with `cache_lines`, it begins at a cache
    line, as whatever torch has allocated itself does.

    The matrices of units that are in `stay_packed` come into memory as they lie on disk. Parameters are bound over
    memory of `device`, else the host's.
    """

    def __init__(
        self,
        module: nn.Module,
        sources: Mapping[str, Source],
        *,
        alignment: int,
        piece_bytes: int,
        cache_lines: bool,
        packed: Mapping[int, PackedFile] | None = None,
        stay_packed: Set[str] = frozenset(),
        device: torch.device | None = None,
    ) -> None:
        self._sources = sources
        self._device = device
        self._packed = packed or {}
        self._stay_packed = stay_packed
        self._alignment = alignment
        self._piece_bytes = piece_bytes
        self._address_alignment = CACHE_LINE_BYTES if cache_lines else 1
        homes: dict[int, Home] = {}
        self._homes: dict[str, Home] = {}
        for prefix, child in module.named_modules(remove_duplicate=False):
            for table in (child._parameters, child._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        path = f"{prefix}.{name}" if prefix else name
                        home = homes.setdefault(id(tensor), Home(path, tensor))
                        home.tables.append((table, name))
                        self._homes[path] = home
        for name in sources:
            self._homes[name].name = name
        quantized = {id(self._homes[name]) for name, source in sources.items() if source.quantized}
        self._linears = {
            prefix: home
            for prefix, child in module.named_modules()
            if is_plain_linear(child) and id(home := self._homes[weight_of(prefix)]) in quantized
        }

    @property
    def buffer_bytes(self) -> int:
        """What an agent needs for a piece that cannot be read straight into place.

        If packed, once more for what is unpacked before it is cast.
        """
        files = self._packed.values()
        read_bytes = max([self._piece_bytes, *(file.largest_chunk_bytes for file in files)])
        aside_bytes = max([self._piece_bytes, *(file.largest_unpacked_bytes for file in files)])
        casts = any(
            torch_dtype(source.dtype) != self._homes[name].tensor.dtype
            for name, source in self._sources.items()
            if source.convert is None
        )
        return read_bytes + 2 * self._alignment + (aside_bytes if files and casts else 0)

    def block(self, units: Iterable[Unit]) -> Block:
        """The block of these units."""
        loads: list[Load] = []
        bound: list[Matrix] = []
        matrices: dict[str, Matrix] = {}
        units = list(units)
        for unit in units:
            for parameter in unit.parameters:
                if parameter in self._stay_packed:
                    bound.append(self._add_packed(parameter, unit.rows, loads))
                elif self._linears.get(unit.module) is self._homes[parameter]:
                    bound.append(self._add_quantized(parameter, loads))
                else:
                    bound.append(self._add(parameter, unit.rows, loads))
                if len(unit.parameters) == 1 or isinstance(bound[-1], QuantizedRows):
                    matrices[unit.module] = bound[-1]
        name = units[0].name if len(units) == 1 else f"{units[0].name} .. {units[-1].name}"
        return Block(name=name, loads=tuple(loads), bound=tuple(bound), matrices=matrices)

    def pinned(self, names: Iterable[str]) -> Block:
        """Parameters and buffers that stay."""
        loads: list[Load] = []
        bound = [self._add(name, None, loads) for name in names]
        return Block(name="pinned", loads=tuple(loads), bound=tuple(bound))

    @property
    def homes(self) -> list[Home]:
        """Of everything that is on disk."""
        return [self._homes[name] for name in self._sources]

    def canonical(self, name: str) -> str:
        """The name on disk of the tensor that the model has under `name`."""
        return self._homes[name].name

    def empty_rows(self, name: str, num_rows: int) -> torch.Tensor:
        """Memory for that many rows of a parameter."""
        tensor = self._homes[name].tensor
        return torch.empty(num_rows, *tensor.shape[1:], dtype=tensor.dtype)

    def rows(self, name: str, begin: int, end: int) -> Load:
        """Rows `begin` to `end` of a parameter."""
        return self._plain(name, (begin, end))

    def parts(self, load: Load, most_bytes: int) -> list[Load]:
        """`load` as loads of at most so many bytes each, in order; as it is where it cannot be read by rows."""
        source, shape = self._sources[load.name], self._homes[load.name].tensor.shape
        if load.nbytes <= most_bytes or source.convert is not None or len(source.extents) > 1:
            return [load]
        step = max(1, most_bytes * shape[0] // load.nbytes)
        return [self.rows(load.name, begin, min(begin + step, shape[0])) for begin in range(0, shape[0], step)]

    def _add_packed(self, name: str, rows: tuple[int, int] | None, loads: list[Load]) -> PackedRows:
        """A load of whole chunks, which are read straight into place."""
        extent, shape = self._rows_of(name, rows)
        run = self._packed[extent.file].run(extent.offset, extent.nbytes)
        chunks = Extent(file=extent.file, offset=run.offset, nbytes=run.nbytes)
        loads.append(
            plan_load(
                name,
                [chunks],
                run.nbytes,
                alignment=self._alignment,
                piece_bytes=self._piece_bytes,
                finish=functools.partial(finish, run, (shape[0], shape[1])),
            )
        )
        return PackedRows(run, len(loads) - 1, (shape[0], shape[1]), self._homes[name].tensor.shape[0])

    def _add_quantized(self, name: str, loads: list[Load]) -> QuantizedRows:
        entry = self._sources[name].quantized
        if entry is None:
            raise ValueError(f"{name} is not quantised")
        loads += self._parts(name)
        return QuantizedRows(entry, len(loads) - 2)

    def _add(self, name: str, rows: tuple[int, int] | None, loads: list[Load]) -> Bound:
        source = self._sources[name]
        first = len(loads)
        if source.convert is None:
            loads.append(self._plain(name, rows))
        else:
            loads += self._parts(name)
        return Bound(self._homes[name], range(first, len(loads)), source, rows, self._device)

    def _parts(self, name: str) -> list[Load]:
        """One load for each extent of a parameter, as stored."""
        source = self._sources[name]
        item_bytes = SCALE_BYTES if source.quantized else DTYPE_BYTES[source.dtype]
        return [
            plan_load(
                name,
                [extent],
                extent.nbytes,
                alignment=self._alignment,
                piece_bytes=self._piece_bytes,
                address_alignment=max(self._address_alignment, item_bytes),
                packed=self._packed,
            )
            for extent in source.extents
        ]

    def _rows_of(self, name: str, rows: tuple[int, int] | None) -> tuple[Extent, list[int]]:
        """Where they are, of a parameter that is one extent, and their shape."""
        (extent,), shape = self._sources[name].extents, list(self._homes[name].tensor.shape)
        if rows is None:
            return extent, shape
        row_bytes = extent.nbytes // shape[0]
        offset, nbytes = extent.offset + rows[0] * row_bytes, (rows[1] - rows[0]) * row_bytes
        return Extent(file=extent.file, offset=offset, nbytes=nbytes), [rows[1] - rows[0], *shape[1:]]

    def _plain(self, name: str, rows: tuple[int, int] | None) -> Load:
        source, tensor = self._sources[name], self._homes[name].tensor
        extents, shape = source.extents, list(tensor.shape)
        if rows is not None:
            extent, shape = self._rows_of(name, rows)
            extents = (extent,)
        stored = torch_dtype(source.dtype)
        return plan_load(
            name,
            extents,
            math.prod(shape) * tensor.element_size(),
            alignment=self._alignment,
            piece_bytes=self._piece_bytes,
            address_alignment=max(self._address_alignment, tensor.element_size()),
            codec=None if stored == tensor.dtype else _cast(stored, tensor.dtype),
            packed=self._packed,
        )


def _cast(stored: torch.dtype, wanted: torch.dtype) -> Codec:
    """Rounds as `Tensor.to` does, which is what loading with that dtype would have done."""

    def codec(source: memoryview, target: memoryview) -> None:
        torch.frombuffer(target, dtype=wanted).copy_(torch.frombuffer(source, dtype=stored))

    return codec


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    stride = [1]
    for size in reversed(shape[1:]):
        stride.append(stride[-1] * max(size, 1))
    return tuple(reversed(stride)) if shape else ()
