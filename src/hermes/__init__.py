"""Run Transformers larger than a memory budget: weights stay on disk and pass through a window of memory.

    model = hermes.load("EleutherAI/gpt-j-6b", budget="4GiB")     # a transformers model; .generate() as always
    net = hermes.stream(module, "w.safetensors", "300MiB")        # any torch.nn.Module

Importing this package imports no torch: what is asked for is imported when it is asked for.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hermes.api import load, plan, profile, stream
    from hermes.errors import (
        BudgetError,
        CheckpointError,
        EngineError,
        HermesError,
        InputError,
        ModelError,
        ProfileError,
        ReadError,
    )
    from hermes.fleet import Blocks, Fleet
    from hermes.session.workload import Workload

__version__ = "0.1.0"

__all__ = [
    "Blocks",
    "BudgetError",
    "CheckpointError",
    "EngineError",
    "Fleet",
    "HermesError",
    "InputError",
    "ModelError",
    "ProfileError",
    "ReadError",
    "Workload",
    "__version__",
    "load",
    "plan",
    "profile",
    "stream",
]

_HOMES = {
    **dict.fromkeys(("load", "plan", "profile", "stream"), "hermes.api"),
    **dict.fromkeys((name for name in __all__ if name.endswith("Error")), "hermes.errors"),
    **dict.fromkeys(("Blocks", "Fleet"), "hermes.fleet"),
    "Workload": "hermes.session.workload",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `hermes.plan` and `hermes.profile` the functions, although packages of these names lie below.

    The import system binds a package as an attribute of its parent, whenever it happens to be imported first; that
    binding is refused here. `from hermes.plan import Plan` does not need it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
