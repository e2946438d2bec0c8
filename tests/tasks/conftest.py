from collections.abc import Callable
from pathlib import Path

import pytest

from hermes.checkpoint.synth import synth


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[[str], Path]:
    """A tiny checkpoint by its architecture's name, made once."""
    root = tmp_path_factory.mktemp("tiny")
    return lambda arch: synth(arch, root / arch)
