"""Where each parameter of a skeleton gets its bytes: names, renames and merges, down to runs of bytes in files.

transformers renames and rearranges checkpoint tensors while it loads them. Its own rules are asked, key by key in its
own order, and its own operations are run on tensors that know only where their elements lie (`Runs`): what comes out
as a short list of runs is read straight into place, the rest is converted after reading. Nothing is read here. What a
checkpoint lacks is filled in by `skeleton`; a plain module's names must match, give or take one prefix.
"""

import copy
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, TypeGuard, cast
from unittest import mock

import torch
from torch import nn

from hermes.checkpoint.index import DTYPE_BYTES, Checkpoint, Extent, QuantizedTensor, TensorEntry
from hermes.checkpoint.quantized import in_full
from hermes.errors import ModelError
from hermes.model.quantized import QuantizedMatrix
from hermes.model.runs import Runs

__all__ = [
    "Source", "WeightMap", "has_forward_of", "is_plain_linear", "is_transformers_model", "is_turned_linear",
    "map_weights", "weight_of",
]  # fmt: skip

_PREFIXES = ("module.", "model.")
_NUM_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one parameter's (or persistent buffer's) bytes lie on disk.

    Attributes:
        extents: without `convert`, their concatenation is the whole parameter, row major, in `dtype`.
        dtype: as stored, spelt as in safetensors; the same in all extents. Casting to the parameter's is the reader's.
        shapes: with `convert`, the shape of each source tensor; extent number i is all of tensor number i.
        convert: makes the parameter (in `dtype`) from the source tensors. Touches nothing else, safe in any thread.
        quantized: what the two extents hold, as bytes: values and scales. `convert` makes float32 of them, for where
            they are not multiplied as they are.
    """

    extents: tuple[Extent, ...]
    dtype: str
    shapes: tuple[tuple[int, ...], ...] | None = None
    convert: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None
    quantized: QuantizedTensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(extent.nbytes for extent in self.extents)


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """What a checkpoint holds for a skeleton.

    Attributes:
        sources: by state-dict name. A tensor that a model has under several names is in here once.
        missing: the model wants them and the checkpoint lacks them, as `from_pretrained` reports: what is tied to
            something present, or what the model says may be missing, does not count.
        unexpected: the checkpoint has them and the model has no use for them, with the same exceptions.
    """

    sources: Mapping[str, Source]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def map_weights(module: nn.Module, checkpoint: Checkpoint) -> WeightMap:
    """Find every parameter and persistent buffer of `module` in `checkpoint`; reads no weights.

    Raises ModelError where a shape differs from the module's, where transformers' own conversion cannot be carried out,
    and, for a plain module, where anything is missing.
    """
    entries = in_full(checkpoint)
    return _map_transformers(module, entries) if is_transformers_model(module) else _map_plain(module, entries)


def is_transformers_model(module: nn.Module) -> bool:
    """Whether this is a PreTrainedModel. Imports nothing: if transformers is not there yet, it cannot be one."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def weight_of(module: str) -> str:
    """What a model calls the `weight` of a module of this name; of itself where that is empty."""
    return f"{module}.weight" if module else "weight"


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling it is `functional.linear` with its weight and bias, and nothing that anybody has added.

    A class may, the instance (a `forward` of its own), or a parametrisation, which computes the weight.
    """
    return isinstance(module, nn.Linear) and has_forward_of(module, nn.Linear) and "weight" in module._parameters


def has_forward_of(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling it runs the forward of this class, not that of one under it, nor one of the instance's own."""
    return type(module).forward is cls.forward and "forward" not in vars(module)


def is_turned_linear(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer whose matrix lies turned."""
    layers = sys.modules.get("transformers.pytorch_utils")
    return layers is not None and type(module) is layers.Conv1D and has_forward_of(module, layers.Conv1D)


def _map_plain(module: nn.Module, entries: Mapping[str, TensorEntry]) -> WeightMap:
    tensors = _state(module)
    renamed = min(_renamings(tensors, entries), key=lambda names: len(tensors.keys() - names.keys()))
    sources = _one_per_tensor(
        tensors, {name: _plain(name, tensors[name], renamed[name]) for name in tensors if name in renamed}
    )
    found = {id(tensors[name]) for name in sources}
    if missing := [name for name, tensor in tensors.items() if id(tensor) not in found]:
        raise ModelError(
            f"the checkpoint lacks {_listed(missing)} of the module's {len(tensors)} tensors; "
            "give the state dict that belongs to this module"
        )
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    paths = {id(tensor): name for name, tensor in own.items()}
    sources = {  # a wrapper may leave its own name out of the state dict's
        name if name in own else paths[id(tensors[name])]: source for name, source in sources.items()
    }
    return WeightMap(
        sources=sources, missing=(), unexpected=tuple(e.name for n, e in renamed.items() if n not in tensors)
    )


def _renamings(tensors: Iterable[str], entries: Mapping[str, TensorEntry]) -> Iterator[dict[str, TensorEntry]]:
    """The checkpoint under its own names, with one prefix taken off, and with one put on."""
    yield dict(entries)
    for prefix in dict.fromkeys((*_PREFIXES, _common_prefix(entries))):
        yield {name.removeprefix(prefix): entry for name, entry in entries.items()}
    for prefix in dict.fromkeys((*_PREFIXES, _common_prefix(tensors))):
        yield {f"{prefix}{name}": entry for name, entry in entries.items()}


def _common_prefix(names: Iterable[str]) -> str:
    """The first part of all names, with its dot; empty if they begin differently."""
    first = {name.partition(".")[0] for name in names}
    return f"{first.pop()}." if len(first) == 1 else ""


def _map_transformers(model: Any, entries: Mapping[str, TensorEntry]) -> WeightMap:
    from transformers.utils.loading_report import LoadStateDictInfo

    tensors = _state(model)
    plain, conversions, unexpected = _matched(model, entries, tensors)
    sources = {name: _plain(name, tensors[name], entry) for name, entry in plain.items()}
    for conversion in conversions:
        for name, source in conversion.sources(tensors):
            if name in tensors:
                sources[name] = source
            else:
                unexpected.add(name)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target, origin in tied.items():
        # A .bin holds tied weights under both names, as one storage: keep the one that the other is tied to.
        if target in sources and origin in sources and sources[target].extents == sources[origin].extents:
            del sources[target]
    sources = _one_per_tensor(tensors, sources)
    found = {id(tensors[name]) for name in sources}
    groups = [{origin, *(t for t, o in tied.items() if o == origin)} for origin in dict.fromkeys(tied.values())]
    filled = set().union(*(group for group in groups if group & sources.keys()))
    info = LoadStateDictInfo(
        missing_keys={name for name, tensor in tensors.items() if id(tensor) not in found} - filled,
        unexpected_keys=unexpected,
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)
    return WeightMap(
        sources=sources, missing=tuple(sorted(info.missing_keys)), unexpected=tuple(sorted(info.unexpected_keys))
    )


class _LatePattern:
    """Stands for `re.compile` of its arguments, which is called when the pattern is first used."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._pattern, name)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(*self._arguments)

    def __deepcopy__(self, memo: object) -> "_LatePattern":
        return self


@contextmanager
def _late_patterns(module: Any) -> Iterator[None]:
    """While inside, patterns that `module` compiles are late ones.

    transformers keeps the rules of all its models as one table: 900 patterns, 40 ms, for the few that a model has.
    """
    with mock.patch.object(module, "re", SimpleNamespace(**vars(re) | {"compile": _LatePattern})):
        yield


def _matched(
    model: Any, entries: Mapping[str, TensorEntry], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, TensorEntry], list["_Conversion"], set[str]]:
    """What is only renamed, what is converted, and what nobody wants.

    The loop is the one of transformers' `convert_and_load_state_dict_in_model`, quantisation and sharding left out; the
    order matters, because it is the order in which experts are stacked.
    """
    from transformers import conversion_mapping, core_model_loading

    with _late_patterns(core_model_loading):
        rules = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    # All that operations ask of a model is shapes. Not of the model itself: at run time its parameters come and go.
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    shaped = SimpleNamespace(get_parameter=shapes.__getitem__)
    prefix, rename = model.base_model_prefix, core_model_loading.rename_source_key
    plain: dict[str, TensorEntry] = {}
    converted: dict[str, _Conversion] = {}
    unexpected: set[str] = set()
    for key in sorted(entries, key=core_model_loading.dot_natural_key):
        name, pattern = rename(key, renamings, converters, prefix, tensors)
        if name not in tensors and key in tensors:
            name, pattern = rename(key, [], [], prefix, tensors)
        if name in tensors and pattern is None:
            plain.setdefault(name, entries[key])
        elif name in tensors:
            conversion = converted.setdefault(name, _Conversion(name, by_pattern[pattern], shaped, model.config))
            conversion.parts.append((pattern, entries[key]))
        elif pattern is not None:
            targets = by_pattern[pattern].target_patterns
            unexpected.update(name.replace(targets[0], target) for target in targets)
        else:
            unexpected.add(name)
    return plain, list(converted.values()), unexpected


class _Conversion:
    """One of transformers' converters with the tensors it collected, for the parameter `name` and those beside it."""

    def __init__(self, name: str, converter: Any, model: Any, config: Any) -> None:
        self.name = name
        self.parts: list[tuple[str, TensorEntry]] = []
        self._converter = converter
        self._model = model
        self._config = config

    def sources(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Source]]:
        """A source for each parameter that the conversion makes. Raises ModelError."""
        entries = [entry for _, entry in self.parts]
        if any(entry.quantized for entry in entries):
            raise ModelError(
                f"{self.name}: to be made of {len(entries)} tensors, some of them quantised, which cannot be merged; "
                "quantise the model again with these versions of Hermes and transformers"
            )
        stored = {entry.dtype for entry in entries}
        if len(stored) > 1:
            found = ", ".join(sorted(stored))
            raise ModelError(
                f"{self.name}: its {len(entries)} parts are stored in several dtypes ({found}); save as one"
            )
        dtype = entries[0].dtype
        for name, made in self._made().items():
            if name in tensors:
                _check_shape(name, tensors[name], tuple(made.shape))
            if isinstance(made, Runs):
                yield name, Source(extents=_extents(made, entries, DTYPE_BYTES[dtype]), dtype=dtype)
                continue
            extents, shapes = tuple(entry.extent for entry in entries), tuple(entry.shape for entry in entries)
            yield name, Source(extents=extents, dtype=dtype, shapes=shapes, convert=self._closure(name))

    def _made(self) -> dict[str, Any]:
        """What the operations make: of runs if they leave them whole, else of tensors without values."""
        # What runs do not understand shows in exceptions of any kind; whether it is an error, tensors decide.
        with suppress(Exception):
            return self.run([Runs.whole(number, entry.shape) for number, (_, entry) in enumerate(self.parts)])
        try:
            # Shapes only, so any dtype does; float32 is the one that every operation has.
            return self.run([torch.empty(entry.shape, device="meta") for _, entry in self.parts])
        except Exception as error:
            shapes = ", ".join(str(list(shape)) for shape in dict.fromkeys(entry.shape for _, entry in self.parts))
            wanted = list(self._model.get_parameter(self.name).shape)
            raise ModelError(
                f"{self.name}: config says {wanted}, checkpoint has {len(self.parts)} parts of {shapes} "
                f"which do not make that ({_one_line(error)})"
            ) from error

    def run(self, tensors: Iterable[Any]) -> dict[str, Any]:
        """The converter's own operations on these tensors, in the order of `parts`."""
        # A converter collects tensors in itself, and this may be running in another thread.
        converter = copy.deepcopy(self._converter)
        for (pattern, _), tensor in zip(self.parts, tensors, strict=True):
            converter.collected_tensors[pattern].append(tensor)
        made = converter.convert(self.name, model=self._model, config=self._config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def _closure(self, name: str) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
        def convert(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            return cast(torch.Tensor, self.run(tensors)[name])

        return convert


def _extents(tensor: Runs, entries: Sequence[TensorEntry], item_bytes: int) -> tuple[Extent, ...]:
    """The runs as bytes; neighbours in one file are one extent."""
    extents: list[Extent] = []
    for source, first, length in tensor.runs:
        home = entries[source].extent
        new = Extent(file=home.file, offset=home.offset + first * item_bytes, nbytes=length * item_bytes)
        last = extents[-1] if extents else None
        if last is not None and (last.file, last.offset + last.nbytes) == (new.file, new.offset):
            extents[-1] = Extent(file=last.file, offset=last.offset, nbytes=last.nbytes + new.nbytes)
        else:
            extents.append(new)
    return tuple(extents)


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without extra state, and with the module's own tensors in it: shared ones are the same object."""
    state = module.state_dict(keep_vars=True)
    own = {
        id(tensor) for one in module.modules() for table in (one._parameters, one._buffers) for tensor in table.values()
    }
    return {name: tensor for name, tensor in state.items() if id(tensor) in own}


def _one_per_tensor(tensors: Mapping[str, torch.Tensor], sources: Mapping[str, Source]) -> dict[str, Source]:
    """One source for a tensor that has several names; the last one stored wins, as in `load_state_dict`."""
    names: dict[int, str] = {}
    chosen: dict[str, Source] = {}
    for name in tensors:
        if name in sources:
            chosen[names.setdefault(id(tensors[name]), name)] = sources[name]
    return chosen


def _plain(name: str, tensor: torch.Tensor, entry: TensorEntry) -> Source:
    _check_shape(name, tensor, entry.shape)
    if (matrix := entry.quantized) is None:
        return Source(extents=(entry.extent,), dtype=entry.dtype)
    stored = (matrix.values.extent, matrix.scales.extent)
    return Source(
        extents=stored,
        dtype="U8",
        shapes=tuple((extent.nbytes,) for extent in stored),
        convert=lambda parts: QuantizedMatrix(matrix, *parts).floats(),
        quantized=matrix,
    )


def _check_shape(name: str, tensor: torch.Tensor, stored: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(stored):
        raise ModelError(
            f"{name}: config says {list(tensor.shape)}, checkpoint has {list(stored)}; "
            "give the config.json that belongs to these weights"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return f"{len(names)} ({', '.join(names[:_NUM_NAMED])}{more})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
