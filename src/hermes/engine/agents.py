"""Loading Agents: threads that read pieces into memory. What to read is decided elsewhere."""

import ctypes
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from queue import SimpleQueue

from hermes.checkpoint.readers import Reader
from hermes.engine.shelf import Shelved
from hermes.engine.stats import EngineStats
from hermes.errors import EngineError, HermesError, InputError, ReadError
from hermes.memory.arena import Arena
from hermes.pipeload.loads import Load, Piece

__all__ = ["Line", "LoadingAgents", "Ticket", "forget_frames"]

_NO_BUFFER = memoryview(b"")


@dataclass(eq=False, kw_only=True, slots=True)
class Ticket:
    """One load on its way: where it goes, and how many of its pieces are not there yet.

    Args:
        load: what is fetched.
        slot: the memory it fills.
        on_done: called once, by the agent that finished the last piece, outside every lock.
        is_abandoned: asked before each read, under no lock; a ticket nobody needs any more is done without reading.
        stays: in the resident store.
        shelved: where its packed pieces stay, and come from when they are there.
    """

    load: Load
    slot: memoryview
    on_done: Callable[["Ticket"], None]
    is_abandoned: Callable[[], bool] = field(default=lambda: False)
    stays: bool = False
    shelved: Shelved | None = None
    left: int = 0


class LoadingAgents:
    """`num_agents` threads that read pieces, several of one block together (PIPELOAD stage 2).

    They serve one engine, or all engines that share a disk: each has a `Line` in which its pieces wait. The threads
    begin with the first of these, and `close`, once the lines are closed, ends them.

    Raises InputError for fewer than one.
    """

    def __init__(self, num_agents: int) -> None:
        if num_agents < 1:
            raise InputError(f"{num_agents} Loading Agents would never read anything; try --agents 1")
        self.num_agents = num_agents
        # Reentrant, and whoever closes never waits for himself: the garbage collector may end an engine in any thread.
        self.lock = threading.RLock()
        self.idle = threading.Condition(self.lock)
        """Told when a line that is closing has one piece less under way."""
        # An entry for each piece that was ever queued, and one for each agent at the end. Unlike a condition it waits
        # and wakes without a line of Python: agents take their time from the cores that compute.
        self.work: SimpleQueue[None] = SimpleQueue()
        self.lines: list[Line] = []
        self._num_served = 0
        self._has_begun = self._closed = False
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"hermes-loader-{number}", daemon=True)
            for number in range(num_agents)
        ]

    def serve(self, line: "Line") -> None:
        """Read what is queued there, from now on."""
        with self.lock:
            if not self._has_begun:
                for thread in self._threads:
                    thread.start()
            self._has_begun = True
            self.lines.append(line)

    def close(self) -> None:
        """End the threads, after the reads under way. Idempotent."""
        with self.lock:
            self._closed = True
        for _ in self._threads:
            self.work.put(None)
        for thread in self._threads:
            if self._has_begun and thread is not threading.current_thread():
                thread.join()

    def _run(self, number: int) -> None:
        while (item := self._next()) is not None:
            line, ticket, piece = item
            line.serve(number, ticket, piece)
            del item, line, ticket, piece

    def _next(self) -> "tuple[Line, Ticket, Piece | None] | None":
        """Blocks until there is a piece; None at the end."""
        while True:
            self.work.get()
            with self.lock:
                if self._closed:
                    return None
                waiting = [line for line in self.lines if line.queue]
                if waiting:  # else what this entry stood for was dropped
                    line = waiting[0]
                    if len(waiting) > 1:
                        line = min(waiting, key=lambda one: (one.urgency(), one.served))
                    self._num_served += 1
                    line.served = self._num_served
                    line.under_way.add(threading.get_ident())
                    return line, *line.queue.popleft()


class Line:
    """Where the pieces of one engine wait for agents.

    Blocking: `submit` never blocks; `close` waits for the reads under way. An error is given to `on_error`, and nothing
    more is read for this line. `stats.bytes_read` is the agents' to count.

    Args:
        agents: who read.
        reader: what they read with.
        buffer_bytes: of each agent, for this line's pieces that cannot be read straight into place; 0: there are none.
        on_error: called by the agent that failed.
        on_read: called after each read, with the agent's name, its ticket, bytes, start and end.
        stats: the engine's.
        clock: of starts and ends.
        urgency: of the lines that wait, that with the lowest number goes first, and among equals whoever was served
            longest ago. Any agent may ask, at any time.

    Attributes:
        queue: what waits. This and the next two are guarded by the agents' lock.
        under_way: threads of the agents that are at a piece of it.
        served: how many pieces of all lines had been given out when this one had its last.
    """

    def __init__(
        self,
        agents: LoadingAgents,
        reader: Reader,
        *,
        buffer_bytes: int,
        on_error: Callable[[BaseException], None],
        on_read: Callable[[str, Ticket, int, float, float], None] | None,
        stats: EngineStats,
        clock: Callable[[], float],
        urgency: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.queue: deque[tuple[Ticket, Piece | None]] = deque()
        self.under_way: set[int] = set()
        self.served = 0
        self.urgency = urgency
        self._agents = agents
        self._reader = reader
        self._on_error = on_error
        self._on_read = on_read
        self._stats = stats
        self._clock = clock
        self._closed = False
        self._buffers = [Arena(buffer_bytes) for _ in range(agents.num_agents)] if buffer_bytes else []
        agents.serve(self)

    def submit(self, tickets: Iterable[Ticket], *, urgent: bool = False) -> None:
        """Queue every piece of the tickets, in order; urgent ones before all that is queued. Dropped once closed."""
        pairs: list[tuple[Ticket, Piece | None]] = []
        for ticket in tickets:
            parts = ticket.load.pieces or (None,)  # an empty tensor needs no read, but somebody must say it is done
            ticket.left = len(parts)
            pairs += [(ticket, part) for part in parts]
        with self._agents.lock:
            if self._closed:
                return
            if urgent:
                self.queue.extendleft(reversed(pairs))
            else:
                self.queue.extend(pairs)
        for _ in pairs:
            self._agents.work.put(None)

    def close(self) -> None:
        """Drop what is queued, and wait for what is being read. Idempotent."""
        with self._agents.idle:
            self._stop()
            while self.under_way - {threading.get_ident()}:
                self._agents.idle.wait()
            if self in self._agents.lines:
                self._agents.lines.remove(self)
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []

    def serve(self, number: int, ticket: Ticket, piece: Piece | None) -> None:
        """Agent `number` reads a piece that it was given, and says so if it was the ticket's last."""
        try:
            nbytes = 0
            if piece is not None and not ticket.is_abandoned():
                start = self._clock()
                nbytes = self._read(ticket, piece, self._buffers[number].view if self._buffers else _NO_BUFFER)
                if self._on_read is not None:
                    self._on_read(f"loader {number}", ticket, nbytes, start, self._clock())
            with self._agents.lock:
                self._stats.bytes_read += nbytes
                ticket.left -= 1
                done = ticket.left == 0
                if not done:
                    self._leave()
            if done:
                _settle(ticket)
                ticket.on_done(ticket)
                with self._agents.lock:
                    self._leave()
        except BaseException as error:  # whatever stops one read must stop the others, and be seen
            del ticket  # the error, which is kept, keeps this frame
            with self._agents.lock:
                self._stop()
            self._on_error(error)
            with self._agents.lock:
                self._leave()

    def _leave(self) -> None:
        self.under_way.discard(threading.get_ident())
        if self._closed:
            self._agents.idle.notify_all()

    def _stop(self) -> None:
        self._closed = True
        self.queue.clear()

    def _read(self, ticket: Ticket, piece: Piece, buffer: memoryview) -> int:
        """Put a piece into place; the bytes that came from disk for it."""
        try:
            if not piece.bounced:
                target = ticket.slot[piece.target : piece.target + piece.length]
                self._reader.read_into(piece.file, piece.offset, target, piece.required)
                return piece.length
            nbytes, shelved = piece.length, ticket.shelved
            if shelved is not None:
                buffer = shelved.memory[piece.stored : piece.stored + piece.length]
                nbytes = 0 if piece.stored in shelved.there else piece.length
            if nbytes:
                self._reader.read_into(piece.file, piece.offset, buffer[: piece.length], piece.required)
            if shelved is not None:
                shelved.there.add(piece.stored)
            source = buffer[piece.skip : piece.skip + piece.nbytes]
            target = ticket.slot[piece.target : piece.target + piece.target_bytes]
            if piece.codec is None:
                target[:] = source
            else:
                piece.codec(source, target)
            return nbytes
        except ReadError as error:
            raise ReadError(f"{ticket.load.name}: {error}") from error
        except HermesError:
            raise
        except Exception as error:
            raise EngineError(f"{ticket.load.name}: cannot place its bytes: {error}") from error


def forget_frames(error: BaseException | None) -> None:
    """Drop what finished calls left in the traceback of an error and in those of its causes: slots of memory."""
    told: list[BaseException] = []
    while error is not None and error not in told:  # causes may go round in circles
        traceback.clear_frames(error.__traceback__)
        told.append(error)
        error = error.__cause__ or error.__context__


def _settle(ticket: Ticket) -> None:
    """Move a tensor that the file does not hold at an address its kernels want, and finish what must be finished.

    Releases the interpreter lock. Raises ReadError.
    """
    load = ticket.load
    if load.shift:
        base = ctypes.addressof(ctypes.c_char.from_buffer(ticket.slot)) + load.data_offset
        ctypes.memmove(base, base + load.shift, load.nbytes)
    if load.finish is not None and not ticket.is_abandoned():
        load.finish(ticket.slot[load.data_offset : load.data_offset + load.nbytes], ticket.stays)
