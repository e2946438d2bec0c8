"""All weights of a packed checkpoint in memory, unpacked: for plain transformers, which does not read packed files."""

import mmap
from pathlib import Path
from typing import Any

import torch

from hermes.checkpoint import Checkpoint, open_reader
from hermes.checkpoint.unpack import read_unpacked
from hermes.model.blocks import torch_dtype
from hermes.model.skeleton import build_skeleton

__all__ = ["load_packed", "state_dict"]


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


def state_dict(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor by its name, lying in memory as in the mapped file that was packed: kernels may round by address."""
    tensors = {}
    with open_reader(checkpoint) as reader:
        for file in range(len(checkpoint.files)):
            entries = [entry for entry in checkpoint.tensors.values() if entry.extent.file == file]
            end = max((entry.extent.offset + entry.extent.nbytes for entry in entries), default=0)
            memory = memoryview(mmap.mmap(-1, max(end, 1)))
            for entry in entries:
                position = entry.extent.offset
                for part in read_unpacked(reader, checkpoint, entry.extent):
                    memory[position : position + len(part)] = part
                    position += len(part)
                dtype = torch_dtype(entry.dtype)
                if entry.numel:
                    flat = torch.frombuffer(memory, dtype=dtype, count=entry.numel, offset=entry.extent.offset)
                    tensors[entry.name] = flat.view(entry.shape)
                else:
                    tensors[entry.name] = torch.empty(entry.shape, dtype=dtype)
    return tensors
