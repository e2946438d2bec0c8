"""All weights in memory, of checkpoints that plain transformers does not read: packed ones, and quantised ones."""

import functools
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hermes.checkpoint import Checkpoint, Extent, open_reader
from hermes.checkpoint.unpack import read_unpacked
from hermes.model.blocks import torch_dtype
from hermes.model.mapping import Source, is_plain_linear, map_weights
from hermes.model.quantized import QuantizedMatrix
from hermes.model.skeleton import build_skeleton, finish_skeleton
from hermes.model.stray import Stray

__all__ = ["load_packed", "load_quantized", "state_dict"]


def load_packed(
    auto_class: Any, directory: Path, checkpoint: Checkpoint, *, dtype: torch.dtype | None, trust_remote_code: bool
) -> Any:
    """What `auto_class.from_pretrained` would make of the unpacked directory. Raises ReadError, and what it does."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        str(directory), trust_remote_code=trust_remote_code, local_files_only=True
    )
    # The automatic classes want a directory to read weights from; the class that they choose takes them as they are.
    chosen = type(build_skeleton(directory, auto_class=auto_class, dtype=dtype, trust_remote_code=trust_remote_code))
    model: Any = chosen.from_pretrained(
        None,
        config=config,
        state_dict=state_dict(checkpoint),
        dtype=dtype or "auto",
    )
    if model.can_generate() and (directory / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    return model


def load_quantized(
    auto_class: Any, directory: Path, checkpoint: Checkpoint, *, dtype: torch.dtype | None, trust_remote_code: bool
) -> Any:
    """The model with its quantised matrices as they are stored. Raises ModelError, CheckpointError, ReadError."""
    model = build_skeleton(directory, auto_class=auto_class, dtype=dtype, trust_remote_code=trust_remote_code)
    weights = map_weights(model, checkpoint)
    finish_skeleton(model, weights, is_built=True)
    memory = [torch.frombuffer(file, dtype=torch.uint8) for file in _files(checkpoint)]

    def parts(source: Source) -> list[torch.Tensor]:
        return [_bytes_of(memory, extent) for extent in source.extents]

    homes: dict[int, torch.Tensor] = {}
    matrices: dict[int, QuantizedMatrix] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, source in weights.sources.items():
        place = tensors[name]
        if source.quantized:
            matrix = matrices[id(place)] = QuantizedMatrix(source.quantized, *parts(source))
            homes[id(place)] = Stray(place, functools.partial(_floats, matrix, place.dtype), torch.device("cpu"))
        else:
            made = _made(source, parts(source), place)
            homes[id(place)] = nn.Parameter(made, place.requires_grad) if isinstance(place, nn.Parameter) else made
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or id(tensor) not in homes:
                    continue
                table[name] = homes[id(tensor)]
                if name == "weight" and id(tensor) in matrices and is_plain_linear(module):
                    module.__dict__["forward"] = functools.partial(_linear, module, matrices[id(tensor)])
    return model


def _linear(module: nn.Linear, matrix: QuantizedMatrix, input: torch.Tensor) -> torch.Tensor:
    return matrix.linear(input, module.bias)


def _floats(matrix: QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor:
    return matrix.floats().to(dtype)


def _made(source: Source, parts: Sequence[torch.Tensor], place: torch.Tensor) -> torch.Tensor:
    """A parameter of its stored parts."""
    dtype = torch_dtype(source.dtype)
    if source.convert is not None and source.shapes is not None:
        whole = [part.view(dtype).view(shape) for part, shape in zip(parts, source.shapes, strict=True)]
        return source.convert(whole).to(place.dtype).contiguous()
    flat = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return flat.view(dtype).view(place.shape).to(place.dtype)


def _bytes_of(memory: Sequence[torch.Tensor], extent: Extent) -> torch.Tensor:
    return memory[extent.file][extent.offset : extent.offset + extent.nbytes]


def state_dict(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor by its name, lying in memory as in the mapped file that was packed: kernels may round by address."""
    tensors = {}
    files = _files(checkpoint)
    for entry in checkpoint.tensors.values():
        dtype = torch_dtype(entry.dtype)
        if entry.numel:
            memory = files[entry.extent.file]
            flat = torch.frombuffer(memory, dtype=dtype, count=entry.numel, offset=entry.extent.offset)
            tensors[entry.name] = flat.view(entry.shape)
        else:
            tensors[entry.name] = torch.empty(entry.shape, dtype=dtype)
    return tensors


def _files(checkpoint: Checkpoint) -> list[memoryview]:
    """The tensors of each file at their places in it, unpacked."""
    files = []
    with open_reader(checkpoint) as reader:
        for file in range(len(checkpoint.files)):
            extents = [entry.extent for entry in checkpoint.tensors.values() if entry.extent.file == file]
            end = max((extent.offset + extent.nbytes for extent in extents), default=0)
            memory = memoryview(mmap.mmap(-1, max(end, 1)))
            for extent in extents:
                position = extent.offset
                for part in read_unpacked(reader, checkpoint, extent):
                    memory[position : position + len(part)] = part
                    position += len(part)
            files.append(memory)
    return files
