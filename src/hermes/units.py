"""Bytes and seconds, in and out of text. Memory is counted in binary units (MiB), disk rates in decimal ones (MB/s)."""

import re
from decimal import Decimal

from hermes.errors import BudgetError

__all__ = ["format_budget", "format_bytes", "format_rate", "format_seconds", "parse_bytes"]

_FACTORS = {
    "": 1, "B": 1,
    "K": 2**10, "KIB": 2**10, "KB": 10**3,
    "M": 2**20, "MIB": 2**20, "MB": 10**6,
    "G": 2**30, "GIB": 2**30, "GB": 10**9,
    "T": 2**40, "TIB": 2**40, "TB": 10**12,
}  # fmt: skip
_MAX_BYTES = 2**63 - 1
"""What a system can count."""
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Bytes of "700MiB", "3G", "1.5 GB" or a plain number; a bare letter is binary, as in `ulimit` and cgroups.

    Raises BudgetError when the text is not a positive size, or is one that no machine has.
    """
    match = _SIZE.fullmatch(str(text))
    factor = _FACTORS.get(match[2].upper()) if match else None
    nbytes = int(Decimal(match[1]) * factor) if match and factor else 0
    if nbytes <= 0:
        raise BudgetError(f"cannot read {str(text)!r} as a size of memory; try 700MiB, 1.5GiB or a number of bytes")
    if nbytes > _MAX_BYTES:
        raise BudgetError(f"a size of memory is {_MAX_BYTES} bytes at most; try 700MiB or 1.5GiB")
    return nbytes


def format_bytes(nbytes: float) -> str:
    """Three digits or so, binary units: "412 MiB", "1.39 GiB"."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 100 else f"{size:.3g} {unit}"


def format_rate(bytes_per_second: float) -> str:
    """Decimal, as disks are sold: "1.42 GB/s", "950 MB/s"."""
    if bytes_per_second >= 1e9:
        return f"{bytes_per_second / 1e9:.2f} GB/s"
    return f"{bytes_per_second / 1e6:.0f} MB/s"


def format_seconds(seconds: float) -> str:
    """As one would say it: "12.3 s", "45 ms", "2 min 03 s"."""
    if seconds >= 100:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def format_budget(nbytes: int) -> str:
    """A --budget that can be typed and is no less than `nbytes`: whole MiB, rounded up."""
    return f"{-(-nbytes // 2**20)}MiB"
