"""Makes a module's own `forward` pull its blocks through the engine, with no change to its code.

Before a unit's module runs, its block is wanted; the block held until then is released. Row-wise embeddings and heads
cut by rows get a forward of their own; everything else keeps its own, wrapped. Wrapped, not hooked: torch's attention
leaves its fast path, and its bits, when it sees a hook.
"""

import bisect
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn import functional

from hermes.errors import EngineError
from hermes.memory.arena import Arena
from hermes.model.blocks import Block, Bound, LoadFactory
from hermes.model.mapping import is_plain_linear, is_turned_linear, weight_of
from hermes.model.product import PackedRows, Ranges, is_exact, knows_rows, knows_turned, turned, turned_rows
from hermes.model.quantized import QuantizedRows
from hermes.model.rows import RowTable
from hermes.model.units import Partition, Unit
from hermes.pipeload import Load, Place

__all__ = ["HOST", "Binding", "BlockSource", "Memory"]

_Ranges = Sequence[tuple[int, tuple[int, int]]]
"""Blocks, and the rows of a matrix in each."""
_Forward = Callable[[torch.Tensor], torch.Tensor]

HOST = torch.device("cpu")
Memory = Arena | torch.Tensor
"""The host's, or a device's as bytes."""


class BlockSource(Protocol):
    """The engine, as seen from the model."""

    @property
    def ring(self) -> Memory:
        """The window."""

    @property
    def store(self) -> Memory:
        """Where lies what stays."""

    @property
    def is_settled(self) -> bool:
        """Nothing streams."""

    def start(self) -> list[Place]:
        """Fetch what is pinned and begin to load."""

    def want(self, block: int) -> tuple[Place, ...]:
        """Wait for a block."""

    def hold(self, block: int) -> bool:
        """The same of a block that stays in memory, whose places are known; False where it must be wanted."""

    def places(self, block: int) -> tuple[Place, ...]:
        """Where a block lies that stays."""

    def fetch(self, loads: Sequence[tuple[Load, memoryview]]) -> None:
        """Read loads into the given memory, now."""

    def take(self, nbytes: int) -> Arena:
        """Memory under the budget that stays until the end."""

    def begin_pass(self, heap_bytes: int = 0) -> None:
        """A sweep begins that takes so much besides weights."""

    def end_pass(self) -> None:
        """A sweep is over."""

    def close(self) -> None:
        """Stop all agents and drop the memory. Idempotent."""


class Binding:
    """Ties a skeleton to an engine. A pass waits for another thread's; `detach` leaves placeholders.

    Args:
        module: the skeleton.
        source: the engine, not yet started.
        blocks: in the engine's order.
        pinned: the block of what stays in memory.
        partition: which modules wait for which units.
        block_of_unit: number of the block that holds each unit.
        factory: makes the loads of single rows.
        demand: bytes that a pass takes besides weights, by the positional and the keyword arguments it is given.
        device: that the source's memory belongs to, on which torch does all computing. Large matrices come whole there.
    """

    def __init__(
        self,
        module: nn.Module,
        source: BlockSource,
        *,
        blocks: Sequence[Block],
        pinned: Block,
        partition: Partition,
        block_of_unit: Sequence[int],
        factory: LoadFactory,
        demand: Callable[[Sequence[Any], Mapping[str, Any]], int] = lambda args, kwargs: 0,
        device: torch.device = HOST,
    ) -> None:
        self._module = module
        self._device = device
        self._demand = demand
        self._source = source
        self._blocks = blocks
        self._is_plain = all(bound.is_view for block in blocks for bound in block.bound)
        self._pinned = pinned
        self._factory = factory
        self._current: int | None = None
        self._is_all_bound = False
        self._places: list[tuple[Place, ...]] = [()] * len(blocks)  # of such as stay: always the same
        self._turn = threading.Lock()
        self._thread: int | None = None  # whose pass is under way
        self._whole: Arena | None = None  # where matrices that came in ranges are put together
        self._ring: torch.UntypedStorage | None = _storage(source.ring)
        self._store: torch.UntypedStorage | None = _storage(source.store)
        self._ring_home, self._store_home = self._ring._cdata, self._store._cdata
        modules = dict(module.named_modules())
        self._forwards: list[tuple[nn.Module, Any]] = []  # with the ones of their own that modules had
        for number, unit in enumerate(partition.units):
            inner, block = modules[unit.module], block_of_unit[number]
            if unit.rows is None and isinstance(inner, nn.Linear) and self._is_product(inner, unit, block):
                whole = (block, (0, inner.out_features))
                self._replace(inner, self._linear_forward(inner, unit.module, [whole]))
            elif self._device == HOST and unit.rows is None and is_turned_linear(inner) and self._is_matrix(unit):
                self._replace(inner, self._turned_forward(inner, block))
            elif unit.rows is None:
                self._replace(inner, self._unit_forward(inner, block))
        for name in [name for name, inner in modules.items() if isinstance(inner, nn.TransformerEncoder)]:
            first = f"{name}.layers.0".removeprefix(".")  # by whose weights it chooses its way
            for number in [number for number, unit in enumerate(partition.units) if unit.module == first]:
                self._replace(modules[name], self._unit_forward(modules[name], block_of_unit[number]))
        tied: dict[str, Callable[[Sequence[int], torch.Tensor], bool]] = {}
        for name, units in partition.heads.items():
            ranges = [(block_of_unit[unit], partition.units[unit].rows or (0, 0)) for unit in units]
            self._replace(modules[name], self._ranges_forward(modules[name], name, ranges, partition))
            if all(isinstance(blocks[block].matrices[name], Bound) for block, _ in ranges):
                tied[factory.canonical(weight_of(name))] = functools.partial(self._copy_rows, name, ranges)
        for name in partition.rowwise:
            embedding, weight = cast(nn.Embedding, modules[name]), weight_of(name)
            table = RowTable(embedding, weight, factory, source.fetch, tied.get(factory.canonical(weight)))
            self._replace(embedding, self._lookup_in(table))
        self._watch(self._adopt)
        self._replace(module, self._pass_forward(module))

    def start(self) -> None:
        """Bind what is pinned (blocking) and let the engine begin to load."""
        places = self._source.start()
        for bound in self._pinned.bound:
            bound.bind(self._memory, places)

    def enter(self, block: int) -> None:
        """Make `block` the one whose parameters are there; waits until it is loaded.

        Raises EngineError while another thread's pass is under way.
        """
        if self._thread is not None and self._thread != threading.get_ident():
            raise EngineError("a part of the model was called while another thread's pass is under way; call the model")
        if block == self._current:
            return
        if self._is_all_bound and self._source.hold(block):
            self._current = block
            return
        self._leave()
        places = self._places_of(block) if self._source.hold(block) else self._source.want(block)
        self._current = block
        for bound in self._blocks[block].bound:
            bound.bind(self._memory, places)

    def detach(self) -> None:
        """Take the wrapped forwards away, and every tensor off the engine's memory.

        Placeholders stay behind that refuse to be computed with.
        """
        self._leave()
        self._watch(_refuse)
        for module, own in reversed(self._forwards):
            module.__dict__.pop("forward")
            if own is not None:
                module.__dict__["forward"] = own
        self._forwards = []
        self._ring = self._store = None
        # Older placeholders know this binding, and the live tensors of its blocks the engine's memory.
        self._blocks, self._pinned = (), Block(name="pinned", loads=(), bound=())

    def _watch(self, adopt: Callable[[str], torch.Tensor]) -> None:
        for home in self._factory.homes:
            home.watch(adopt, self._device)

    def _leave(self) -> None:
        held = range(len(self._blocks)) if self._is_all_bound else () if self._current is None else (self._current,)
        for block in held:
            for bound in self._blocks[block].bound:
                bound.unbind()
        self._current, self._is_all_bound = None, False

    def _bind_all(self) -> None:
        """Bind every block at once, if all are in memory and none must be converted there: `enter` is then free."""
        if self._source.is_settled and self._is_plain:
            self._is_all_bound = True
            for number, block in enumerate(self._blocks):
                places = self._places_of(number)
                for bound in block.bound:
                    bound.bind(self._memory, places)

    def _places_of(self, block: int) -> tuple[Place, ...]:
        if not self._places[block]:
            self._places[block] = self._source.places(block)
        return self._places[block]

    def _memory(self, place: Place) -> torch.UntypedStorage:
        storage = self._store if place.resident else self._ring
        if storage is None:
            raise RuntimeError("detached")
        return storage

    def _adopt(self, name: str) -> torch.Tensor:
        """Keep for good a weight that is used outside its own module's time. Raises EngineError once closed."""
        if self._ring is None:
            return _refuse(name)
        block = self._factory.pinned([name])
        arena = self._source.take(sum(load.slot_bytes for load in block.loads))
        slot, places, wanted = 0, [], []
        for load in block.loads:
            wanted.append((load, arena.view[slot : slot + load.slot_bytes]))
            places.append(Place(resident=True, offset=slot + load.data_offset))
            slot += load.slot_bytes
        self._source.fetch(wanted)
        storage = torch.frombuffer(arena.view, dtype=torch.uint8).to(self._device).untyped_storage()
        (bound,) = block.bound
        bound.bind(lambda _: storage, places)
        return cast(Bound, bound).live

    def _is_product(self, module: nn.Linear, unit: Unit, block: int) -> bool:
        """A linear layer that `product` computes, nothing but a matrix, or one that is quantised."""
        if self._device != HOST:
            return False
        if isinstance(self._blocks[block].matrices.get(unit.module), QuantizedRows):
            return True
        return is_plain_linear(module) and self._is_matrix(unit)

    def _is_matrix(self, unit: Unit) -> bool:
        """Nothing waits for this unit but its module's weight."""
        return unit.parameters == (self._factory.canonical(weight_of(unit.module)),)

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let calls of the module run this, without gradients: what they would be computed from is soon elsewhere."""

        @functools.wraps(module.forward)  # transformers reads its signature
        def without_gradients(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            with torch.no_grad():
                return forward(*args, **kwargs)

        self._forwards.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = without_gradients

    def _unit_forward(self, module: nn.Module, block: int) -> Callable[..., Any]:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.enter(block)
            return self._apart(own(*args, **kwargs))

        return forward

    def _apart(self, output: Any) -> Any:
        """What a module returns, copied where it is a view of its weights, whose memory is soon another block's."""
        if isinstance(output, torch.Tensor):
            home = output.untyped_storage()._cdata
            return output.clone() if home in (self._ring_home, self._store_home) else output
        return type(output)(map(self._apart, output)) if type(output) in (tuple, list) else output

    def _pass_forward(self, module: nn.Module) -> Callable[..., Any]:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._thread == threading.get_ident():
                return own(*args, **kwargs)
            with self._turn:  # another thread's pass comes first
                self._thread = threading.get_ident()
                try:
                    return self._run_pass(own, args, kwargs)
                finally:
                    self._thread = None

        return forward

    def _run_pass(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            self._source.begin_pass(self._demand(args, kwargs))
            self._bind_all()
            return forward(*args, **kwargs)
        finally:
            self._whole = None
            self._leave()
            self._source.end_pass()

    def _linear_forward(self, linear: nn.Linear, name: str, ranges: _Ranges) -> _Forward:
        """Of ranges of rows, each in a block."""

        def forward(input: torch.Tensor) -> torch.Tensor:
            if len(ranges) == 1:
                self.enter(ranges[0][0])
                return self._blocks[ranges[0][0]].matrices[name].linear(input, linear.bias)
            product, bias = Ranges(input, ranges[-1][1][1]), linear.bias
            for block, (begin, end) in ranges:
                self.enter(block)
                part = None if bias is None else bias[begin:end]
                cast(Bound | PackedRows, self._blocks[block].matrices[name]).multiply_range(product, begin, part)
            return product.output

        return forward

    def _ranges_forward(self, module: nn.Module, name: str, ranges: _Ranges, partition: Partition) -> _Forward:
        """By ranges of rows; a matrix is put together where they would not round like the whole one."""
        if is_turned_linear(module):
            return self._turned_ranges_forward(module, name, ranges)
        linear = cast(nn.Linear, module)
        by_ranges = self._linear_forward(linear, name, ranges)
        if name not in partition.gathered:
            return by_ranges
        shape, step, bias = (linear.out_features, linear.in_features), ranges[0][1][1], linear.bias
        dtype = linear.weight.dtype

        def forward(input: torch.Tensor) -> torch.Tensor:
            tokens = input.numel() // shape[1]
            if is_exact(input, dtype, bias) and knows_rows(dtype, tokens, shape, step, bias is not None):
                return by_ranges(input)
            return functional.linear(input, self._gather(name, ranges, shape, dtype), bias)

        return forward

    def _turned_ranges_forward(self, module: nn.Module, name: str, ranges: _Ranges) -> _Forward:
        weight = cast(torch.Tensor, module.weight)
        shape, dtype, step = (weight.shape[0], weight.shape[1]), weight.dtype, ranges[0][1][1]

        def forward(x: torch.Tensor) -> torch.Tensor:
            total = cast(torch.Tensor, module.bias)
            if not is_exact(x, dtype, total) or not knows_turned(dtype, x.numel() // shape[0], shape, step):
                return turned(x, self._gather(name, ranges, shape, dtype), total)
            for block, (begin, end) in ranges:
                self.enter(block)
                total = turned_rows(x[..., begin:end], cast(Bound, self._blocks[block].matrices[name]).live, total)
            return total

        return forward

    def _gather(self, name: str, ranges: _Ranges, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """The whole matrix, until the next one or the end of the pass; outside the heap, which it would tear apart."""
        nbytes = shape[0] * shape[1] * dtype.itemsize
        if self._whole is None or self._whole.nbytes < nbytes:
            self._whole = None
            self._whole = Arena(nbytes)
        whole = torch.frombuffer(self._whole.view[:nbytes], dtype=dtype).view(shape)
        for block, (begin, end) in ranges:
            self.enter(block)
            cast(Bound | PackedRows, self._blocks[block].matrices[name]).write_to(whole[begin:end])
        return whole

    def _turned_forward(self, module: nn.Module, block: int) -> _Forward:
        def forward(x: torch.Tensor) -> torch.Tensor:
            self.enter(block)
            return turned(x, cast(torch.Tensor, module.weight), cast(torch.Tensor, module.bias))

        return forward

    def _copy_rows(self, name: str, ranges: _Ranges, rows: Sequence[int], wanted: torch.Tensor) -> bool:
        """Of a head, for the embedding that shares its matrix, where all stays in memory: then no token reads."""
        if not self._is_all_bound:
            return False
        done = 0
        for block, (begin, end) in ranges:
            upto = bisect.bisect_left(rows, end)
            if upto > done:
                self.enter(block)
                live = cast(Bound, self._blocks[block].matrices[name]).live
                torch.index_select(live, 0, torch.tensor(rows[done:upto]) - begin, out=wanted[done:upto])
                done = upto
        return True

    def _lookup_in(self, table: RowTable) -> _Forward:
        def forward(input: torch.Tensor) -> torch.Tensor:
            return table.embed(input.to(HOST)).to(self._device)

        return forward


def _refuse(name: str) -> torch.Tensor:
    raise EngineError(f"{name}: the model is closed; load it again")


def _storage(memory: Memory) -> torch.UntypedStorage:
    flat = memory if isinstance(memory, torch.Tensor) else torch.frombuffer(memory.view, dtype=torch.uint8)
    return flat.untyped_storage()
