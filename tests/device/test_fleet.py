"""Several models on a device that shares the host's memory: each output as alone there, in turns, inside one budget."""

import json

import pytest
import torch

import hermes
from hermes.errors import InputError
from small_nets import PIXELS, save_nets, skeleton

MIB = 2**20
NAMES = ("small", "large")


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    return save_nets(tmp_path_factory.mktemp("nets"), NAMES)


def add(fleet, nets, name):
    fleet.add(name, skeleton(name), nets[name][1], example_args=(PIXELS,))


@pytest.mark.parametrize("policy", ["round-robin", "deadline"])
def test_outputs_are_those_of_each_alone(policy, nets, kind, shared):
    inputs = [(PIXELS * scale).to(kind) for scale in (1, 2, -1)]
    with torch.no_grad():
        expected = {name: [net.to(kind)(x) for x in inputs] for name, (net, _) in nets.items()}
    with hermes.Fleet(budget="1GiB", policy=policy, device=kind) as fleet:
        add(fleet, nets, "large")
        # Margin, slack and activations; and less for weights than they take.
        fleet.budget_bytes = fleet._measure_floor() + 48 * MIB + 20 * MIB
        fleet.start()
        add(fleet, nets, "small")  # while the other one runs
        answers = [(name, number, fleet.submit(name, x)) for number, x in enumerate(inputs) for name in NAMES]
        for name, number, answer in answers:
            assert answer.result(60).device.type == kind
            assert torch.equal(answer.result().cpu(), expected[name][number].cpu())
        assert any(plan.pass_bytes for plan in fleet.plan.plans.values())


def test_a_device_with_memory_of_its_own_is_refused(second):
    with pytest.raises(InputError, match="memory of its own"):
        hermes.Fleet(budget="1GiB", device="second")


def test_a_file_names_its_device(tmp_path):
    from hermes.cli.fleet_file import read_fleet_file

    lines = ['budget = "1GiB"', 'device = "cuda"', "[models.one]", f"model = {json.dumps(str(tmp_path))}"]
    (tmp_path / "fleet.toml").write_text("\n".join(lines))
    assert read_fleet_file(tmp_path / "fleet.toml").device == "cuda"
