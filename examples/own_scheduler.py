"""A scheduler of your own, over Hermes's blocks: the model whose next block is smallest goes first.

python examples/own_scheduler.py models/vision/yolov3.safetensors models/vision/resnet101.safetensors
"""

import sys
from pathlib import Path

import torch

import hermes
from hermes.memory.probe import resident_bytes

sys.path.insert(0, str(Path(__file__).parent / "vision"))
from cnns import MODELS
from pictures import paint, tensor_of


def run(models: dict) -> dict:
    """Block by block, one model's next block loading while another's runs: the output of each."""
    outputs = {}
    for blocks, pixels in models.values():
        blocks.begin(pixels)
        blocks.load_block(blocks.next_block)  # returns at once
    while len(outputs) < len(models):
        waiting = {name: blocks for name, (blocks, _) in models.items() if name not in outputs}
        name = min(waiting, key=lambda name: waiting[name].block_bytes[waiting[name].next_block])
        blocks, block = waiting[name], waiting[name].next_block
        if block + 1 < len(blocks.names):
            blocks.load_block(block + 1)  # False where the window has no room yet: it is read when it runs
        blocks.run_block(block)  # waits until it is loaded
        blocks.unload_block(block)
        if blocks.next_block is None:
            outputs[name] = blocks.result()
    return outputs


def main() -> None:
    models = {}
    budget = resident_bytes() + 300 * 2**20 + 150 * 2**20 * len(sys.argv[1:])  # activations; and windows
    for path in sys.argv[1:]:
        entry = MODELS[Path(path).stem]
        pixels = tensor_of(paint("road"), entry.side)
        with torch.device("meta"):
            module = entry.build()
        blocks = hermes.Blocks(
            module, path, budget, example_args=(pixels,), window="150MiB", granularity="leaf", matrix_bytes="16MiB"
        )
        models[path] = (blocks, pixels)
    for name, output in run(models).items():
        print(name, tuple(output.shape), f"sum {float(output.double().sum()):.6g}")
    for blocks, _ in models.values():
        blocks.close()


if __name__ == "__main__":
    main()
