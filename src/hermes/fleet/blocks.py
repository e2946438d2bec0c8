"""SwapNet's block API: `load_block`, `run_block`, `unload_block`, for a scheduler of the caller's own.

The engine is the one that streams single models; here nothing is read ahead unless the caller says so.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from hermes.api import settle_plan
from hermes.engine import Engine
from hermes.errors import EngineError, InputError
from hermes.memory.allocator import keep_heap_tight
from hermes.model.source import SourceAround
from hermes.pipeload import Place, smallest_ring
from hermes.session import MARGIN_BYTES, prepare_module, start_session
from hermes.units import format_bytes, parse_bytes

__all__ = ["Blocks"]


class Blocks:
    """A module as a row of blocks that the caller loads, runs and unloads. A context manager.

        with hermes.Blocks(net, "net.safetensors", "300MiB", example_args=(x,)) as blocks:
            blocks.begin(x)
            while (block := blocks.next_block) is not None:
                blocks.run_block(block)
            y = blocks.result()

    **What running a block means.** A forward is rarely a plain chain, so it is not taken apart: it runs as written, on
    a thread of its own that is handed over block by block. `run_block(i)` lets it go on from where it stands, which
    must be at block i, until it is about to use a parameter of another block, or returns. Shortcuts, loops and branches
    are as in the module; a block may come again, or not at all. The output is the resident module's, bit for bit.

    Args:
        module: as in `hermes.stream`.
        checkpoint: likewise.
        budget: of this process; what it leaves is the window that loaded blocks share.
        example_args: of the module's forward; needed to know the blocks in their order.
        example_kwargs: likewise.
        window: what loaded blocks may take, if not all that the budget leaves: where several of these share a process,
            each has the budget of all, and a window of its own.
        granularity: "leaf" (a layer with parameters), "half", or "layer" (a repeated part of the module).
        matrix_bytes: matrices of linear layers above this become several blocks, ranges of rows.

    Raises BudgetError, CheckpointError, ModelError, InputError. Not thread-safe: one scheduler drives it.
    """

    def __init__(
        self,
        module: nn.Module,
        checkpoint: str | Path,
        budget: str | int,
        *,
        example_args: tuple[Any, ...],
        example_kwargs: Mapping[str, Any] | None = None,
        window: str | int | None = None,
        granularity: str = "layer",
        matrix_bytes: str | int | None = None,
    ) -> None:
        keep_heap_tight()
        self._module = module.eval()
        prepared = prepare_module(
            module,
            checkpoint,
            args=example_args,
            kwargs=example_kwargs,
            matrix_bytes=None if matrix_bytes is None else parse_bytes(matrix_bytes),
        )
        reader = prepared.reader()
        try:
            plan, _ = settle_plan(
                prepared, reader, parse_bytes(budget), granularity=granularity, resident_bytes=0, sequential=True
            )
            spare = plan.limit_bytes - MARGIN_BYTES - plan.peak_bytes
            ring_bytes = plan.ring_bytes + max(0, spare)
            if window is not None:
                ring_bytes = min(ring_bytes, parse_bytes(window))
            plan = replace(plan, ring_bytes=ring_bytes // 4096 * 4096)
            blocks, _ = prepared.blocks(prepared.factory(reader.alignment, plan.piece_bytes), granularity)  # type: ignore[arg-type]
            self.names: Sequence[str] = [block.name for block in blocks]
            self.block_bytes: Sequence[int] = [sum(load.slot_bytes for load in block.loads) for block in blocks]
            self.window_bytes = plan.ring_bytes
            needed = smallest_ring([load.slot_bytes for load in block.loads] for block in blocks)
            if needed > plan.ring_bytes:
                raise InputError(f"the largest block needs a window of {format_bytes(needed)}, not {window}")
            self._gate = _Gate()
            self._session = start_session(
                prepared, plan, reader, source=lambda engine: _GatedSource(engine, self._gate)
            )
        except BaseException:
            reader.close()
            raise
        self._engine = self._session.engine
        self._thread: threading.Thread | None = None
        self._output: Any = None
        self._error: BaseException | None = None

    @property
    def next_block(self) -> int | None:
        """Where the forward stands; None where none is under way. Blocks until it has come to a boundary."""
        return self._gate.wait()

    def begin(self, *args: Any, **kwargs: Any) -> None:
        """Start a forward; it stops before its first block. Raises InputError while another one is under way."""
        if self._thread is not None:
            raise InputError("a forward is under way; run its blocks and take its result first")
        self._output = self._error = None
        self._gate.begin()
        self._thread = threading.Thread(target=self._run, args=(args, kwargs), name="hermes-blocks", daemon=True)
        self._thread.start()

    def load_block(self, block: int) -> bool:
        """Begin to read a block, and return at once. False where the window has no room for it to begin with.

        Blocks take their room in the order in which they are loaded, and give it back in that order. One that is loaded
        out of the order in which the forward comes to them is read again.
        """
        self._check(block)
        return self._engine.foresee(block)

    def run_block(self, block: int) -> None:
        """Wait until the block is loaded (and load it, if nobody has), and let the forward go on to its end.

        Raises InputError where the forward stands at another block, and what the forward or a read raises.
        """
        self._check(block)
        at = self.next_block
        if at != block:
            where = "no forward is under way; call begin()" if at is None else f"the forward comes to block {at} next"
            raise InputError(f"block {block} cannot run: {where}")
        self._gate.let_go()
        self._gate.wait()
        if self._error is not None:
            raise self._error

    def unload_block(self, block: int) -> None:
        """Give a block's memory back: of the one that ran last, or of one that was loaded and shall not run after all.

        The next `run_block` does it too, for the one before.
        """
        self._check(block)
        if self._session.stats.current_block == block:
            self._engine.release()
        self._engine.forget(block)

    def result(self) -> Any:
        """What the forward has returned. Raises InputError while blocks are left, and what the forward raised."""
        at = self.next_block
        if at is not None:
            raise InputError(f"the forward is not over: it comes to block {at} next")
        if self._thread is None:
            raise InputError("no forward has run; call begin()")
        self._thread.join()
        self._thread = None
        if self._error is not None:
            raise self._error
        return self._output

    def close(self) -> None:
        """End a forward under way, the agents and the memory. Idempotent."""
        self._gate.cancel()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, block: int) -> None:
        if not 0 <= block < len(self.block_bytes):
            raise InputError(f"there is no block {block}; there are {len(self.block_bytes)}, from 0 on")
        if self.block_bytes[block] > self.window_bytes:
            raise InputError(f"block {block} has {format_bytes(self.block_bytes[block])}, more than the window")

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            with torch.no_grad():
                self._output = self._module(*args, **kwargs)
        except BaseException as error:
            self._error = error
        finally:
            self._gate.end()


class _Gate:
    """Where the forward's thread stands before each block; the scheduler's thread opens it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._block: int | None = None  # that the forward stands at
        self._moving = False
        self._cancelled = False

    def begin(self) -> None:
        """The forward goes, up to its first block."""
        self._moving = True

    def let_go(self) -> None:
        """The forward goes on, up to the next one."""
        with self._changed:
            self._block, self._moving = None, True
            self._changed.notify_all()

    def wait(self) -> int | None:
        """Block until it stands; where. None at its end."""
        with self._changed:
            while self._moving:
                self._changed.wait()
            return self._block

    def end(self) -> None:
        """The forward is over."""
        with self._changed:
            self._block, self._moving = None, False
            self._changed.notify_all()

    def cancel(self) -> None:
        """Let it fail at its next block."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def stand(self, block: int) -> None:
        """Be at this block until the gate opens. Raises EngineError if it is closed for good."""
        with self._changed:
            self._block, self._moving = block, False
            self._changed.notify_all()
            while not self._moving:
                if self._cancelled:
                    raise EngineError("the blocks were closed while a forward was under way")
                self._changed.wait()


class _GatedSource(SourceAround):
    """An engine behind the gate."""

    def __init__(self, engine: Engine, gate: _Gate) -> None:
        super().__init__(engine)
        self._gate = gate

    @property
    def is_settled(self) -> bool:
        """Never, so that the gate is asked before each block."""
        return False

    def hold(self, block: int) -> bool:
        """Never, likewise."""
        return False

    def want(self, block: int) -> tuple[Place, ...]:
        """As the engine's, once the gate is open."""
        self._gate.stand(block)
        return super().want(block)
