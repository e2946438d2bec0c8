"""What is on disk: which files make up a model, where each tensor's bytes lie, and how those bytes are read in place.

`hub` finds the files, `open` reads their headers (`safetensors`, `torch_zip`) into the `index`, and `readers` brings
bytes into memory that somebody else owns. Knows bytes and names, never tensors or modules: no torch here.
"""

from hermes.checkpoint.hub import resolve_model
from hermes.checkpoint.index import DTYPE_BYTES, Checkpoint, Extent, FileStamp, TensorEntry
from hermes.checkpoint.open import open_checkpoint
from hermes.checkpoint.readers import Reader, open_reader

__all__ = [
    "DTYPE_BYTES",
    "Checkpoint",
    "Extent",
    "FileStamp",
    "Reader",
    "TensorEntry",
    "open_checkpoint",
    "open_reader",
    "resolve_model",
]
