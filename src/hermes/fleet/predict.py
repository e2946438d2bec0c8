"""What a fleet will take, by driving the engines' and the schedule's own state machines with a clock that is counted.

The disk is one server: it takes pieces in turns from the models that want any, the most urgent first, as agents do from
their lines, and starts late where it was idle. The processor is another, to which a change of turns costs something.
What the first touch of memory costs is left out: it is paid once.
"""

import heapq
from collections import deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from hermes.fleet.schedule import Admit, Arrived, Event, Finished, Go, Joined, Policy, Reached, Ready, Schedule
from hermes.pipeload import BlockDone, BlockWanted, Compute, Fetch, LoadFetched, Pipeline
from hermes.pipeload import Order as PipelineOrder
from hermes.plan import START_SECONDS

__all__ = ["FleetPrediction", "Member", "predict"]

PIECE_BYTES = 8 * 2**20
SWITCH_SECONDS = 5e-4
"""What a change of turns costs: caches hold another model's activations, code and tables then."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model with its plan, as the prediction sees it. For each block: slot and read bytes of its loads, seconds.

    `least_bytes` of its quota are in use whatever it gives back.
    """

    slots: Sequence[Sequence[int]]
    reads: Sequence[Sequence[int]]
    block_seconds: Sequence[float]
    resident: Sequence[Set[int]]
    ring_bytes: int
    least_bytes: int
    patience_seconds: float

    @property
    def pass_bytes(self) -> int:
        """Read in each steady pass."""
        pairs = zip(self.reads, self.resident, strict=False)  # further blocks are in no pass
        return sum(n for loads, kept in pairs for load, n in enumerate(loads) if load not in kept)


@dataclass(frozen=True, kw_only=True)
class FleetPrediction:
    """Of a closed loop in which each model's next request comes when its last one is answered.

    Attributes:
        makespan_seconds: until the last answer.
        latency_seconds: for each model, the mean over its requests.
        bytes_read: from disk.
    """

    makespan_seconds: float
    latency_seconds: Mapping[str, float]
    bytes_read: int


@dataclass(kw_only=True)
class _Run:
    member: Member
    pipeline: Pipeline
    left: int  # requests to come
    block: int = -1
    began: float = 0.0
    granted: bool = False
    waiting: bool = False
    latencies: list[float] = field(default_factory=list)
    fetches: deque[tuple[Fetch, int]] = field(default_factory=deque)  # order, bytes to go


def predict(
    members: Mapping[str, Member],
    requests: Mapping[str, int],
    bytes_per_second: float,
    *,
    policy: Policy,
    max_active: int,
) -> FleetPrediction:
    """Simulate so many requests of each model. Cold at the start: resident weights are read by the first passes."""
    return _World(members, requests, bytes_per_second, policy, max_active).play()


class _World:
    def __init__(
        self,
        members: Mapping[str, Member],
        requests: Mapping[str, int],
        bytes_per_second: float,
        policy: Policy,
        max_active: int,
    ) -> None:
        self.now = 0.0
        self.rate = bytes_per_second
        self.schedule = Schedule(policy, max_active=max_active)
        self.bytes_read = 0
        self.served: dict[str, int] = {}  # by the disk, in order of the last piece
        self.disk_is_busy = False
        self.disk_free = 0.0
        self.last = ""  # that had the turn
        self.events: list[tuple[float, int, str, str]] = []  # time, number, what ends, whose
        self.number = 0
        self.runs = {
            name: _Run(
                member=member,
                pipeline=Pipeline(member.slots, member.resident, member.ring_bytes),
                left=requests.get(name, 0),
            )
            for name, member in members.items()
        }
        for name, run in self.runs.items():
            self.tell(Joined(name, run.member.patience_seconds))
            self.carry_out(name, run.pipeline.start())

    def play(self) -> FleetPrediction:
        for name in self.runs:
            self.ask(name)
        self.read()
        while self.events:
            self.now, _, what, name = heapq.heappop(self.events)
            if what == "piece":
                self.disk_is_busy, self.disk_free = False, self.now
                self.end_piece(name)
            else:
                self.reach(name)
            self.read()
            if not any(self.schedule.backlog(name) for name in self.runs):
                break  # what is read ahead from now on is for nobody
        return FleetPrediction(
            makespan_seconds=self.now,
            latency_seconds={n: sum(run.latencies) / max(1, len(run.latencies)) for n, run in self.runs.items()},
            bytes_read=self.bytes_read,
        )

    def ask(self, name: str) -> None:
        run = self.runs[name]
        if run.left:
            run.left -= 1
            run.began = self.now
            self.tell(Arrived(name, self.now))

    def tell(self, event: Event) -> None:
        for order in self.schedule.on(event):
            match order:
                case Admit(name):
                    self.runs[name].block = -1
                case Go(name):
                    self.go(name)

    def go(self, name: str) -> None:
        run = self.runs[name]
        seconds = 0.0 if name == self.last else SWITCH_SECONDS
        self.last = name
        if run.block < 0:
            self.at(seconds, "block", name)
            return
        if not run.granted:
            self.carry_out(name, run.pipeline.on(BlockWanted(run.block)))
        self.at(seconds + run.member.block_seconds[run.block], "block", name)

    def reach(self, name: str) -> None:
        """The model whose turn it is has come to the end of a block, or to the start of its request."""
        run = self.runs[name]
        self.carry_out(name, run.pipeline.on(BlockDone()))
        run.block += 1
        run.granted = False
        if run.block == len(run.member.slots):
            run.latencies.append(self.now - run.began)
            self.tell(Finished(name))
            self.ask(name)
            return
        ready = run.pipeline.is_there(run.block)
        if not ready:
            run.waiting = True
            self.carry_out(name, run.pipeline.on(BlockWanted(run.block)), tell=False)
        self.tell(Reached(name, ready))
        if not ready and run.granted:
            self.arrive(name)

    def arrive(self, name: str) -> None:
        self.runs[name].waiting = False
        self.tell(Ready(name))

    def carry_out(self, name: str, orders: Sequence[PipelineOrder], *, tell: bool = True) -> None:
        run = self.runs[name]
        for order in orders:
            match order:
                case Fetch(_, block, load, _):
                    run.fetches.append((order, run.member.reads[block][load]))
                case Compute():
                    run.granted = True
        if tell and run.waiting and run.granted:
            self.arrive(name)

    def read(self) -> None:
        """Start the next piece, if the disk is free."""
        wanting = [name for name, run in self.runs.items() if run.fetches]
        if self.disk_is_busy or not wanting:
            return
        name = min(wanting, key=lambda n: (self.schedule.urgency(n), self.served.get(n, -1)))
        self.disk_is_busy = True
        nbytes = min(PIECE_BYTES, self.runs[name].fetches[0][1])
        self.bytes_read += nbytes
        starting = START_SECONDS if self.disk_free < self.now else 0.0
        self.at(starting + nbytes / self.rate, "piece", name)
        self.served[name] = self.number

    def end_piece(self, name: str) -> None:
        run = self.runs[name]
        order, left = run.fetches.popleft()
        if left > PIECE_BYTES:
            run.fetches.appendleft((order, left - PIECE_BYTES))
        else:
            self.carry_out(name, run.pipeline.on(LoadFetched(order.visit)))

    def at(self, seconds: float, what: str, name: str) -> None:
        self.number += 1
        heapq.heappush(self.events, (self.now + seconds, self.number, what, name))
