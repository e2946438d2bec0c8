"""The one ledger of a fleet: quotas under it, bytes lent by idle models to busy ones, and an eye on real memory."""

import threading
from collections.abc import Mapping

from hermes.engine.daemon import WATCH_SECONDS, MemorySample, ThrashWatch, WorkingSet, bytes_to_give_back
from hermes.errors import BudgetError, EngineError, HermesError
from hermes.fleet.quota import Need, lend
from hermes.fleet.turns import Turns
from hermes.fleet.worker import Worker
from hermes.memory.ledger import Ledger
from hermes.units import format_budget, format_bytes

__all__ = ["Shares"]

ROOM_SECONDS = 5.0
"""Longer than a request holds on to a block."""
IDLE_SECONDS = 1.0
IDLE_ROUNDS = 2.0
"""Without a request for the longer of both, while others have some, a model lends its bytes. It reads again what it has
lent, when it is back, so the others should have had some rounds in which they read less: who knows how long it stays
away?"""


class Shares:
    """Every model's quota is an account of the fleet's ledger, and the budget of the model's own ledger.

    **Guarantee.** An account grows before the model's budget does, and shrinks after it has: quotas, floor, heap and
    margin never sum to more than the limit, and no model reserves more than its quota.
    """

    def __init__(self, margin_bytes: int, turns: Turns, *, elastic: bool) -> None:
        self.ledger = Ledger(0)
        self._margin_bytes = margin_bytes
        self._turns = turns
        self._elastic = elastic
        self._base: dict[str, int] = {}
        self._needs: Mapping[str, Need] = {}
        self._workers: dict[str, Worker] = {}
        self._patience_seconds = IDLE_SECONDS
        self._looked_at = 0.0
        self._idle_seconds: dict[str, float] = {}  # without a request, while others had some
        self._working_set = WorkingSet()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._daemon: threading.Thread | None = None
        self._error: BaseException | None = None  # that stopped it

    @property
    def quotas(self) -> dict[str, int]:
        """Bytes for weights, by model, as they are now."""
        return {name: self.ledger.accounts.get(_account(name), 0) for name in self._base}

    def settle(self, limit_bytes: int, floor_bytes: int, heap_bytes: int) -> None:
        """Forget all quotas, and begin anew under this limit, beside this floor and heap.

        Raises BudgetError, and EngineError where nobody watches real memory any more.
        """
        with self._lock:
            if self._error is not None:
                raise _unwatched(self._error)
            self._workers = {}
            for account in list(self.ledger.accounts):
                self.ledger.reserve(account, 0)
            self._base = {}
            self.ledger.resize(limit_bytes)
            for account, nbytes in (("floor", floor_bytes), ("heap", heap_bytes), ("margin", self._margin_bytes)):
                self.ledger.reserve(account, nbytes)

    def grant(self, name: str, quota_bytes: int) -> Ledger:
        """A model's own ledger. Raises BudgetError where the fleet's has no room."""
        with self._lock:
            self.ledger.reserve(_account(name), quota_bytes)
            self._base[name] = quota_bytes
            return Ledger(quota_bytes)

    def make_room(self, nbytes: int) -> None:
        """Take so many bytes from the quotas until `settle`, for measuring a model that comes; the models run on.

        Blocking until blocks under way have let go of theirs. Raises BudgetError where there is no such room.
        """
        with self._lock:
            for name in sorted(self._base, key=lambda name: self._needs[name].least_bytes - self._base[name]):
                missing = nbytes - self.ledger.budget_bytes + self._settled_bytes()
                spare = self._base[name] - self._needs[name].least_bytes
                self._base[name] -= max(0, min(spare, missing))
            until = self._turns.clock() + ROOM_SECONDS
            while self.ledger.free_bytes < nbytes and self._turns.clock() < until:
                for name in self._base:
                    self._resize(name, min(self._base[name], self.ledger.accounts[_account(name)]))
                self._closed.wait(WATCH_SECONDS)
            self.ledger.reserve("measuring", nbytes)

    def _settled_bytes(self) -> int:
        """What is reserved once every model has its quota, no more."""
        lent = sum(self.ledger.accounts[_account(name)] - nbytes for name, nbytes in self._base.items())
        return self.ledger.reserved_bytes - lent

    def watch(self, workers: Mapping[str, Worker], needs: Mapping[str, Need], round_seconds: float) -> None:
        """From now on these run with what was granted, and one request of each is expected to take so long."""
        with self._lock:
            self._patience_seconds = max(IDLE_SECONDS, IDLE_ROUNDS * round_seconds)
            self._workers, self._needs = dict(workers), needs
            self._looked_at = self._turns.clock()
            self._idle_seconds = dict.fromkeys(workers, 0.0)
            if self._daemon is None:
                self._daemon = threading.Thread(target=self._run, name="hermes-fleet-daemon", daemon=True)
                self._daemon.start()

    def let_go(self, name: str) -> None:
        """Of a model whose engine is closed: its bytes are free, and nobody watches it any more."""
        with self._lock:
            self._workers.pop(name, None)
            self._idle_seconds.pop(name, None)
            if self._base.pop(name, None) is not None:
                self.ledger.reserve(_account(name), 0)

    def close(self) -> None:
        """End the watch. Idempotent."""
        self._closed.set()
        if self._daemon is not None:
            self._daemon.join()

    def _run(self) -> None:
        try:
            self._watch()
        except BaseException as error:  # whatever stops the watch must stop the models, and be seen
            with self._lock:
                self._error = error
                for worker in self._workers.values():
                    worker.fail(_unwatched(error))

    def _watch(self) -> None:
        thrash = ThrashWatch(self._turns.clock)
        while not self._closed.wait(WATCH_SECONDS):
            rate = thrash()
            with self._lock:
                if self._workers:
                    self._relieve(rate)
                    if self._elastic:
                        self._lend()

    def _lend(self) -> None:
        now, before = self._turns.clock(), self._looked_at
        self._looked_at = now
        asked = [name for name, one in self._workers.items() if one.failure is None and self._turns.backlog(name)]
        if not asked:
            return
        for name, seconds in self._idle_seconds.items():
            self._idle_seconds[name] = 0.0 if name in asked else seconds + now - before
        busy = [name for name, seconds in self._idle_seconds.items() if seconds < self._patience_seconds]
        targets = lend(self._base, self._needs, busy)
        for name in sorted(targets, key=lambda name: targets[name] - self.ledger.accounts[_account(name)]):
            self._resize(name, targets[name])

    def _resize(self, name: str, nbytes: int) -> None:
        account, worker = _account(name), self._workers[name]
        granted = self.ledger.accounts[account]
        nbytes = min(nbytes, granted + self.ledger.free_bytes)
        if nbytes == granted:
            return
        session = worker.session
        if session is None:  # it has failed: nothing of its quota is in use
            self.ledger.reserve(account, min(granted, nbytes))
            return
        self.ledger.reserve(account, max(granted, nbytes))
        try:
            self.ledger.reserve(account, session.engine.resize(nbytes))
        except HermesError:  # it fails just now, and its own thread will say so
            self.ledger.reserve(account, granted)

    def _relieve(self, faults_per_second: float) -> None:
        """Where the process outgrows its budget, or thrashes, the model that could spare most gives bytes back.

        Where all that could be spared is not enough, the request that computes is ended, as a single model's is; but
        not while a newcomer is measured, which ends itself (`measure_calls`).
        """
        # Before memory is looked at, or the next request might pay for this one.
        running = self._workers.get(self._turns.running or "")
        request = None if running is None else running.under_way
        limit_bytes = self.ledger.budget_bytes - self._margin_bytes // 2
        needed = self._working_set.trimmed(limit_bytes)
        excess = bytes_to_give_back(
            MemorySample(needed_bytes=needed, limit_bytes=limit_bytes, faults_per_second=faults_per_second)
        )
        if not excess:
            return
        spare = {
            name: self.ledger.accounts[_account(name)] - self._needs[name].least_bytes
            for name, worker in self._workers.items()
            if worker.session is not None
        }
        missing = needed - sum(nbytes for nbytes in spare.values() if nbytes > 0) - self.ledger.budget_bytes
        is_measuring = self.ledger.accounts.get("measuring", 0) > 0
        if missing > 0 and running is not None and request is not None and not is_measuring:
            request.ended_by = _outgrown(running.name, needed, self.ledger.budget_bytes, missing + self._margin_bytes)
        name = max(spare, key=lambda name: spare[name], default=None)
        if name is not None and spare[name] > 0:
            self._base[name] = max(self._needs[name].least_bytes, self._base[name] - excess)
            self._resize(name, max(self._needs[name].least_bytes, self.ledger.accounts[_account(name)] - excess))


def _account(name: str) -> str:
    return f"model {name}"


def _outgrown(name: str, needed_bytes: int, budget_bytes: int, missing_bytes: int) -> BudgetError:
    return BudgetError(
        f"{name}: the process needs {format_bytes(needed_bytes)} and no model has weights left to give back; the "
        f"fleet's budget is {format_bytes(budget_bytes)} (a larger input than the example?); "
        f"try --budget {format_budget(budget_bytes + missing_bytes)}",
        minimum_bytes=budget_bytes + missing_bytes,
    )


def _unwatched(error: BaseException) -> EngineError:
    return EngineError(f"nobody watches the fleet's memory any more: {error!r}; make a new fleet")
