"""Quantised matrices: torch's own CPU kernels on the bytes as they lie on disk, or a few rows at a time made floats.

Which of the two is settled by dtype, shape and machine alone, so that streamed and resident weights give the same bits.
The layout is in docs/format.md; `checkpoint.quantize` writes it.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from hermes.checkpoint.index import QuantizedTensor
from hermes.checkpoint.quantized import GROUP, STEP
from hermes.pipeload import Place

__all__ = ["SCALE_BYTES", "QuantizedMatrix", "QuantizedRows"]

MOST_TOKENS = {8: 16, 4: 64}
"""Above, by bits, a product with rows made floats is faster than the kernel."""
TILE_BYTES = 4 * 2**20
"""Of floats at a time."""
SCALE_BYTES = 4
"""Scales are aligned to this, whatever their dtype."""
_SCALES = {"BF16": torch.bfloat16, "F32": torch.float32}


class QuantizedMatrix:
    """One matrix over `values` and `scales`, the bytes that are stored."""

    def __init__(self, entry: QuantizedTensor, values: torch.Tensor, scales: torch.Tensor) -> None:
        self.shape = entry.shape
        self._bits = entry.bits
        stored = (entry.shape, torch.int8) if entry.bits == 8 else (entry.values.shape, torch.uint8)
        self._values = values.view(stored[1]).view(stored[0])
        self._scales = scales.view(_SCALES[entry.scales.dtype]).view(entry.scales.shape)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`functional.linear` with this matrix."""
        rows, columns = self.shape
        tokens = math.prod(x.shape[:-1])
        if x.dtype == torch.bfloat16 and x.shape[-1] == columns and 0 < tokens <= MOST_TOKENS[self._bits]:
            if _kernel_fits(self._bits):
                output = self._multiply(x.reshape(tokens, columns)).view(*x.shape[:-1], rows)
                return output if bias is None else output.add_(bias)
        output = x.new_empty(*x.shape[:-1], rows)
        step = max(1, TILE_BYTES // (4 * columns * STEP)) * STEP
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            part = None if bias is None else bias[begin:end]
            output[..., begin:end] = functional.linear(x, self.floats(begin, end).to(x.dtype), part)
        return output

    def floats(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows as float32; in 4 bits `begin` is a multiple of `STEP`."""
        end = self.shape[0] if end is None else end
        columns = self.shape[1]
        if self._bits == 8:
            return self._values[begin:end].float().mul_(self._scales[begin:end, None].float())
        # Turned around while they are two to a byte: that is what takes the time.
        bytes_ = self._values[begin // STEP : -(-end // STEP)].transpose(1, 2).contiguous()
        codes = torch.empty(len(bytes_), 2, STEP // 2, columns)
        codes[:, 0] = bytes_ & 15
        codes[:, 1] = bytes_ >> 4
        scales = self._scales[:, begin:end].transpose(0, 1).float()
        groups = codes.view(end - begin, columns // GROUP, GROUP)
        return groups.sub_(8).mul_(scales[..., :1]).add_(scales[..., 1:]).view(end - begin, columns)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        scales = self._scales.to(x.dtype)
        if self._bits == 8:
            return torch._weight_int8pack_mm(x, self._values, scales)
        nibbles = self._values.view(self.shape[0], -1)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, nibbles, GROUP, scales)  # type: ignore[no-any-return]


class QuantizedRows:
    """One quantised matrix of a block: what `Bound` is to one of floats, from load number `first` on."""

    is_view = True

    def __init__(self, entry: QuantizedTensor, first: int) -> None:
        self.loads = range(first, first + 2)
        self._entry = entry
        self._matrix: QuantizedMatrix | None = None
        self._last: tuple[Sequence[Place], QuantizedMatrix] | None = None

    def bind(self, memory: Callable[[Place], torch.UntypedStorage], places: Sequence[Place]) -> None:
        """Point at the bytes; `places` are those of all loads of the block."""
        mine = places[self.loads.start : self.loads.stop]
        if self._last is None or self._last[0] != mine:  # resident ones stay where they are
            parts = []
            for place, stored in zip(mine, (self._entry.values, self._entry.scales), strict=True):
                part = torch.empty(0, dtype=torch.uint8)
                parts.append(part.set_(memory(place), place.offset, (stored.extent.nbytes,), (1,)))
            self._last = mine, QuantizedMatrix(self._entry, *parts)
        self._matrix = self._last[1]

    def unbind(self) -> None:
        """Forget the bytes; they may be anybody's from now on."""
        self._matrix = None

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`functional.linear` with this matrix."""
        if self._matrix is None:
            raise RuntimeError(f"{self._entry.values.name} is not in memory")
        return self._matrix.linear(x, bias)


@functools.cache
def _kernel_fits(bits: int) -> bool:
    """Whether torch has the kernel here, and it takes the layout as stored: in 4 bits that is AVX-512's."""
    try:
        if bits == 8:
            one = (
                torch.ones(1, GROUP).bfloat16(),
                torch.ones(STEP, GROUP, dtype=torch.int8),
                torch.ones(STEP).bfloat16(),
            )
            return bool((torch._weight_int8pack_mm(*one) == GROUP).all())
        codes = (torch.arange(2 * STEP * GROUP, dtype=torch.int32) % 251 % 16).view(2 * STEP, GROUP)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    halves = codes.to(torch.uint8).view(2, 2, STEP // 2, GROUP)
    return torch.equal(packed.view(2, GROUP, STEP // 2), (halves[:, 0] | halves[:, 1] << 4).transpose(1, 2))
