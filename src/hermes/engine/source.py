"""What stands between a model and its engine, and changes nothing: a start for those who do."""

from collections.abc import Sequence
from typing import Any

from hermes.engine.engine import Engine
from hermes.memory.arena import Arena
from hermes.pipeload import Load, Place

__all__ = ["EngineSource"]


class EngineSource:
    """An engine as its model sees it (`BlockSource`). Who comes between them overrides `want`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.ring: Any = engine.ring
        self.store: Any = engine.store

    def start(self) -> list[Place]:
        """As the engine's."""
        return self._engine.start()

    def want(self, block: int) -> tuple[Place, ...]:
        """As the engine's."""
        return self._engine.want(block)

    @property
    def is_settled(self) -> bool:
        """Never, so that no `want` is left out."""
        return False

    def hold(self, block: int) -> bool:
        """Never, likewise."""
        return False

    def places(self, block: int) -> tuple[Place, ...]:
        """As the engine's."""
        return self._engine.places(block)

    def fetch(self, loads: Sequence[tuple[Load, memoryview]]) -> None:
        """As the engine's."""
        self._engine.fetch(loads)

    def take(self, nbytes: int) -> Arena:
        """As the engine's."""
        return self._engine.take(nbytes)

    def begin_pass(self, heap_bytes: int = 0) -> None:
        """As the engine's."""
        self._engine.begin_pass(heap_bytes)

    def end_pass(self) -> None:
        """As the engine's."""
        self._engine.end_pass()

    def close(self) -> None:
        """As the engine's."""
        self._engine.close()
