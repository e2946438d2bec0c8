"""Latency against budget as HTML and PNG: every point inside the frame, every figure there, refusals before work."""

import dataclasses
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes.errors import InputError
from hermes.plan import Plan
from hermes.report.plot import _ticks, check_plot_path, latency_against_budget

MIB = 2**20
PLAN = Plan(
    budget_bytes=600 * MIB, limit_bytes=600 * MIB, granularity="half", num_agents=3, piece_bytes=8 * MIB,
    ring_bytes=48 * MIB, resident=(frozenset(),), resident_bytes=0, pass_bytes=1, first_pass_seconds=1.5,
    steady_pass_seconds=1.0, total_seconds=7.5, peak_bytes=584 * MIB, floor_bytes=390 * MIB, heap_bytes=0,
    pinned_bytes=0, bound="disk", bound_seconds=0.9,
)  # fmt: skip
PLANS = [
    dataclasses.replace(PLAN, budget_bytes=size * MIB, steady_pass_seconds=600 / size) for size in (1800, 504, 900)
]


def svg_of(path):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", path.read_text(encoding="utf-8"), re.DOTALL)[0])


def test_html_needs_nothing_else_and_has_every_point(tmp_path):
    path = tmp_path / "sweep.html"
    latency_against_budget(PLANS, path, title="a <b> & c")
    page = path.read_text(encoding="utf-8")
    assert "a &lt;b&gt; &amp; c" in page
    assert not re.search(r"<script|https?://|src=|href=", page)
    svg = svg_of(path)
    dots = svg.findall(".//circle")
    assert len(dots) == 3 * len(PLANS)
    for dot in dots:
        assert 72 <= float(dot.get("cx")) <= 760 - 24
        assert 56 <= float(dot.get("cy")) <= 440 - 56
    assert "steady pass: 1.19 s at 504 MiB" in [dot.find("title").text for dot in dots]
    # In order of budget, whatever the order they came in.
    line = [float(pair.split(",")[0]) for pair in svg.find(".//polyline").get("points").split()]
    assert line == sorted(line)


def test_a_workload_of_one_pass_is_one_line(tmp_path):
    plans = [dataclasses.replace(plan, first_pass_seconds=plan.steady_pass_seconds) for plan in PLANS]
    latency_against_budget(plans, tmp_path / "sweep.html", title="encoder")
    assert len(svg_of(tmp_path / "sweep.html").findall(".//polyline")) == 2


def test_a_single_budget_can_be_drawn(tmp_path):
    latency_against_budget([PLAN], tmp_path / "sweep.html", title="one")
    assert len(svg_of(tmp_path / "sweep.html").findall(".//circle")) == 3


def test_png(tmp_path):
    pytest.importorskip("matplotlib")
    latency_against_budget(PLANS, tmp_path / "sweep.png", title="gpt2")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_png_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(InputError, match=r"hermes-stream\[plot\]"):
        check_plot_path(tmp_path / "sweep.png")


@pytest.mark.parametrize("name", ["sweep.svg", "sweep", "sweep.pdf"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"\.png or \.html"):
        latency_against_budget(PLANS, tmp_path / name, title="gpt2")


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        latency_against_budget(PLANS, tmp_path / "no" / "sweep.html", title="gpt2")


@given(st.floats(0, 1e6), st.floats(1e-9, 1e6))
def test_ticks_lie_inside_and_are_few(low, width):
    high = low + width
    ticks = _ticks(low, high)
    assert 1 <= len(ticks) <= 11
    slack = 1e-6 * max(1.0, high)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert ticks == sorted(ticks)
