"""Plain modules for fleets, with their files."""

import torch
from safetensors.torch import save_file
from torch import nn


class Net(nn.Module):
    """A convolution, a few large matrices, a shortcut; `broken` inputs raise in the middle."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 10)
        self.width = width

    def forward(self, x: torch.Tensor, *, broken: bool = False) -> torch.Tensor:
        x = self.conv(x).flatten(1)[:, : self.width]
        for number, layer in enumerate(self.layers):
            if broken and number == 1:
                raise ValueError("broken input")
            x = x + torch.tanh(layer(x))
        return self.head(x)


SHAPES = {"small": (512, 4), "large": (1024, 5), "other": (768, 3)}
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)


def save_nets(directory, names=SHAPES):
    """Resident modules and their files."""
    made = {}
    for name in names:
        torch.manual_seed(len(name))
        net = Net(*SHAPES[name]).eval()
        path = directory / f"{name}.safetensors"
        save_file(net.state_dict(), path)
        made[name] = (net, path)
    return made


def skeleton(name):
    with torch.device("meta"):
        return Net(*SHAPES[name])
