"""Four CNNs look at a picture, each streamed inside a budget; boxes and mask are drawn to PNG.

    python examples/vision/see.py --budget 500MiB --out seen road junction my.jpg

Weights are made under models/vision where they are missing (seeded: what is found means nothing). `--check` runs each
model resident too, and ends with 1 if an output differs by a bit.
"""

import argparse
import sys
from pathlib import Path

import torch
from cnns import MODELS
from pictures import SCENES, draw_boxes, draw_mask, read_picture, tensor_of
from safetensors.torch import load_file
from weights import write_weights

import hermes
from hermes.units import format_bytes, format_seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", default=SCENES, help=f"image files, or {', '.join(SCENES)}")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet101", "vgg19", "fcn-resnet50", "yolov3"])
    parser.add_argument("--budget", default="500MiB")
    parser.add_argument("--weights", type=Path, default=Path("models/vision"))
    parser.add_argument("--out", type=Path, default=Path("seen"))
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = {Path(path).stem: read_picture(path) for path in options.pictures}
    outputs = {name: look(name, pictures, options) for name in options.models}
    # Afterwards: what the resident models leave behind would count against the budgets.
    same = [check(name, pictures, outputs[name], options) for name in options.models if options.check]
    return 0 if all(same) else 1


def look(name: str, pictures: dict, options: argparse.Namespace) -> dict:
    """The model's outputs, streamed; drawn or printed too."""
    entry, weights = MODELS[name], options.weights / f"{name}.safetensors"
    with torch.device("meta"):
        module = entry.build()
    if not weights.exists():
        write_weights(module, weights)
    inputs = {stem: tensor_of(picture, entry.side) for stem, picture in pictures.items()}
    outputs = {}
    # A matrix above 32 MiB is computed by ranges of rows: VGG-19's largest has 392 MiB.
    with (
        torch.no_grad(),
        hermes.stream(
            module, weights, options.budget, example_args=(next(iter(inputs.values())),), matrix_bytes="32MiB"
        ) as net,
    ):
        for stem, pixels in inputs.items():
            outputs[stem] = net(pixels)
            _show(name, outputs[stem], pictures[stem], entry.side, options.out / f"{stem}-{name}.png")
        stats = net.hermes.stats
        print(
            f"{name}: {format_seconds(sum(stats.pass_seconds) / stats.passes)} a picture, "
            f"{format_bytes(stats.bytes_read / stats.passes)} read for each"
        )
    return outputs


def check(name: str, pictures: dict, outputs: dict, options: argparse.Namespace) -> bool:
    """Whether the resident model says the same, bit for bit."""
    entry = MODELS[name]
    resident = entry.build()
    resident.load_state_dict(load_file(options.weights / f"{name}.safetensors"))
    with torch.no_grad():
        same = all(
            _equal(resident(tensor_of(picture, entry.side)), outputs[stem]) for stem, picture in pictures.items()
        )
    print(f"{name}: {'the same, bit for bit, as resident' if same else 'DIFFERS from the resident model'}")
    return same


def _equal(one: torch.Tensor | dict, other: torch.Tensor | dict) -> bool:
    if isinstance(one, dict):
        return all(torch.equal(one[key], other[key]) for key in one)
    return torch.equal(one, other)


def _show(name: str, output: torch.Tensor | dict, picture: object, side: int, path: Path) -> None:
    if name == "yolov3":
        draw_boxes(picture, output, side).save(path)
    elif name.startswith("fcn"):
        draw_mask(picture, output["out"]).save(path)
    else:
        print(f"{path.stem}: class {int(output.argmax())}")


if __name__ == "__main__":
    sys.exit(main())
