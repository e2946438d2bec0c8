"""What stands between a model and its engine, and changes nothing: a start for those who do."""

from collections.abc import Sequence

from hermes.memory.arena import Arena
from hermes.model.binding import BlockSource, Memory
from hermes.pipeload import Load, Place

__all__ = ["SourceAround"]


class SourceAround:
    """`BlockSource` that does what another one does."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source
        self.ring: Memory = source.ring
        self.store: Memory = source.store

    @property
    def is_settled(self) -> bool:
        """As the other's; likewise everything below."""
        return self._source.is_settled

    def start(self) -> list[Place]:
        """Likewise."""
        return self._source.start()

    def want(self, block: int) -> tuple[Place, ...]:
        """Likewise."""
        return self._source.want(block)

    def hold(self, block: int) -> bool:
        """Likewise."""
        return self._source.hold(block)

    def places(self, block: int) -> tuple[Place, ...]:
        """Likewise."""
        return self._source.places(block)

    def fetch(self, loads: Sequence[tuple[Load, memoryview]]) -> None:
        """Likewise."""
        self._source.fetch(loads)

    def take(self, nbytes: int) -> Arena:
        """Likewise."""
        return self._source.take(nbytes)

    def begin_pass(self, heap_bytes: int = 0) -> None:
        """Likewise."""
        self._source.begin_pass(heap_bytes)

    def end_pass(self) -> None:
        """Likewise."""
        self._source.end_pass()

    def close(self) -> None:
        """Likewise."""
        self._source.close()
