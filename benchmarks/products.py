"""Linear layers by Hermes's own kernels beside torch's, in turns: the same operands, and the same bits.

    python benchmarks/products.py [--rounds N]

Prints a Markdown table. Matrices take turns, more of them than caches hold, and lie where Hermes keeps them, in huge
pages. One token is bound by memory (GB of weights a second), several by arithmetic (GFLOPS).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from hermes.memory.arena import Arena
from hermes.model.product import linear, turned

SHAPES = ((1024, 1024), (4096, 1024), (1024, 4096), (50257, 1024))
"""Rows and columns: of BERT-large's, ViT-large's and GPT-2-medium's layers, and of GPT-2's vocabulary."""
TOKENS = (1, 8, 16, 64, 128, 197, 512)
ARENA_BYTES = 512 * 2**20

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def added(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What transformers' Conv1D computes."""
    return torch.addmm(bias, x, weight)


def seconds(product: Product, x: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor) -> float:
    """Of a product, on average over all matrices."""
    start = time.perf_counter()
    for matrix in matrices:
        product(x, matrix, bias)
    return (time.perf_counter() - start) / len(matrices)


def row(memory: torch.Tensor, tokens: int, shape: tuple[int, int], rounds: int, *, is_turned: bool = False) -> str:
    """Of the table."""
    count = min(12, memory.numel() // (shape[0] * shape[1]))
    matrices = memory[: count * shape[0] * shape[1]].view(count, *shape)
    x, bias = torch.randn(tokens, shape[0 if is_turned else 1]), torch.randn(shape[1 if is_turned else 0])
    ours, theirs = (turned, added) if is_turned else (linear, functional.linear)
    same = torch.equal(ours(x, matrices[0], bias).view(torch.int32), theirs(x, matrices[0], bias).view(torch.int32))
    pairs = [tuple(seconds(product, x, matrices, bias) for product in (theirs, ours)) for _ in range(rounds)]
    size, unit = (matrices[0].nbytes, "GB/s") if tokens == 1 else (2 * tokens * matrices[0].numel(), "GFLOPS")
    rates = [f"{size / statistics.median(column) / 1e9:.0f} {unit}" for column in zip(*pairs, strict=True)]
    ratio = statistics.median(torch_seconds / own_seconds for torch_seconds, own_seconds in pairs)
    what = f"{shape[0]} x {shape[1]}" + (", turned" if is_turned else "")
    return f"| {tokens} | {what} | {rates[0]} | {rates[1]} | {ratio:.2f}x | {'yes' if same else 'no'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_grad_enabled(False)
    arena = Arena(ARENA_BYTES)
    memory = torch.frombuffer(arena.view, dtype=torch.float32)
    memory.uniform_(-1, 1)
    print("| tokens | matrix, float32 | torch | Hermes | faster by | same bits |\n|---|---|---|---|---|---|")
    for shape in SHAPES[:3]:
        print(row(memory, 1, (shape[1], shape[0]), rounds, is_turned=True), flush=True)
    for tokens in TOKENS:
        for shape in SHAPES:
            print(row(memory, tokens, shape, rounds), flush=True)


if __name__ == "__main__":
    main()
