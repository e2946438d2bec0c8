"""Several models on a device that shares the host's memory: each output as alone there, in turns, inside one budget."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hermes
from hermes.errors import InputError

MIB = 2**20
SHAPES = {"small": (512, 4), "large": (1024, 5)}
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)


class Net(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 10)
        self.width = width

    def forward(self, x):
        x = self.conv(x).flatten(1)[:, : self.width]
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    made = {}
    for name, shape in SHAPES.items():
        torch.manual_seed(len(name))
        net = Net(*shape).eval()
        path = tmp_path_factory.mktemp("nets") / f"{name}.safetensors"
        save_file(net.state_dict(), path)
        made[name] = (net, path)
    return made


def add(fleet, nets, name):
    with torch.device("meta"):
        skeleton = Net(*SHAPES[name])
    fleet.add(name, skeleton, nets[name][1], example_args=(PIXELS,))


@pytest.mark.parametrize("policy", ["round-robin", "deadline"])
def test_outputs_are_those_of_each_alone(policy, nets, second):
    second.is_unified = True
    inputs = [(PIXELS * scale).to("second") for scale in (1, 2, -1)]
    with torch.no_grad():
        expected = {name: [net.to("second")(x) for x in inputs] for name, (net, _) in nets.items()}
    with hermes.Fleet(budget="1GiB", policy=policy, device="second") as fleet:
        add(fleet, nets, "large")
        # Margin, slack and activations; and less for weights than they take.
        fleet.budget_bytes = fleet._measure_floor() + 48 * MIB + 20 * MIB
        fleet.start()
        add(fleet, nets, "small")  # while the other one runs
        answers = [(name, number, fleet.submit(name, x)) for number, x in enumerate(inputs) for name in SHAPES]
        for name, number, answer in answers:
            assert answer.result(60).device.type == "second"
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
