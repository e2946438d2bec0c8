"""What stands for a weight outside its turn: on no device, and not to be mistaken for one that is there."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hermes.errors import InputError
from hermes.model.trace import tensors_in

__all__ = ["Stray"]


class Stray(nn.Parameter):
    """A placeholder on the meta device that notices when it is computed with.

    Its shape, dtype and detached self are free, as `state_dict` and transformers' checks want them, and so is the
    device: the one that its model computes on, where models put their inputs. Whatever else makes a tensor of it is run
    with the real weight, which `adopt` brings in and keeps, or refuses. Without this, a product of a real tensor and a
    meta one is no error in torch: it gives numbers out of memory that nobody wrote. Writing to it is refused: nothing
    would come of it.
    """

    adopt: Callable[[], torch.Tensor]
    home_device: torch.device

    def __new__(cls, placeholder: torch.Tensor, adopt: Callable[[], torch.Tensor], device: torch.device) -> "Stray":
        """Of the same shape and dtype as `placeholder`."""
        stray: Stray = torch.Tensor._make_subclass(cls, placeholder.detach(), placeholder.requires_grad)
        stray.adopt, stray.home_device = adopt, device
        return stray

    def __deepcopy__(self, memo: object) -> "Stray":
        """Raises InputError."""
        raise InputError("a streamed model's weights are on disk; load it again, or copy its files")

    def __reduce_ex__(self, protocol: object) -> Any:
        """Likewise."""
        return self.__deepcopy__({})

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run as it is; if a tensor (or an error) comes of it, run with the real weights. Raises InputError."""
        kwargs = kwargs or {}
        if func == _DEVICE:
            return args[0].home_device
        if func in _SAME:
            with torch._C.DisableTorchFunctionSubclass():
                return Stray(func(*args, **kwargs), args[0].adopt, args[0].home_device)
        if _writes(func) and isinstance(args[0], Stray):
            raise InputError("a streamed model's weights are on disk, where nothing is written; change the file")
        with torch._C.DisableTorchFunctionSubclass():
            try:
                result = func(*args, **kwargs)
                if func in _FREE or not any(True for _ in tensors_in(result)):
                    return result
            except (RuntimeError, TypeError):  # of the meta device; if of the call, it comes again
                pass
            real_args, real_kwargs = _adopted(args), {name: _adopted(value) for name, value in kwargs.items()}
            return func(*real_args, **real_kwargs)


_DEVICE = torch.Tensor.device.__get__
_SAME = {torch.Tensor.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
_FREE = {torch.Tensor.requires_grad_}
_OPERATORS = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


def _writes(func: Any) -> bool:
    """Whether this is one of torch's functions that change their first operand."""
    name = getattr(func, "__name__", "")
    return name in _OPERATORS or (name.endswith("_") and not name.endswith("__") and func not in _FREE)


def _adopted(value: Any) -> Any:
    if isinstance(value, Stray):
        return value.adopt()
    if type(value) in (list, tuple):
        return type(value)(map(_adopted, value))
    return value
