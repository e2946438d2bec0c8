"""Seeded weights for the models of `cnns.py`, written as safetensors one tensor at a time.

    python examples/vision/weights.py models/vision              # every model, 1.3 GB
    python examples/vision/weights.py models/vision yolov3 vgg19

The same seed gives the same files. Values are drawn so that activations neither vanish nor grow: what a model finds in
a picture means nothing, what it costs does.
"""

import argparse
import json
import math
import zlib
from pathlib import Path

import torch
from cnns import MODELS
from torch import nn

__all__ = ["write_weights"]

CACHE_LINE_BYTES = 64
"""Tensors begin at multiples of it, but for small odd ones at the end: a reader then need not move them."""
_DTYPES = {torch.float32: "F32", torch.int64: "I64"}


def write_weights(module: nn.Module, path: Path, *, seed: int = 0) -> None:
    """Write values for every parameter and buffer of `module`, which may be on the meta device. Atomic.

    Holds one tensor at a time. Each is drawn from a generator of its own, seeded with `seed` and its name.
    """
    tensors = dict(sorted(module.state_dict().items(), key=lambda item: _odd_bytes(item[1])))
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % CACHE_LINE_BYTES)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            file.write(_values(name, tensor, seed).numpy().tobytes())
    part.replace(path)


def _odd_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size() % CACHE_LINE_BYTES


def _values(name: str, tensor: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if tensor.ndim > 1:
        deviation = math.sqrt(2 / tensor[0].numel()) * (0.1 if name.startswith("heads.") and ".1." in name else 1)
        return torch.empty(tensor.shape).normal_(0, deviation, generator=generator)
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    last = ".bn3.weight" in name or ".wide.1.weight" in name  # before a shortcut is added: sums must not grow
    middle = 0.0 if name.endswith(("bias", "running_mean")) else 0.2 if last else 0.8
    return middle + 0.1 * torch.rand(tensor.shape, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("models", nargs="*", metavar="model", help=f"of {', '.join(MODELS)}; else all of them")
    options = parser.parse_args()
    if unknown := set(options.models) - MODELS.keys():
        parser.error(f"unknown model {', '.join(sorted(unknown))}; choose from {', '.join(MODELS)}")
    for name in options.models or MODELS:
        path = options.directory / f"{name}.safetensors"
        with torch.device("meta"):
            module = MODELS[name].build()
        write_weights(module, path)
        print(f"{path}  {path.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
