"""Imports transformers' modelling code without what it never uses here: torch's compiler and distributed tensors.

They come with it for attention variants and shardings, and cost 80 MB that no weight can have. Nor is the table of all
its classes made (`late_table`). Tokenizers, tracing and the models themselves are elsewhere.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from hermes.model.late_table import make_table_late

__all__ = ["lean_imports", "leave_compiler_out"]

_PUT_OFF = ("torch._dynamo", "torch.nn.attention.flex_attention")
_DECORATORS = {"allow_in_graph", "assume_constant_result", "disable", "mark_static_address"}
"""What they say matters to the compiler alone."""


@contextmanager
def lean_imports() -> Iterator[None]:
    """While inside, modules in `_PUT_OFF` that are not loaded yet are stood in for; afterwards they can be imported.

    What has been imported from a stand-in is the real thing as soon as it is called, asked for an attribute, or checked
    against; only `torch.compile` would miss the hints of decorators. Random initialisation of tensors on the meta
    device, which makes no numbers but brings the same modules in, is left out. And where transformers' modelling code
    is not loaded yet, it believes from now on that this torch cannot distribute a model over processes.
    """
    make_table_late()
    if "transformers.modeling_utils" not in sys.modules and "torch.distributed.tensor" not in sys.modules:
        _believe_in_one_process()
    finder = _Finder([name for name in _PUT_OFF if name not in sys.modules])
    sys.meta_path.insert(0, finder)
    try:
        with _PlainMeta():
            yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.made:
            stand_in = sys.modules.pop(name, None)
            package, _, child = name.rpartition(".")
            if package in sys.modules and vars(sys.modules[package]).get(child) is stand_in:
                delattr(sys.modules[package], child)


def leave_compiler_out() -> None:
    """In a process that only traces: torch's compiler, if it is not loaded yet, is its settings and nothing else."""
    name = "torch._dynamo"
    if name not in sys.modules:
        sys.modules[name] = compiler = _StandIn(name)
        compiler.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]


def _believe_in_one_process() -> None:
    from transformers.utils.import_utils import is_torch_distributed_available

    with mock.patch("torch.distributed.is_available", return_value=False):
        is_torch_distributed_available()  # remembers its first answer


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for the given modules and all below them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._prefixes = tuple(f"{name}." for name in names)
        self.made: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """A spec for a name that is put off; None for any other."""
        if name not in self._names and not name.startswith(self._prefixes):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """A module of which every name is there."""
        self.made.append(spec.name)
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _as_it_is if name in _DECORATORS else _Late(name, (), {"__module__": self.__name__})


class _Late(type):
    """Stands for something in a module that is imported when it is first used."""

    def _real(cls) -> Any:
        module = importlib.import_module(cls.__module__)
        if isinstance(module, _StandIn):
            raise ImportError(f"{cls.__module__}.{cls.__name__} is used while it is imported")
        return getattr(module, cls.__name__)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._real()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls._real(), name)

    def __instancecheck__(cls, instance: object) -> bool:
        loaded = not isinstance(sys.modules.get(cls.__module__), _StandIn | None)
        return loaded and isinstance(instance, cls._real())


def _as_it_is(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments."""
    return function if function is not None else _as_it_is


class _PlainMeta(TorchFunctionMode):
    """Tensors on the meta device without torch's Python kernels for them.

    Initialisation is left out, and draws no numbers; constants, as position tables, are computed on the CPU for the
    sake of their shape.
    """

    _RANDOM = (torch.Tensor.normal_, torch.Tensor.uniform_)
    _DRAWN = (torch.randn, torch.rand)
    _MADE = (torch.arange, torch.linspace)
    _COMPUTED = (
        torch.Tensor.__rtruediv__, torch.Tensor.__truediv__, torch.Tensor.div, torch.div, torch.Tensor.__pow__,
        torch.Tensor.__rpow__, torch.pow, torch.Tensor.mul, torch.mul, torch.einsum, torch.outer, torch.sin, torch.cos,
        torch.cat, torch.stack,
    )  # fmt: skip

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._RANDOM or getattr(func, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else kwargs.get("tensor")
            if _is_meta(tensor):
                return tensor
        elif func in self._DRAWN and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return torch.empty(*args, **{name: value for name, value in kwargs.items() if name != "generator"})
        elif func in self._MADE and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return _to_meta(func(*args, **kwargs | {"device": "cpu"}))
        elif func in self._COMPUTED and _has_meta(args):
            return _to_meta(func(*map(_to_cpu, args), **kwargs))
        elif func is torch.empty_like and _is_meta(args[0]) and kwargs.keys() == {"device"}:
            return torch.empty(args[0].shape, dtype=args[0].dtype, device=kwargs["device"])
        return func(*args, **kwargs)


def _is_meta(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _has_meta(value: object) -> bool:
    return any(map(_has_meta, value)) if isinstance(value, list | tuple) else _is_meta(value)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_to_cpu(item) for item in value]
    return torch.ones(value.shape, dtype=value.dtype) if _is_meta(value) else value


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
