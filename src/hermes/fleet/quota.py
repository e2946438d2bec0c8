"""How a budget is divided: every model what it cannot do without, and the rest by weight. Pure arithmetic."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hermes.errors import BudgetError
from hermes.units import format_budget, format_bytes

__all__ = ["Need", "divide", "lend"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Bytes that a model takes for weights: at least (pinned and the smallest window), and to keep them all."""

    least_bytes: int
    most_bytes: int


def divide(budget_bytes: int, needs: Mapping[str, Need], weights: Mapping[str, float]) -> dict[str, int]:
    """Quotas from `least_bytes` to `most_bytes` each, that sum to `budget_bytes`, or less where all have their most.

    What is left over the least is shared in proportion to `weights`; what one model cannot use goes to the others.

    Raises BudgetError where the least do not fit, with the smallest budget that would do.
    """
    least = sum(need.least_bytes for need in needs.values())
    if least > budget_bytes:
        raise BudgetError(
            f"{len(needs)} models need {format_bytes(least)} for the smallest windows, the budget leaves "
            f"{format_bytes(budget_bytes)} for weights; raise it by {format_budget(least - budget_bytes)}",
            minimum_bytes=least,
        )
    quotas = {name: need.least_bytes for name, need in needs.items()}
    hungry = [name for name, need in needs.items() if need.most_bytes > need.least_bytes]
    while hungry and (left := budget_bytes - sum(quotas.values())) > 0:
        total = sum(weights[name] for name in hungry)
        shares = {name: left * weights[name] / total if total else left / len(hungry) for name in hungry}
        full = [name for name in hungry if quotas[name] + shares[name] >= needs[name].most_bytes]
        if not full:
            for name in hungry:
                quotas[name] += int(shares[name])
            for name in hungry[: budget_bytes - sum(quotas.values())]:  # what rounding left: less than a byte of each
                quotas[name] += 1
        for name in full:
            quotas[name] = needs[name].most_bytes
        hungry = [name for name in hungry if name not in full] if full else []
    return quotas


def lend(quotas: Mapping[str, int], needs: Mapping[str, Need], busy: Collection[str]) -> dict[str, int]:
    """The same budget while only some models are busy: the others' bytes, but for their least, go where they help.

    Quotas sum to what they did, or less; those of busy models never shrink. With nobody or everybody busy, the same.
    """
    if not busy or len(busy) == len(quotas):
        return dict(quotas)
    idle = [name for name in quotas if name not in busy]
    budget_bytes = sum(quotas.values()) - sum(needs[name].least_bytes for name in idle)
    wanted = {
        name: Need(least_bytes=quotas[name], most_bytes=max(quotas[name], needs[name].most_bytes)) for name in busy
    }
    room = {name: float(need.most_bytes - need.least_bytes) for name, need in wanted.items()}
    return {name: needs[name].least_bytes for name in idle} | divide(budget_bytes, wanted, room)
