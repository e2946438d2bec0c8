"""Four CNNs as plain modules: ResNet, VGG-19, FCN and YOLOv3. Nothing here knows of Hermes.

`width` thins every layer by that factor, for tests; 1 is the published model. Weights: `weights.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

__all__ = ["FCN", "MODELS", "VGG19", "Entry", "ResNet", "YOLOv3"]

ANCHORS = (
    ((116, 90), (156, 198), (373, 326)),
    ((30, 61), (62, 45), (59, 119)),
    ((10, 13), (16, 30), (33, 23)),
)
"""Widths and heights of the boxes that YOLOv3 scales, in pixels; for strides 32, 16 and 8."""


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1, and around them a shortcut."""

    def __init__(self, inputs: int, middle: int, stride: int, dilation: int) -> None:
        super().__init__()
        outputs = 4 * middle
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride > 1 or inputs != outputs
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class Backbone(nn.Module):
    """ResNet without its head. `dilated` keeps the last two stages at stride 8, as segmentation wants them."""

    def __init__(self, layers: Sequence[int], width: float, *, dilated: bool = False) -> None:
        super().__init__()
        channels = [max(8, int(n * width)) for n in (64, 64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, channels[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        inputs, dilation = channels[0], 1
        for number, (middle, count) in enumerate(zip(channels[1:], layers, strict=True), 1):
            first, stride = dilation, 1 if number == 1 else 2
            if dilated and number > 2:
                dilation, stride = dilation * 2, 1
            blocks = [Bottleneck(inputs, middle, stride, first)]
            inputs = 4 * middle
            blocks += [Bottleneck(inputs, middle, 1, dilation) for _ in range(count - 1)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.channels = (inputs // 2, inputs)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer3(self.layer2(self.layer1(x)))
        return x, self.layer4(x)


class ResNet(nn.Module):
    """Classifies images (batch, 3, height, width): scores (batch, 1000). 101 layers, 170 MiB (He et al. 2016)."""

    def __init__(self, layers: Sequence[int] = (3, 4, 23, 3), width: float = 1) -> None:
        super().__init__()
        self.backbone = Backbone(layers, width)
        self.fc = nn.Linear(self.backbone.channels[1], 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.backbone(x)[1].mean((2, 3)))


class VGG19(nn.Module):
    """Classifies images (batch, 3, 224, 224): scores (batch, 1000). 548 MiB, 392 of them in one layer (2015)."""

    def __init__(self, width: float = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for n, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            outputs = max(8, int(n * width))
            for _ in range(count):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden = int(4096 * width)
        self.classifier = nn.Sequential(
            nn.Linear(inputs * 49, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1000)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(functional.adaptive_avg_pool2d(self.features(x), 7).flatten(1))


class FCN(nn.Module):
    """Segments images (batch, 3, height, width): scores (batch, 21, height, width), and the auxiliary head's.

    135 MiB on ResNet-50, 207 MiB on ResNet-101 (Long et al. 2015; in the form that torchvision publishes).
    """

    def __init__(self, layers: Sequence[int] = (3, 4, 6, 3), width: float = 1) -> None:
        super().__init__()
        self.backbone = Backbone(layers, width, dilated=True)
        self.aux_classifier, self.classifier = (self._head(channels) for channels in self.backbone.channels)

    @staticmethod
    def _head(inputs: int) -> nn.Sequential:
        middle = inputs // 4
        return nn.Sequential(
            nn.Conv2d(inputs, middle, 3, padding=1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(),
            nn.Conv2d(middle, 21, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        middle, last = self.backbone(x)
        size = x.shape[-2:]
        scores = {"out": self.classifier(last), "aux": self.aux_classifier(middle)}
        return {
            name: functional.interpolate(y, size, mode="bilinear", align_corners=False) for name, y in scores.items()
        }


class ConvUnit(nn.Sequential):
    """Convolution, batch norm, leaky ReLU: what YOLOv3 is made of."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1)
        )


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.narrow = ConvUnit(channels, channels // 2, 1)
        self.wide = ConvUnit(channels // 2, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.wide(self.narrow(x))


class YOLOv3(nn.Module):
    """Detects objects in images (batch, 3, side, side), side a multiple of 32. 236 MiB (Redmon and Farhadi 2018).

    Output (batch, boxes, 85): centre x, centre y, width, height in pixels, objectness, and 80 classes' probabilities.
    """

    def __init__(self, width: float = 1) -> None:
        super().__init__()
        channels = [max(8, int(n * width)) for n in (32, 64, 128, 256, 512, 1024)]
        self.stem = ConvUnit(3, channels[0], 3)
        self.stages = nn.ModuleList(
            nn.Sequential(ConvUnit(before, after, 3, 2), *(Residual(after) for _ in range(count)))
            for before, after, count in zip(channels, channels[1:], (1, 2, 8, 8, 4), strict=False)
        )
        self.necks, self.reduces, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        carried = 0
        for wide in channels[:2:-1]:
            half = wide // 2
            if carried:
                self.reduces.append(ConvUnit(carried, half, 1))
            inputs = wide + (half if carried else 0)
            self.necks.append(
                nn.Sequential(
                    ConvUnit(inputs, half, 1), ConvUnit(half, wide, 3), ConvUnit(wide, half, 1),
                    ConvUnit(half, wide, 3), ConvUnit(wide, half, 1),
                )
            )  # fmt: skip
            self.heads.append(nn.Sequential(ConvUnit(half, wide, 3), nn.Conv2d(wide, 255, 1)))
            carried = half

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = x.shape[-1]
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        found = []
        for scale, anchors in enumerate(ANCHORS):
            if scale:
                x = functional.interpolate(self.reduces[scale - 1](x), scale_factor=2.0)
                x = torch.cat([x, maps[-1 - scale]], 1)
            x = self.necks[scale](x)
            found.append(_boxes(self.heads[scale](x), anchors, side))
        return torch.cat(found, 1)


def _boxes(raw: torch.Tensor, anchors: Sequence[tuple[int, int]], side: int) -> torch.Tensor:
    """Raw scores (batch, 3 x 85, n, n) of a map of n x n cells as boxes (batch, 3 n n, 85)."""
    n = raw.shape[-1]
    y = raw.view(raw.shape[0], 3, 85, n, n).permute(0, 1, 3, 4, 2)
    steps = torch.arange(n, dtype=raw.dtype)
    cells = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)
    centres = (torch.sigmoid(y[..., :2]) + cells) * (side / n)
    sizes = torch.exp(y[..., 2:4]) * torch.tensor(anchors, dtype=raw.dtype).view(3, 1, 1, 2)
    return torch.cat([centres, sizes, torch.sigmoid(y[..., 4:])], -1).flatten(1, 3)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A published model: its class, the arguments, and the side of the square pictures it is given here."""

    cls: type[nn.Module]
    layers: tuple[int, ...] = ()
    side: int = 224

    def build(self, width: float = 1) -> nn.Module:
        """The module, in evaluation mode, on the default device."""
        return (self.cls(self.layers, width) if self.layers else self.cls(width)).eval()


MODELS = {
    "resnet101": Entry(cls=ResNet, layers=(3, 4, 23, 3)),
    "vgg19": Entry(cls=VGG19),
    "fcn-resnet50": Entry(cls=FCN, layers=(3, 4, 6, 3)),
    "fcn-resnet101": Entry(cls=FCN, layers=(3, 4, 23, 3)),
    "yolov3": Entry(cls=YOLOv3, side=320),
}
