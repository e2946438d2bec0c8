"""What `fleet.toml` names: functions that make a module."""

import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from cnns import MODELS


def yolov3() -> nn.Module:
    return MODELS["yolov3"].build()


def fcn() -> nn.Module:
    return MODELS["fcn-resnet101"].build()


def vgg19() -> nn.Module:
    return MODELS["vgg19"].build()


def resnet101() -> nn.Module:
    return MODELS["resnet101"].build()
