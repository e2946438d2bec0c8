"""Frozen records of a profile, as they are written to JSON."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hermes.errors import ProfileError
from hermes.memory.pages import Code
from hermes.model.trace import Trace
from hermes.profile.delays import BlockSample, DelayModel

__all__ = [
    "PROFILE_VERSION",
    "BandwidthRecord",
    "ComputeRecord",
    "MachineRecord",
    "Profile",
    "UnitRecord",
    "block_samples",
]

PROFILE_VERSION = 10
DRIFT = 1.6
"""Two samples of one disk may differ by such a factor."""
FEW_TOKENS = 16
"""Of these a pass is bound by memory, not by arithmetic."""


@dataclass(frozen=True, kw_only=True)
class BandwidthRecord:
    """Direct reads of the checkpoint by so many agents in pieces of this size."""

    num_agents: int
    piece_bytes: int
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class ComputeRecord:
    """Seconds a unit computes, by tokens in the pass; linear between and beyond what was measured.

    t_ex of the delay model (SwapNet): a constant for reading the weights, and a slope for arithmetic.
    """

    samples: tuple[tuple[int, float], ...]

    def scaled(self, share: float) -> "ComputeRecord":
        """Seconds of many tokens times `share`."""
        samples = ((tokens, cost * share if tokens > FEW_TOKENS else cost) for tokens, cost in self.samples)
        return ComputeRecord(samples=tuple(samples))

    def seconds(self, tokens: int) -> float:
        """For a pass over `tokens` tokens in all (batch x sequence)."""
        points = sorted(self.samples)
        if len(points) == 1:
            return points[0][1] * max(1.0, tokens / points[0][0])
        low, high = points[0], points[-1]
        for left, right in itertools.pairwise(points):
            if left[0] <= tokens <= right[0]:
                low, high = left, right
        slope = max(0.0, (high[1] - low[1]) / (high[0] - low[0]))
        if tokens >= high[0]:
            return high[1] + slope * (tokens - high[0])
        return max(low[1] + slope * (tokens - low[0]), 0.0) if tokens >= low[0] else low[1]


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """One unit: what the paper's Layer Profiler measures of a layer.

    Attributes:
        name: module, and row range.
        block: what it belongs to at layer granularity.
        nbytes: of its weights on disk.
        flops: of the pass that was traced.
        activation_bytes: highest sum of live activations while it ran.
        load_seconds: alone on the disk, by number of agents.
        compute: seconds by tokens.
    """

    name: str
    block: str
    nbytes: int
    flops: int
    activation_bytes: int
    load_seconds: Mapping[int, float]
    compute: ComputeRecord


@dataclass(frozen=True, kw_only=True)
class MachineRecord:
    """What a profile is valid on."""

    cpu: str
    num_cores: int
    num_threads: int
    memory_bytes: int
    torch: str
    transformers: str
    file_system: str


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Costs of one checkpoint on one machine in one dtype.

    Attributes:
        version: of this format.
        checkpoint: fingerprint of the files.
        machine: where it was measured.
        model_class: of the module; with another head, other units make a pass.
        dtype: of the computation.
        batch_size, sequence_length: of the measured pass.
        floor_bytes: resident set before any weight.
        touch_seconds_per_byte: of writing to memory for the first time, for each further `TOUCH_STEP_BYTES` that the
            process takes; the last one holds for what comes after.
        refaults_per_second: pages the system took away and gave back during the passes; a sign of too tight a cap.
        bandwidths: of the disk, with nothing else going on.
        streaming_bytes_per_second: of passes that waited for the disk most of the time: less, as computing takes memory
            bandwidth from it, and a window does not fit into caches; 0 where none did.
        windows: for windows of some sizes, how many times the rate of those passes' window the disk fills them with.
        unpack_bytes_per_second: of packed weights, as unpacked by one core; 0 where none are packed.
        units: in the order of a pass.
        quiet: by tokens in the pass, the part of the units' seconds that they take while no agent reads: products of
            few tokens do little but read memory, which agents write to meanwhile.
        boundary_seconds: between the computing of one block and of the next one, which is there; 0 if not measured.
        speed: operations a second of linear layers of as many tokens meanwhile; 0 where it was not measured.
        cold_seconds: that a process's first pass computes longer than later ones: code that was never run, buffers that
            kernels make once.
        code: what passes use of the libraries: file -> (offset, bytes).
        preparing_code: what importing and building the model do.
        measured: False where compute was estimated from operations, not measured.
        trace: of the pass over that batch and sequence; None where it could not be followed.
        delays: fitted to the units, for blocks that were never measured; None in an estimate.
    """

    version: int = PROFILE_VERSION
    checkpoint: str
    machine: MachineRecord
    model_class: str
    dtype: str
    batch_size: int
    sequence_length: int
    floor_bytes: int
    touch_seconds_per_byte: tuple[float, ...] = ()
    refaults_per_second: float = 0.0
    unpack_bytes_per_second: float = 0.0
    bandwidths: tuple[BandwidthRecord, ...]
    streaming_bytes_per_second: float = 0.0
    windows: tuple[tuple[int, float], ...] = ()
    units: tuple[UnitRecord, ...]
    quiet: tuple[tuple[int, float], ...] = ()
    boundary_seconds: float = 0.0
    speed: float = 0.0
    cold_seconds: float = 0.0
    code: Code = field(default_factory=dict)
    preparing_code: Code = field(default_factory=dict)
    measured: bool = True
    trace: Trace | None = None
    delays: DelayModel | None = None
    _by_name: dict[str, UnitRecord] = field(default_factory=dict, init=False, repr=False, compare=False)
    _ranges: dict[str, list[tuple[int, int, ComputeRecord]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Of each module that was measured in ranges of rows."""

    def quiet_share(self, tokens: int) -> float:
        """`quiet` for a pass over so many tokens: that of the measured pass most like it, 1 if there is none."""
        return min(self.quiet, key=lambda measured: abs(measured[0] - tokens), default=(tokens, 1.0))[1]

    def at_speed(self, speed: float) -> "Profile":
        """For another minute: arithmetic is taken to have changed half as much as `speed` has.

        Half, like the disk's rates: one sample may be wrong as much as the profile is old.
        """
        if not self.speed:
            return self
        share = (1 + self.speed / speed) / 2
        units = tuple(replace(unit, compute=unit.compute.scaled(share)) for unit in self.units)
        return replace(self, units=units, speed=speed)

    def at_rate(self, ratio: float) -> "Profile":
        """For another minute: the disk gives `ratio` times what it gave. Half of that is believed, like the speed.

        All of it where it is no drift any more, as under a limit that somebody has set since, or has lifted.
        """
        drifts = 1 / DRIFT < ratio < DRIFT
        scale = (1 + ratio) / 2 if drifts else ratio
        bandwidths = (replace(record, bytes_per_second=record.bytes_per_second * scale) for record in self.bandwidths)
        streaming = self.streaming_bytes_per_second
        return replace(
            self,
            bandwidths=tuple(bandwidths),
            streaming_bytes_per_second=streaming * scale if drifts else streaming if ratio < 1 else 0.0,
            windows=self.windows if drifts else (),
        )

    def compute_of(self, unit: str, like: BlockSample | None = None) -> ComputeRecord:
        """Cost of a unit by name; of one that was never measured, by the delay model for a block `like` it.

        A matrix that was measured in other ranges of rows, or in ranges and now is whole, has its share of theirs.
        Raises ProfileError where there is no such model either.
        """
        if not self._by_name:
            self._by_name.update({record.name: record for record in self.units})
            for record in self.units:
                module, rows = _rows_of(record.name)
                if rows is not None:
                    self._ranges.setdefault(module, []).append((*rows, record.compute))
        if unit not in self._by_name:
            if parts := self._parts_of(unit):
                tokens = [tokens for tokens, _ in parts[0][0].samples]
                return ComputeRecord(
                    samples=tuple((n, sum(share * one.seconds(n) for one, share in parts)) for n in tokens)
                )
            if like is not None and self.delays is not None and self.delays.t_ex is not None:
                tokens_in_pass = self.batch_size * self.sequence_length
                return ComputeRecord(samples=((tokens_in_pass, self.delays.t_ex.seconds(like)),))
            raise ProfileError(f"the profile knows no unit {unit}; run `hermes profile` again")
        return self._by_name[unit].compute

    def _parts_of(self, unit: str) -> list[tuple[ComputeRecord, float]]:
        """Costs of the measured ranges of rows that the unit overlaps, and the part of each that does."""
        module, rows = _rows_of(unit)
        found = []
        for begin, end, compute in self._ranges.get(module, []):
            low, high = rows or (begin, end)
            if (overlap := min(end, high) - max(begin, low)) > 0:
                found.append((compute, overlap / (end - begin)))
        return found


def _rows_of(unit: str) -> tuple[str, tuple[int, int] | None]:
    """Module and range of rows by a unit's name."""
    module, bracket, rows = unit.rstrip("]").partition("[")
    begin, _, end = rows.partition(":")
    return module, (int(begin), int(end)) if bracket else None


def block_samples(units: Sequence[UnitRecord], tokens: int) -> list[BlockSample]:
    """Each unit as a block of its own, and the layers of several units: seconds at so many tokens, alone on the disk.

    What it takes to release a block was not measured: it is microseconds, nothing is copied or given to the system.
    """
    layers: dict[str, list[UnitRecord]] = {}
    for unit in units:
        layers.setdefault(unit.block, []).append(unit)
    groups = [[unit] for unit in units] + [members for members in layers.values() if len(members) > 1]
    return [
        BlockSample(
            nbytes=sum(unit.nbytes for unit in group),
            flops=sum(unit.flops for unit in group),
            activation_bytes=max(unit.activation_bytes for unit in group),
            depth=len(group),
            in_seconds=sum(unit.load_seconds[max(unit.load_seconds)] for unit in group)
            if all(unit.load_seconds for unit in group)
            else None,
            ex_seconds=sum(unit.compute.seconds(tokens) for unit in group),
        )
        for group in groups
    ]
