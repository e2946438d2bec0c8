"""Who has reserved how much of the budget. Counts only; the memory itself is in `arena`, real figures in `probe`."""

from collections.abc import Mapping
from types import MappingProxyType

from hermes.errors import BudgetError
from hermes.units import format_budget, format_bytes

__all__ = ["Ledger"]


class Ledger:
    """Reservations in bytes under one budget, by account ("floor", "heap", "window", "resident", ...).

    **Guarantee.** The sum of all reservations never exceeds the budget: what does not fit is refused, never overshot.
    Not thread-safe; the Daemon Agent owns it. `option` is what refusals name to ask for more.
    """

    def __init__(self, budget_bytes: int, option: str = "--budget") -> None:
        self.budget_bytes = budget_bytes
        self._option = option
        self._accounts: dict[str, int] = {}

    @property
    def accounts(self) -> Mapping[str, int]:
        """Bytes reserved, by account."""
        return MappingProxyType(self._accounts)

    @property
    def reserved_bytes(self) -> int:
        """Sum over all accounts."""
        return sum(self._accounts.values())

    @property
    def free_bytes(self) -> int:
        """What is left of the budget."""
        return self.budget_bytes - self.reserved_bytes

    def resize(self, budget_bytes: int) -> None:
        """Set the budget; raises BudgetError and changes nothing if more than that is reserved."""
        if self.reserved_bytes > budget_bytes:
            raise BudgetError(
                f"{format_bytes(self.reserved_bytes)} are reserved, a budget of {format_bytes(budget_bytes)} is less; "
                f"try {self._option} {format_budget(self.reserved_bytes)}",
                minimum_bytes=self.reserved_bytes,
            )
        self.budget_bytes = budget_bytes

    def reserve(self, account: str, nbytes: int) -> None:
        """Set an account to `nbytes`; raises BudgetError and changes nothing if that does not fit."""
        grow = nbytes - self._accounts.get(account, 0)
        if grow > self.free_bytes:
            raise BudgetError(
                f"{account} needs {format_bytes(nbytes)}, the budget of {format_bytes(self.budget_bytes)} leaves "
                f"{format_bytes(self.free_bytes + nbytes - grow)}; "
                f"try {self._option} {format_budget(self.reserved_bytes + grow)}",
                minimum_bytes=self.reserved_bytes + grow,
            )
        self._accounts[account] = nbytes
