"""Cutting a model into units, the smallest things that are loaded, computed and released; units make blocks.

A *unit* is a module together with the parameters that are used while it is the innermost one running: usually one big
matrix. A vocabulary head becomes several units, one for each range of rows. Outside the units stand the *pinned*
parameters (small ones, and ones that several modules share) and the *row-wise* embeddings, of which only the rows that
are looked up are ever read.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from hermes.model.mapping import Source, WeightMap, has_forward_of, is_plain_linear, is_turned_linear, weight_of
from hermes.model.trace import REACHING, Trace, Use
from hermes.pipeload import smallest_ring

__all__ = ["GRANULARITIES", "Granularity", "Partition", "Unit", "group_units", "partition", "row_step"]

Granularity = Literal["leaf", "joined", "half", "layer"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

PIN_BYTES = 64 * 2**10
"""Parameters up to this size stay in memory: reading one costs a disk access, whatever its size."""
HEAD_ROWS = 4096
"""Row ranges of a head are multiples of this: fewer rows can round differently from the whole matrix."""
MATRIX_ROWS = 256
"""Row ranges of a large matrix are multiples of this."""
_LAYER = re.compile(r"^(.*?\.\d+)(?:\.(.*))?$")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Parameters that are loaded when `module` is about to run; `rows` of its weight only, in a head cut by rows."""

    module: str
    parameters: tuple[str, ...]
    rows: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """Module, and range of rows."""
        return self.module if self.rows is None else f"{self.module}[{self.rows[0]}:{self.rows[1]}]"


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Every parameter on disk, once: in a unit, pinned, or behind a row-wise embedding or a head cut by rows.

    Attributes:
        units: in the order of a pass; from `num_in_pass` on, those that the traced pass did not touch.
        pinned: names of parameters and buffers.
        rowwise: embedding modules read by row.
        heads: for each head cut by rows, its units' numbers.
        gathered: the ones among them that are no heads, but large, and are put together in memory for numbers of tokens
            with which products of ranges round otherwise.
    """

    units: tuple[Unit, ...]
    num_in_pass: int
    pinned: tuple[str, ...]
    rowwise: tuple[str, ...]
    heads: Mapping[str, tuple[int, ...]]
    gathered: frozenset[str] = frozenset()


def partition(
    module: nn.Module,
    weights: WeightMap,
    trace: Trace | None,
    *,
    head_rows: int = HEAD_ROWS,
    matrix_bytes: int | None = None,
    gathers: bool = False,
    shares: int = 1,
) -> Partition:
    """Cut `module` along its trace, or (without one) in the order in which its modules were registered.

    With `matrix_bytes`, matrices of linear layers above that size are cut into ranges of rows as wide heads are, and
    put together again where that must be and `gathers` allows it. Ranges of a head end where so many equal `shares` of
    its rows do.
    """
    tables = _Tables(module, weights.sources)
    uses = tables.uses(trace)
    nbytes = {name: tables.nbytes(name) for name in weights.sources}
    pin_bytes = min(PIN_BYTES, max(nbytes.values(), default=0) // 64)
    rowwise = {name for name in tables.modules if tables.is_rowwise(name) and nbytes[tables.weight(name)] > pin_bytes}
    cut = {name for name in tables.modules if tables.is_wide_head(name, head_rows)}
    large_matrices = {name for name in tables.modules if tables.is_matrix_above(name, matrix_bytes, gathers)} - cut
    cut |= large_matrices
    users: dict[str, list[str]] = {name: [] for name in weights.sources}
    for use in uses:
        if use.parameter and use.module not in users[use.parameter]:
            users[use.parameter].append(use.module)
    large = {name for name, size in nbytes.items() if size > pin_bytes}
    interrupted = tables.parents() if trace is None else _interrupted(uses, trace, rowwise, large)

    pinned: list[str] = []
    owned: dict[str, list[str]] = {}  # module -> parameters, modules in order of first use
    order: dict[str, int] = {}
    for name, size in nbytes.items():
        modules = [
            user for user in users[name] if user not in rowwise and not (user in cut and tables.weight(user) == name)
        ]
        is_served = len(modules) < len(users[name])
        if not modules and not is_served:
            modules = [tables.owner(name)]
            if modules[0] in rowwise or modules[0] in cut:
                continue
        if not modules:
            continue
        if (
            size <= pin_bytes
            or len(modules) > 1
            or modules[0] in interrupted
            or modules[0] in cut
            or tables.is_buffer(name)
        ):
            pinned.append(name)
        else:
            owned.setdefault(modules[0], []).append(name)
    for index, use in enumerate(uses):
        order.setdefault(use.module, index)
    whole = [nbytes[name] for names in owned.values() for name in names]
    largest = max([*whole, (matrix_bytes or 0) if large_matrices else 0])
    units: list[Unit] = []
    heads: dict[str, list[int]] = {}
    num_in_pass = 0
    last = len(uses)
    for name in sorted({*owned, *cut}, key=lambda name: order.get(name, last)):
        if name in cut:
            weight = tables.weight(name)
            if name in large_matrices:
                ranges = _row_ranges(tables.shape(weight), nbytes[weight], matrix_bytes or 0, MATRIX_ROWS)
            else:
                ranges = _row_ranges(tables.shape(weight), nbytes[weight], largest, head_rows, shares)
            heads[name] = [len(units) + number for number in range(len(ranges))]
            units += [Unit(module=name, parameters=(weight,), rows=rows) for rows in ranges]
        else:
            units.append(Unit(module=name, parameters=tuple(owned[name])))
        if name in order:
            num_in_pass = len(units)
    return Partition(
        units=tuple(units),
        num_in_pass=num_in_pass,
        pinned=tuple(pinned),
        rowwise=tuple(sorted(rowwise)),
        heads={name: tuple(numbers) for name, numbers in heads.items()},
        gathered=frozenset(large_matrices if gathers else ()),
    )


def group_units(parts: Partition, granularity: Granularity, nbytes: Sequence[int]) -> list[list[int]]:
    """Blocks as lists of unit numbers, whose bytes are given.

    "leaf": each unit alone. "joined": as many as need no larger window than the largest unit does. "half": the halves
    of each layer (attention, feed-forward). "layer": layers. Only neighbours in the order of the pass are put together;
    row ranges of a head always stand alone.
    """
    if granularity == "joined":
        return _join(parts, nbytes)
    blocks: list[list[int]] = []
    previous: str | None = None
    for number, unit in enumerate(parts.units):
        key = unit.name if unit.rows is not None or granularity == "leaf" else _group(unit.module, granularity)
        if key == previous:
            blocks[-1].append(number)
        else:
            blocks.append([number])
        previous = key
    return blocks


def _join(parts: Partition, nbytes: Sequence[int]) -> list[list[int]]:
    blocks: list[list[int]] = []
    largest = max(nbytes, default=0)
    for number, unit in enumerate(parts.units):
        before = blocks[-1] if blocks and number != parts.num_in_pass else []
        whole = unit.rows is None and all(parts.units[other].rows is None for other in before)
        if before and whole and smallest_ring([[nbytes[other] for other in (*before, number)]]) <= largest:
            before.append(number)
        else:
            blocks.append([number])
    return blocks


def _group(module: str, granularity: Granularity) -> str:
    match = _LAYER.match(module)
    if match is None or granularity == "layer":
        return match[1] if match else module
    return f"{match[1]} {'attention' if 'att' in (match[2] or '').lower() else 'feed-forward'}"


def row_step(shape: Sequence[int], nbytes: int, most_bytes: int, rows: int) -> int:
    """Rows of a range of at most `most_bytes`, a multiple of so many, or so many where that is more."""
    return max(1, most_bytes // (nbytes // shape[0] * rows)) * rows


def _row_ranges(
    shape: Sequence[int], nbytes: int, most_bytes: int, rows: int, shares: int = 1
) -> list[tuple[int, int]]:
    """Ranges of `row_step` rows; the last one of each share may have fewer."""
    step = row_step(shape, nbytes, most_bytes, rows)
    share = -(-shape[0] // shares)
    ends = [min(end, shape[0]) for end in range(share, shape[0] + share, share)]
    return [
        (begin, min(begin + step, end))
        for start, end in zip([0, *ends], ends, strict=False)
        for begin in range(start, end, step)
    ]


def _interrupted(uses: Sequence[Use], trace: Trace, rowwise: set[str], large: set[str]) -> set[str]:
    """Modules that use parameters of their own after a module inside them has loaded something else: no units."""
    found: set[str] = set()
    last_use = {use.call: index for index, use in enumerate(uses)}
    for call, last in last_use.items():
        module = uses[last].module
        between = uses[trace.call_starts.get(call, 0) : last]
        if any(use.module != module and use.module not in rowwise and use.parameter in large for use in between):
            found.add(module)
    return found


class _Tables:
    """A skeleton's parameters and buffers by name, by module and by identity (tied ones are one)."""

    def __init__(self, module: nn.Module, sources: Mapping[str, Source]) -> None:
        self.modules = dict(module.named_modules())
        self._sources = sources
        self._tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(
            module.named_buffers(remove_duplicate=False)
        )
        self._canonical = {id(self._tensors[name]): name for name in sources}
        self._parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}

    def canonical(self, name: str) -> str | None:
        """The name under which this tensor is on disk, if it is."""
        return self._canonical.get(id(self._tensors.get(name)))

    def uses(self, trace: Trace | None) -> list[Use]:
        """The trace's uses by the name on disk, "" for what is not there; without a trace, every owner uses its own."""
        if trace is not None:
            return [Use(use.module, use.call, self.canonical(use.parameter) or "") for use in trace.uses]
        return [
            Use(self.owner(name), 0, self.canonical(name) or "") for name in self._tensors if name in self._parameters
        ]

    def parents(self) -> set[str]:
        """Modules with parameters of their own around modules with parameters."""
        owners = {self.owner(name) for name in self._parameters}
        return {
            owner for owner in owners if any(other.startswith(f"{owner}.") or (not owner and other) for other in owners)
        }

    def nbytes(self, name: str) -> int:
        tensor = self._tensors[name]
        return tensor.numel() * tensor.element_size()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def owner(self, name: str) -> str:
        """The module assumed to use a parameter: its own, or the one around it that reaches past its forward."""
        path = name.split(".")[:-1]
        around = (".".join(path[:depth]) for depth in range(len(path)))
        return next((outer for outer in around if isinstance(self.modules[outer], REACHING)), ".".join(path))

    def is_buffer(self, name: str) -> bool:
        return name not in self._parameters

    def weight(self, module: str) -> str:
        """Name on disk of a module's `weight`; empty if it is not there."""
        return self.canonical(weight_of(module)) or ""

    def is_rowwise(self, name: str) -> bool:
        """An embedding whose lookup is the plain one, stored as one run of bytes."""
        module = self.modules[name]
        return (
            isinstance(module, nn.Embedding)
            and has_forward_of(module, nn.Embedding)
            and module.max_norm is None
            and self._is_plain(self.weight(name))
        )

    def is_wide_head(self, name: str, head_rows: int) -> bool:
        """A linear layer with far more outputs than inputs, of two ranges of rows or more."""
        module = self.modules[name]
        return (
            is_plain_linear(module)
            and module.out_features > max(4 * module.in_features, 2 * head_rows - 1)
            and self._is_plain(self.weight(name))
        )

    def is_matrix_above(self, name: str, most_bytes: int | None, gathers: bool) -> bool:
        """A linear layer whose matrix has more bytes, and more rows than a range has at least.

        One that lies turned has a sum's products in its rows: several tokens need it put together.
        """
        module = self.modules[name]
        return (
            most_bytes is not None
            and (is_plain_linear(module) or (gathers and is_turned_linear(module)))
            and self._is_plain(self.weight(name))
            and self.shape(self.weight(name))[0] > MATRIX_ROWS
            and self.nbytes(self.weight(name)) > most_bytes
        )

    def _is_plain(self, name: str) -> bool:
        source = self._sources.get(name)
        return (
            source is not None
            and source.convert is None
            and len(source.extents) == 1
            and bool(math.prod(self.shape(name)))
        )
