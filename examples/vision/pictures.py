"""Pictures in and out: three generated scenes, models' inputs from image files, boxes and masks drawn to PNG."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

__all__ = ["SCENES", "draw_boxes", "draw_mask", "paint", "read_picture", "tensor_of"]

SCENES = ("road", "junction", "field")
MEANS, DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_CLASSES = 21


def paint(scene: str, side: int = 448) -> Image.Image:
    """A scene as a car, a road-side unit or a drone sees it; the same at every call. Raises KeyError."""
    shapes = {
        "road": [
            ("polygon", [(0.42, 0.5), (0.58, 0.5), (1, 1), (0, 1)], "#555559"),
            ("polygon", [(0.495, 0.5), (0.505, 0.5), (0.53, 1), (0.47, 1)], "#e8e4d0"),
            ("rectangle", [(0.6, 0.56), (0.74, 0.66)], "#a02020"),
            ("rectangle", [(0.63, 0.51), (0.71, 0.56)], "#c8d8e8"),
            ("ellipse", [(0.61, 0.64), (0.645, 0.69)], "#101010"),
            ("ellipse", [(0.695, 0.64), (0.73, 0.69)], "#101010"),
            ("rectangle", [(0.16, 0.36), (0.18, 0.62)], "#5a4030"),
            ("ellipse", [(0.08, 0.18), (0.26, 0.42)], "#2c6b30"),
        ],
        "junction": [
            ("rectangle", [(0, 0.62), (1, 0.9)], "#606064"),
            ("rectangle", [(0.4, 0.45), (0.62, 1)], "#606064"),
            ("rectangle", [(0.05, 0.15), (0.3, 0.55)], "#b09070"),
            ("rectangle", [(0.1, 0.2), (0.16, 0.28)], "#405060"),
            ("rectangle", [(0.2, 0.2), (0.26, 0.28)], "#405060"),
            ("rectangle", [(0.7, 0.66), (0.95, 0.82)], "#e0b020"),
            ("rectangle", [(0.33, 0.3), (0.37, 0.45)], "#202020"),
            ("ellipse", [(0.335, 0.31), (0.365, 0.34)], "#d02020"),
            ("ellipse", [(0.46, 0.5), (0.5, 0.54)], "#e0b090"),
            ("rectangle", [(0.46, 0.54), (0.5, 0.64)], "#2040a0"),
        ],
        "field": [
            ("rectangle", [(0, 0), (0.5, 1)], "#7a9a3c"),
            ("rectangle", [(0.5, 0), (1, 1)], "#c8b458"),
            ("polygon", [(0, 0.3), (1, 0.55), (1, 0.62), (0, 0.37)], "#8a7a60"),
            ("rectangle", [(0.62, 0.12), (0.82, 0.3)], "#8c3a2c"),
            ("polygon", [(0.62, 0.12), (0.82, 0.12), (0.82, 0.21), (0.62, 0.21)], "#a85040"),
            ("ellipse", [(0.12, 0.62), (0.22, 0.72)], "#2c5a2c"),
            ("ellipse", [(0.28, 0.72), (0.4, 0.84)], "#245024"),
        ],
    }[scene]
    picture = Image.new("RGB", (side, side))
    for y in range(side):
        shade = tuple(int(a + (b - a) * y / side) for a, b in zip((120, 170, 225), (190, 205, 180), strict=True))
        picture.paste(shade, (0, y, side, y + 1))
    draw = ImageDraw.Draw(picture)
    for kind, points, colour in shapes:
        getattr(draw, kind)([(x * side, y * side) for x, y in points], fill=colour)
    return picture


def read_picture(path: str | Path) -> Image.Image:
    """An image file, in RGB; the name of a scene stands for that scene. Raises OSError, or what Pillow raises."""
    return paint(str(path)) if str(path) in SCENES else Image.open(path).convert("RGB")


def tensor_of(picture: Image.Image, side: int) -> torch.Tensor:
    """The picture as a model's input: (1, 3, side, side), each channel normalised as for ImageNet."""
    scaled = picture.resize((side, side), Image.Resampling.BILINEAR)
    pixels = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8).view(side, side, 3)
    values = pixels.permute(2, 0, 1).to(torch.float32) / 255
    return ((values - torch.tensor(MEANS).view(3, 1, 1)) / torch.tensor(DEVIATIONS).view(3, 1, 1)).unsqueeze(0)


def draw_boxes(picture: Image.Image, found: torch.Tensor, side: int, *, count: int = 5) -> Image.Image:
    """The picture with the best boxes of YOLOv3's output (1, boxes, 85), `side` being that of its input."""
    boxes = found[0]
    scores = boxes[:, 4] * boxes[:, 5:].amax(1)
    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    across, down = picture.width / side, picture.height / side
    for index in _apart(boxes, scores, count):
        x, y, width, height = boxes[index, :4].tolist()
        kind = int(boxes[index, 5:].argmax())
        corners = [(x - width / 2) * across, (y - height / 2) * down, (x + width / 2) * across, (y + height / 2) * down]
        draw.rectangle(corners, outline=_colour(kind, 80), width=3)
        draw.text((max(0, corners[0]) + 4, max(0, corners[1]) + 2), f"class {kind}, {float(scores[index]):.2f}")
    return drawn


def draw_mask(picture: Image.Image, scores: torch.Tensor) -> Image.Image:
    """The picture under the likeliest class of each pixel, from FCN's scores (1, 21, height, width)."""
    classes = scores[0].argmax(0).to(torch.uint8)
    mask = Image.frombytes("P", (classes.shape[1], classes.shape[0]), classes.numpy().tobytes())
    mask.putpalette([part for kind in range(NUM_CLASSES) for part in _colour(kind, NUM_CLASSES)])
    return Image.blend(picture, mask.convert("RGB").resize(picture.size), 0.5)


def _apart(boxes: torch.Tensor, scores: torch.Tensor, count: int) -> Sequence[int]:
    """The best boxes that do not cover each other's centre."""
    chosen: list[int] = []
    for index in scores.argsort(descending=True)[:200].tolist():
        x, y = boxes[index, 0], boxes[index, 1]
        others = (boxes[other] for other in chosen)
        if all(abs(x - o[0]) > o[2] / 2 or abs(y - o[1]) > o[3] / 2 for o in others):
            chosen.append(index)
        if len(chosen) == count:
            break
    return chosen


def _colour(kind: int, kinds: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(kind / kinds, 0.8, 0.95)
    return int(255 * red), int(255 * green), int(255 * blue)
