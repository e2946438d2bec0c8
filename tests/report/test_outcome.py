"""The summary of a run, in lines for people."""

from dataclasses import replace

from hermes.report.outcome import Outcome

MIB = 2**20
OUTCOME = Outcome(
    model="m", task="t", outputs=[], budget_bytes=None, floor_bytes=None, peak_bytes=300 * MIB, load_seconds=1.0,
    seconds=2.0, first_output_seconds=1.0, seconds_per_pass=1.0, passes=2, bytes_read=10 * MIB, stall_seconds=None,
    predicted_seconds=None, predicted_peak_bytes=None, plan=None,
)  # fmt: skip
DEVICE = {
    "name": "cuda:0", "peak_bytes": 90 * MIB, "budget_bytes": 100 * MIB, "staying_bytes": 50 * MIB,
    "ring_bytes": 30 * MIB, "pass_bytes": 200 * MIB,
}  # fmt: skip


def test_no_word_of_a_device_on_the_cpu():
    assert not any("device" in line for line in OUTCOME.summary())


def test_ranges_of_rows_are_no_layers():
    plan = {"granularity": "layer", "num_blocks": 194, "num_row_ranges": 168, "num_agents": 2, "ring_bytes": 40 * MIB}
    line = replace(OUTCOME, plan=plan | {"resident_bytes": 0, "bound": "disk"}).summary()[0]
    assert line.startswith("plan    layer, 194 blocks, 168 of them ranges of a matrix's rows; 2 agents, window 40 MiB")
    whole = plan | {"num_blocks": 24, "num_row_ranges": 0, "resident_bytes": 0, "bound": "disk"}
    assert replace(OUTCOME, plan=whole).summary()[0].startswith("plan    layer, 24 blocks; 2 agents")


def test_what_a_device_had_to_hold():
    (line,) = [line for line in replace(OUTCOME, device=DEVICE).summary() if line.startswith("device")]
    assert line == (
        "device  cuda:0: peak 90 MiB of 100 MiB, 50 MiB of weights stay, window 30 MiB; 200 MiB copied in each pass"
    )


def test_a_device_that_shares_memory():
    shared = {**DEVICE, "budget_bytes": None}
    assert replace(OUTCOME, device=shared).summary()[0].endswith("weights in the memory it shares with the host")
