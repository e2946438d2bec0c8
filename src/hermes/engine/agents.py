"""Loading Agents: threads that read pieces into memory. What to read is decided elsewhere."""

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from queue import SimpleQueue

from hermes.checkpoint.readers import Reader
from hermes.engine.shelf import Shelved
from hermes.engine.stats import EngineStats
from hermes.errors import EngineError, HermesError, ReadError
from hermes.memory.arena import Arena
from hermes.pipeload.loads import Load, Piece

__all__ = ["LoadingAgents", "Ticket"]


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
    """`num_agents` threads that share one queue of pieces, so that several fetch one block together (PIPELOAD stage 2).

    Blocking: `submit` never blocks; `close` waits for the reads under way. An error stops the agent, is given to
    `on_error`, and nothing more is read. `stats.bytes_read` is theirs to count.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        num_agents: int,
        buffer_bytes: int,
        on_error: Callable[[BaseException], None],
        on_read: Callable[[str, Ticket, int, float, float], None] | None,
        stats: EngineStats,
        clock: Callable[[], float],
    ) -> None:
        self._reader = reader
        self._stats = stats
        self._on_error = on_error
        self._on_read = on_read
        self._clock = clock
        self._queue: deque[tuple[Ticket, Piece | None]] = deque()
        # An entry for each piece that was ever queued, and one for each agent at the end. Unlike a condition it waits
        # and wakes without a line of Python: agents take their time from the cores that compute.
        self._work: SimpleQueue[None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._buffers = [Arena(buffer_bytes) for _ in range(num_agents)] if buffer_bytes else []
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"hermes-loader-{number}", daemon=True)
            for number in range(num_agents)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, tickets: Iterable[Ticket], *, urgent: bool = False) -> None:
        """Queue every piece of the tickets, in order; urgent ones before all that is queued. Dropped once closed."""
        pairs: list[tuple[Ticket, Piece | None]] = []
        for ticket in tickets:
            parts = ticket.load.pieces or (None,)  # an empty tensor needs no read, but somebody must say it is done
            ticket.left = len(parts)
            pairs += [(ticket, part) for part in parts]
        with self._lock:
            if self._closed:
                return
            if urgent:
                self._queue.extendleft(reversed(pairs))
            else:
                self._queue.extend(pairs)
        for _ in pairs:
            self._work.put(None)

    def close(self) -> None:
        """Drop what is queued, wait for what is being read, end the threads. Idempotent."""
        self._stop()
        for thread in self._threads:
            thread.join()
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []

    def _stop(self) -> None:
        with self._lock:
            self._closed = True
            self._queue.clear()
        for _ in self._threads:
            self._work.put(None)

    def _next(self) -> tuple[Ticket, Piece | None] | None:
        self._work.get()
        with self._lock:
            return self._queue.popleft() if self._queue else None

    def _run(self, number: int) -> None:
        name = f"loader {number}"
        buffer = self._buffers[number].view if self._buffers else memoryview(b"")
        try:
            while (item := self._next()) is not None:
                ticket, piece = item
                nbytes = 0
                if piece is not None and not ticket.is_abandoned():
                    start = self._clock()
                    nbytes = self._read(ticket, piece, buffer)
                    if self._on_read is not None:
                        self._on_read(name, ticket, nbytes, start, self._clock())
                with self._lock:
                    self._stats.bytes_read += nbytes
                    ticket.left -= 1
                    done = ticket.left == 0
                if done:
                    _settle(ticket)
                    ticket.on_done(ticket)
                del item, ticket, piece
        except BaseException as error:  # whatever stops an agent must stop the others, and be seen
            self._stop()
            self._on_error(error)

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
