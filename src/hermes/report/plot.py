"""Latency against budget as a picture: a PNG by matplotlib, or an HTML file that needs nothing but a browser.

The suffix of the file chooses. Tables are in `tables`.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hermes.errors import InputError
from hermes.plan import Plan
from hermes.units import format_bytes, format_seconds

__all__ = ["SUFFIXES", "check_plot_path", "latency_against_budget"]

SUFFIXES = (".png", ".html")

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 24, 56, 56
_MIB = 2**20
_STYLE = """
body { margin: 2rem; font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; }
svg { max-width: 100%; height: auto; } text { fill: currentColor; font-size: 12px; } .title { font-size: 15px; }
.grid { stroke: currentColor; opacity: .15; } .line { fill: none; stroke-width: 2; }
.s0 { stroke: #1f6feb; } .s1 { stroke: #d1570a; } .s2 { stroke: #6e7781; stroke-dasharray: 5 4; }
circle { fill: currentColor; }
.dots0 { color: #1f6feb; } .dots1 { color: #d1570a; } .dots2 { color: #6e7781; }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117; } }
"""


@dataclass(frozen=True, kw_only=True)
class _Series:
    name: str
    seconds: Sequence[float]
    dashed: bool = False


def check_plot_path(path: Path) -> None:
    """Raise InputError for a suffix nobody draws, or a PNG without matplotlib; before any work is done."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"cannot plot to {path}; the file's name must end in {' or '.join(SUFFIXES)}")
    if path.suffix.lower() == ".png":
        _agg_figure()


def latency_against_budget(plans: Sequence[Plan], path: Path, *, title: str) -> None:
    """Draw seconds per pass (steady, first, and what its bound alone would take) over the plans' budgets.

    Raises InputError if the suffix is not one of SUFFIXES, if a PNG is asked for without matplotlib, or if the file
    cannot be written.
    """
    check_plot_path(path)
    plans = sorted(plans, key=lambda plan: plan.budget_bytes)
    series = [
        _Series(name="steady pass", seconds=[plan.steady_pass_seconds for plan in plans]),
        _Series(name="first pass", seconds=[plan.first_pass_seconds for plan in plans]),
        _Series(name="bound (disk or compute alone)", seconds=[plan.bound_seconds for plan in plans], dashed=True),
    ]
    if series[0].seconds == series[1].seconds:  # a workload of one pass
        series[:2] = [_Series(name="pass", seconds=series[0].seconds)]
    draw = _write_png if path.suffix.lower() == ".png" else _write_html
    try:
        draw(path, title, [plan.budget_bytes for plan in plans], series)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _agg_figure() -> Callable[..., Any]:
    """Makes figures of matplotlib's with the Agg canvas: no display, and nothing global is set."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "a PNG needs matplotlib: pip install 'hermes-stream[plot]', or give a file that ends in .html"
        ) from None

    def figure(**options: Any) -> Any:
        made = Figure(**options)
        FigureCanvasAgg(made)
        return made

    return figure


def _write_png(path: Path, title: str, budgets: Sequence[int], series: Sequence[_Series]) -> None:
    figure = _agg_figure()(figsize=(_WIDTH / 100, _HEIGHT / 100), layout="constrained")
    axes = figure.add_subplot()
    for one in series:
        axes.plot(
            [budget / _MIB for budget in budgets],
            one.seconds,
            "--" if one.dashed else "o-",
            label=one.name,
            markersize=4,
        )
    axes.set(title=title, xlabel="budget (MiB)", ylabel="seconds per pass", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _write_html(path: Path, title: str, budgets: Sequence[int], series: Sequence[_Series]) -> None:
    name = html.escape(title)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style></head><body>\n{_svg(name, budgets, series)}\n</body></html>\n",
        encoding="utf-8",
    )


def _svg(title: str, budgets: Sequence[int], series: Sequence[_Series]) -> str:
    low, high = min(budgets) / _MIB, max(budgets) / _MIB
    top = max(max(one.seconds) for one in series) or 1.0
    x_ticks = _ticks(low, high)
    y_ticks = _ticks(0.0, top)
    top = max(top, y_ticks[-1])
    span = (high - low) or 1.0

    def x_of(mebibytes: float) -> float:
        return _LEFT + (mebibytes - low) / span * (_WIDTH - _LEFT - _RIGHT)

    def y_of(seconds: float) -> float:
        return _HEIGHT - _BOTTOM - seconds / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<text class="title" x="{_LEFT}" y="20">{title}</text>']
    for tick in x_ticks:
        x = x_of(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for number, one in enumerate(series):
        points = [(x_of(b / _MIB), y_of(s), b, s) for b, s in zip(budgets, one.seconds, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
        parts.append(f'<polyline class="line s{number}" points="{line}"/>')
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            f"<title>{one.name}: {format_seconds(s)} at {format_bytes(b)}</title></circle>"
            for x, y, b, s in points
        )
        parts.append(f'<g class="dots{number}">{dots}</g>')
        x = _LEFT + 200 * number
        parts.append(f'<line class="line s{number}" x1="{x}" x2="{x + 22}" y1="38" y2="38"/>')
        parts.append(f'<text x="{x + 28}" y="42">{one.name}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 14}" text-anchor="middle">budget (MiB)</text>')
    parts.append(
        f'<text x="18" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 18 {middle:.0f})">'
        "seconds per pass</text>"
    )
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="{title}">\n{body}\n</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers inside [low, high]; the lower end itself where there is no room for any."""
    if high <= low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)] or [low]
