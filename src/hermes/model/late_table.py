"""transformers' table of its classes, made when a name is asked for that is not in it yet.

`import transformers` reads the source of all its models, 1,700 files, to find out which module has which class, and
importing the first model does so again: 0.8 s, more where the disk is slow. The auto classes find a model's module by
its type, so a run needs none of it.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["make_table_late"]

_MODULE = "transformers.utils.import_utils"
_AUTO = "auto"
_TABLES = ("_class_to_module", "_object_missing_backend", "_import_structure")


def make_table_late() -> None:
    """Before transformers is imported: have its table hold the auto classes alone, until another name is asked for.

    Every name of transformers resolves as ever, `dir` and `import *` included. Nothing happens where transformers has
    been imported, or where its version makes the table otherwise.
    """
    if "transformers" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module that makes the table, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Its spec, with a loader that changes it; None for any other."""
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        """Run it, then change it."""
        super().exec_module(module)
        if hasattr(module, "_LazyModule") and hasattr(module, "define_import_structure"):
            _change(module)


class _Part(dict[frozenset[str], dict[str, set[str]]]):
    """The auto classes' part of the table, and what gives the rest."""

    rest: Callable[[], Any]


def _change(import_utils: Any) -> None:
    lazy_module, define = import_utils._LazyModule, import_utils.define_import_structure
    models = Path(import_utils.__file__).parents[1] / "models"

    def define_late(module_path: str | Path, prefix: str | None = None) -> Any:
        if Path(module_path) not in (models, models / "__init__.py"):
            return define(module_path, prefix)
        part = _Part({frozenset(): {}})
        part.update(define(models / _AUTO, f"{prefix}.{_AUTO}" if prefix else _AUTO))
        part.rest = lambda: define(module_path, prefix)
        return part

    class LateModule(lazy_module):  # type: ignore[misc, valid-type]
        """A lazy module that may know a part of its names."""

        _rest: Callable[[], Any] | None = None

        def __init__(self, name: str, module_file: str, import_structure: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(name, module_file, import_structure, *args, **kwargs)
            if isinstance(import_structure, _Part):
                self._rest = import_structure.rest
                del self.__all__

        def __getattr__(self, name: str) -> Any:
            if self._rest is not None and (name == "__all__" or not (name.startswith("__") or self._knows(name))):
                self._complete(self._rest)
                if name == "__all__":
                    return self.__all__
            return super().__getattr__(name)

        def _knows(self, name: str) -> bool:
            if any(name in names for names in (self._objects, self._class_to_module, self._modules)):
                return True
            # `from package import module` asks the package first, and imports what it has no attribute of.
            return importlib.machinery.PathFinder.find_spec(f"{self.__name__}.{name}", self.__path__) is not None

        def _complete(self, rest: Callable[[], Any]) -> None:
            self._rest = None
            whole = lazy_module(self._name, self.__file__, rest())
            self._modules |= whole._modules
            for table in _TABLES:
                setattr(self, table, getattr(whole, table) | getattr(self, table))
            self.__all__ = [*self._modules, *self._class_to_module]

    import_utils._LazyModule, import_utils.define_import_structure = LateModule, define_late
