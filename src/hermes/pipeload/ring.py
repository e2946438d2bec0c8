"""The window: a ring of bytes, given out and taken back in the same order, so that it cannot fragment."""

from collections import deque

from hermes.errors import EngineError

__all__ = ["Ring"]


class Ring:
    """Offsets into `capacity_bytes` of memory, allocated in order and freed in order.

    **Guarantees.** Spans that are out at the same time never overlap and never cross the end. An allocation of n bytes
    succeeds whenever the spans out, together with the bytes skipped at the end (fewer than n), leave n bytes.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._spans: deque[tuple[int, int]] = deque()  # (offset, nbytes), oldest first
        self._head = 0  # where the next span would start
        self._wrapped = False  # whether it would lie before the oldest; the offsets alone cannot tell full from empty

    @property
    def used_bytes(self) -> int:
        """Bytes in spans that are out, without what is skipped at the end."""
        return sum(nbytes for _, nbytes in self._spans)

    def allocate(self, nbytes: int) -> int | None:
        """Offset of a new span, or None while there is no room: waiting for it is PIPELOAD's stop signal."""
        if not self._spans:
            self._head, self._wrapped = 0, False
            if nbytes > self.capacity_bytes:
                return None
        else:
            tail = self._spans[0][0]
            if self._wrapped and tail - self._head < nbytes:
                return None
            if not self._wrapped and self.capacity_bytes - self._head < nbytes:
                if tail < nbytes:
                    return None
                self._head, self._wrapped = 0, True
        offset = self._head
        self._spans.append((offset, nbytes))
        self._head = offset + nbytes
        return offset

    def free(self, offset: int) -> None:
        """Take back the oldest span, which must be the one at `offset`."""
        if not self._spans or self._spans[0][0] != offset:
            raise EngineError(f"ring: span at {offset} freed out of order; oldest are {list(self._spans)[:3]}")
        self._spans.popleft()
        if self._spans and self._spans[0][0] < offset:
            self._wrapped = False
