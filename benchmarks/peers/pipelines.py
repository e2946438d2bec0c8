"""Ports of the paper's comparators, over transformers' own modules: PipeSwitch, and PIPELOAD as published.

    python pipelines.py MODEL pipeswitch|pipeload torch|safetensors AGENTS [--split]

*PipeSwitch*: one loader takes the layers in order while earlier ones compute; nothing is freed, so later passes are
resident. *PIPELOAD*: AGENTS loaders each take the next layer whole; at most AGENTS layers are loaded and not yet
destroyed, each is destroyed after its computation, and every pass loads all of them anew. Embeddings and head are
loaded first and stay, as in the paper.

*torch*: each layer in a file of its own, read by `torch.load`; `--split` writes those files (not timed) and ends.
*safetensors*: the checkpoint as it is, through the page cache.
"""

import sys
import threading
import time
from pathlib import Path

import safetensors
import torch
import transformers  # noqa: F401 - before the clock, as for every peer that is made of it
from torch import nn
from work import Work, clock_passes, memory_bytes, report

from hermes.checkpoint import open_checkpoint
from hermes.model.mapping import map_weights
from hermes.model.skeleton import build_skeleton, finish_skeleton

Tensors = dict[str, torch.Tensor]


def build(work: Work) -> tuple[nn.Module, dict[str, str]]:
    """The module, tensors of the checkpoint on the meta device and buffers made; stored names by the module's.

    The names are found as transformers finds them; a parameter that is made of several stored ones is not provided for.
    """
    module = build_skeleton(work.model, auto_class=work.auto_class, dtype=None)
    checkpoint = open_checkpoint(work.model)
    found = map_weights(module, checkpoint)
    finish_skeleton(module, found)
    stored = {entry.extent: name for name, entry in checkpoint.tensors.items()}
    return module, {name: stored[source.extents[0]] for name, source in found.sources.items()}


def layer_names(module: nn.Module) -> list[str]:
    """Of the longest ModuleList: the encoder or decoder layers."""
    lists = {name: child for name, child in module.named_modules() if isinstance(child, nn.ModuleList)}
    name = max(lists, key=lambda name: len(lists[name]))
    return [f"{name}.{number}" for number in range(len(lists[name]))]


class Source:
    """The tensors of each layer, and of the rest, as files hold them."""

    def __init__(self, model: Path, layers: list[str], names: dict[str, str]) -> None:
        handles = [safetensors.safe_open(file, framework="pt") for file in sorted(model.glob("*.safetensors"))]
        self.where = {name: handle for handle in handles for name in handle.keys()}
        self.groups: dict[str, dict[str, str]] = {layer: {} for layer in [*layers, "rest"]}
        for name, stored in names.items():
            layer = next((layer for layer in layers if name.startswith(f"{layer}.")), "rest")
            self.groups[layer][name] = stored

    def read(self, layer: str) -> Tensors:
        """In memory of its own, as loading into a model leaves it."""
        return {name: self.where[stored].get_tensor(stored).clone() for name, stored in self.groups[layer].items()}


class SplitSource:
    """The same from a file for each layer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, layer: str) -> Tensors:
        """`torch.load`, as PipeSwitch and Hermes do."""
        return torch.load(self.directory / f"{layer}.pt", weights_only=True)


def put(module: nn.Module, tensors: Tensors) -> None:
    """Assign by name; what is tied follows its twin."""
    by_id: dict[int, torch.Tensor] = {}
    for name, tensor in tensors.items():
        owner = module.get_submodule(name.rpartition(".")[0])
        by_id[id(getattr(owner, name.rpartition(".")[2]))] = nn.Parameter(tensor, requires_grad=False)
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for leaf, old in table.items():
                if id(old) in by_id:
                    table[leaf] = by_id[id(old)]


class Pipeline:
    """Loaders and the forward hooks that wait for them.

    Args:
        depth: layers that may be loaded and not destroyed; None frees nothing and loads once.
    """

    def __init__(self, module: nn.Module, layers: list[str], source: Source | SplitSource, depth: int | None) -> None:
        self.layers = layers
        self.source = source
        self.depth = depth
        self.ready: dict[int, Tensors] = {}
        self.next = self.computed = 0
        self.state = threading.Condition()
        self.modules = [module.get_submodule(layer) for layer in layers]
        self.tables = [
            [
                (table, leaf, old)
                for child in m.modules()
                for table in (child._parameters,)
                for leaf, old in table.items()
            ]
            for m in self.modules
        ]
        for number, child in enumerate(self.modules):
            child.register_forward_pre_hook(lambda *_, number=number: self.wait(number))
            child.register_forward_hook(lambda *_, number=number: self.destroy(number))
        for _ in range(depth or 1):
            threading.Thread(target=self.load, daemon=True).start()

    def load(self) -> None:
        """A Loading Agent: takes the next layer, round after round; only one round if nothing is freed."""
        while True:
            with self.state:
                while self.depth is not None and self.next - self.computed >= self.depth:
                    self.state.wait()
                number = self.next
                if self.depth is None and number >= len(self.layers):
                    return
                self.next += 1
            tensors = self.source.read(self.layers[number % len(self.layers)])
            with self.state:
                self.ready[number] = tensors
                self.state.notify_all()

    def wait(self, layer: int) -> None:
        with self.state:
            if self.depth is None and self.computed >= len(self.layers):
                return
            while self.computed not in self.ready:
                self.state.wait()
            tensors = self.ready.pop(self.computed)
        prefix = self.layers[layer] + "."
        put(self.modules[layer], {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})

    def destroy(self, layer: int) -> None:
        if self.depth is not None:
            for table, leaf, old in self.tables[layer]:
                table[leaf] = old
        with self.state:
            self.computed += 1
            self.state.notify_all()


def main() -> None:
    model, kind, form, agents = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    work = Work(model)
    split = model.with_name(f"{model.name}.layers")
    torch.set_grad_enabled(False)
    start = time.perf_counter()
    module, names = build(work)
    layers = layer_names(module)
    whole = Source(model, layers, names)
    if "--split" in sys.argv:
        split.mkdir(exist_ok=True)
        for layer in [*layers, "rest"]:
            torch.save(whole.read(layer), split / f"{layer}.pt")
        return
    work.floor_bytes = memory_bytes("VmRSS")  # with the module built and everything imported
    source = whole if form == "safetensors" else SplitSource(split)
    put(module, source.read("rest"))
    pass_seconds = clock_passes(module)
    Pipeline(module, layers, source, agents if kind == "pipeload" else None)
    load_seconds = time.perf_counter() - start
    outputs = work.perform(module)
    report(work, load_seconds=load_seconds, pass_seconds=pass_seconds, outputs=outputs)


main()
