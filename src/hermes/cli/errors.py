"""How a command ends: every error becomes one line on standard error and an exit code, in this place alone.

But for a Ctrl-C before this module is there, which `hermes.__main__` ends alike.

2 for what Hermes raises on purpose and for what the system refuses, 130 for Ctrl-C, 1 when the reader of our output has
gone. Anything else is a bug and keeps its traceback. Wrong options are typer's own (2).
"""

import os
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from hermes.errors import HermesError

__all__ = ["GuardedGroup"]

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


class GuardedGroup(TyperGroup):
    """Runs a command, and turns what it raises into an end of the process."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; raises only typer's own exceptions, and bugs."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt as error:
            _say("interrupted", ctx)
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except BrokenPipeError as error:
            # The interpreter flushes standard output once more at its end, which must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from error
        except HermesError as error:
            _say(f"error: {error}", ctx)
            raise typer.Exit(EXIT_ERROR) from error
        except OSError as error:
            places = [str(name) for name in (error.filename, error.filename2) if name is not None]
            _say(f"error: {': '.join([*places, error.strerror or str(error)])}", ctx)
            raise typer.Exit(EXIT_ERROR) from error


def _say(message: str, ctx: Any) -> None:
    """One line, whatever the message holds; the traceback first if it was asked for."""
    if ctx.params.get("verbose"):
        traceback.print_exc()
    sys.stderr.write(" ".join(message.split()) + "\n")
