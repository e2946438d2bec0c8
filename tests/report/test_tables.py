"""Records as tables: every figure is there, the parts of a budget add up, and layers alike are one row."""

from dataclasses import replace

import pytest
from rich.console import Console

from hermes.plan import Plan
from hermes.profile import (
    BandwidthRecord,
    ComputeRecord,
    DelayModel,
    LinearFit,
    MachineRecord,
    Profile,
    UnitRecord,
)
from hermes.report.tables import (
    bandwidth_table,
    budget_table,
    delay_facts,
    facts_table,
    fold_units,
    merge_blocks,
    plan_table,
    profile_table,
    sweep_table,
    touch_fact,
)

MIB = 2**20


def text(table):
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def make_plan(**changes):
    plan = {
        "budget_bytes": 600 * MIB, "limit_bytes": 600 * MIB, "granularity": "half", "num_agents": 3,
        "piece_bytes": 8 * MIB, "ring_bytes": 48 * MIB, "resident": (frozenset(),) * 7, "resident_bytes": 70 * MIB,
        "pass_bytes": 1280 * MIB, "first_pass_seconds": 1.25, "steady_pass_seconds": 0.9, "total_seconds": 7.5,
        "peak_bytes": 584 * MIB, "floor_bytes": 390 * MIB, "heap_bytes": 68 * MIB, "pinned_bytes": 2 * MIB,
        "bound": "disk", "bound_seconds": 0.85,
    }  # fmt: skip
    return Plan(**(plan | changes))


def make_unit(name, **changes):
    unit = {
        "block": ".".join(name.split(".")[:2]), "nbytes": 4 * MIB, "flops": 8_000_000, "activation_bytes": MIB,
        "load_seconds": {1: 0.004, 4: 0.002}, "compute": ComputeRecord(samples=((1, 0.001), (128, 0.2))),
    }  # fmt: skip
    return UnitRecord(name=name, **(unit | changes))


LAYERS = [make_unit(f"h.{layer}.{part}") for layer in range(3) for part in ("attn", "mlp")]


@pytest.fixture
def profile():
    return Profile(
        checkpoint="0" * 32,
        machine=MachineRecord(
            cpu="a", num_cores=2, num_threads=2, memory_bytes=1, torch="2", transformers="5", file_system="1"
        ),
        model_class="M",
        dtype="float32",
        batch_size=1,
        sequence_length=128,
        floor_bytes=300 * MIB,
        bandwidths=(
            BandwidthRecord(num_agents=1, piece_bytes=2 * MIB, bytes_per_second=0.9e9),
            BandwidthRecord(num_agents=1, piece_bytes=8 * MIB, bytes_per_second=1.1e9),
            BandwidthRecord(num_agents=4, piece_bytes=8 * MIB, bytes_per_second=1.8e9),
        ),
        units=(*LAYERS, make_unit("lm_head[0:4096]", block="lm_head", nbytes=10 * MIB)),
    )


def test_a_plan_shows_what_was_settled_and_what_it_costs():
    shown = text(plan_table(make_plan(), num_passes=8, num_row_ranges=3, smallest_bytes=504 * MIB, measured=False))
    for figure in ("1.25 s", "900 ms", "7.5 s for 8 passes", "disk: 850 ms", "1.25 GiB", "3, 8 MiB a read", "half"):
        assert figure in shown
    for figure in ("half, 7 blocks, 3 of them ranges of a matrix's rows", "584 MiB", "504 MiB", "estimated"):
        assert figure in shown


def test_one_pass_is_not_passes():
    plan = make_plan(sequential=True)
    shown = text(plan_table(plan, num_passes=1, num_row_ranges=0, smallest_bytes=1, measured=True))
    assert "for 1 pass\n" in shown.replace(" \n", "\n").replace("  ", "")
    assert "one at a time" in shown
    assert "estimated" not in shown


def test_the_parts_of_a_budget_add_up():
    table = budget_table(make_plan())
    sizes = dict(zip(table.columns[0].cells, table.columns[1].cells, strict=True))
    assert sizes.pop("budget") == "600 MiB"
    assert sum(float(size.removesuffix(" MiB")) for size in sizes.values()) == 600
    assert sizes["buffers"] == "6 MiB"


def test_no_window_where_nothing_streams():
    table = budget_table(make_plan(pass_bytes=0, peak_bytes=530 * MIB))
    assert list(table.columns[0].cells) == ["floor", "heap", "pinned", "resident", "spare", "budget"]


def test_a_sweep_has_a_row_for_each_plan_and_fits_a_terminal():
    table = sweep_table([make_plan(budget_bytes=size * MIB) for size in (504, 1122, 1822)])
    assert table.row_count == 3
    shown = text(table)
    assert "…" not in shown
    assert "1.78 GiB" in shown


def test_layers_are_sums_of_their_units(profile):
    layers = merge_blocks(profile.units)
    assert [layer.name for layer in layers] == ["h.0", "h.1", "h.2", "lm_head"]
    assert (layers[0].nbytes, layers[0].flops, layers[0].activation_bytes) == (8 * MIB, 16_000_000, MIB)
    assert layers[0].load_seconds == {1: 0.008, 4: 0.004}
    assert layers[0].compute.samples == ((1, 0.002), (128, 0.4))


def test_what_one_unit_lacks_its_layer_lacks():
    units = [make_unit("h.0.a"), make_unit("h.0.b", load_seconds={1: 0.1}, compute=ComputeRecord(samples=((1, 0.1),)))]
    (layer,) = merge_blocks(units)
    assert set(layer.load_seconds) == {1}
    assert [tokens for tokens, _ in layer.compute.samples] == [1]


def test_units_alike_are_one_row_with_the_median_of_their_seconds():
    units = [make_unit(f"h.{n}.mlp", load_seconds={1: seconds}) for n, seconds in enumerate((1.0, 2.0, 9.0))]
    folded = fold_units([*units, make_unit("h.3.mlp", nbytes=1)])
    assert [(row.pattern, row.count) for row in folded] == [("h.*.mlp", 3), ("h.3.mlp", 1)]
    assert folded[0].unit.load_seconds == {1: 2.0}


def test_a_profile_folds_layers(profile):
    shown = text(profile_table(profile))
    assert "3 x h.*" in shown
    assert "by 4" in shown
    for figure in ("8 MiB", "16 M", "400"):
        assert figure in shown
    assert profile_table(profile, by_unit=True).row_count == 3


def test_bandwidths_by_agents_and_piece(profile):
    table = bandwidth_table(profile)
    assert list(table.columns[1].cells) == ["900 MB/s", ""]
    assert list(table.columns[2].cells) == ["1.10 GB/s", "1.80 GB/s"]


def test_the_delay_model_claims_no_rate(profile):
    t_in = LinearFit(coefficients={"nbytes": 1e-11, "depth": 5e-3}, constant=2e-5, r_squared=0.97, num_samples=219)
    delays = DelayModel(t_in=t_in, t_ex=None, t_ex_flops=None, t_out=None)
    assert delay_facts(replace(profile, delays=delays)) == [
        ("t_in (loading)", "0.01 ms a MiB + 5 ms a unit + 0.02 ms a block; R^2 0.970 over 219 blocks")
    ]


def test_many_figures_are_summed_up():
    assert touch_fact([0.9e-9, 2e-9, 4e-9]) == (
        "touching memory first",
        "500 MB/s; 250 MB/s to 1.11 GB/s over 3 steps of 64 MiB",
    )


def test_facts():
    assert text(facts_table("Title", [("name", "value")])).split() == ["Title", "name", "value"]
