"""Every error Hermes raises on purpose.

    HermesError
    ├── BudgetError       the budget cannot be parsed, or is too small for what was asked
    ├── CheckpointError   a weight file or its index is missing, truncated, corrupt or lies about itself
    ├── ModelError        the model cannot be built, or its weights do not fit its configuration
    ├── InputError        a prompt, image or option that the model cannot take
    ├── ProfileError      a stored profile is stale or was edited into nonsense
    └── EngineError       a pass stopped half way
        └── ReadError     the disk, or a file that changed, stopped it

A message is one line: the number, the limit, and the next step. The command line prints it and exits with 2.
"""

__all__ = [
    "BudgetError",
    "CheckpointError",
    "EngineError",
    "HermesError",
    "InputError",
    "ModelError",
    "ProfileError",
    "ReadError",
]


class HermesError(Exception):
    """Root of the tree."""


class BudgetError(HermesError):
    """The memory budget cannot be parsed, or is too small; the message gives the smallest that works."""

    def __init__(self, message: str, *, minimum_bytes: int | None = None) -> None:
        super().__init__(message)
        self.minimum_bytes = minimum_bytes


class CheckpointError(HermesError):
    """What is on disk is missing, truncated, corrupt, or contradicts itself."""


class ModelError(HermesError):
    """The architecture is unsupported, or configuration and weights disagree."""


class InputError(HermesError):
    """A prompt, image or option is outside what the model or the command accepts."""


class ProfileError(HermesError):
    """A stored profile belongs to other files or another machine, or does not make sense."""


class EngineError(HermesError):
    """A pass stopped half way; every agent has been stopped and the memory freed."""


class ReadError(EngineError):
    """A weight file could not be read while running: disk error, changed or vanished file."""
