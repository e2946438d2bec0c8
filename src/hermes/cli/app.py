"""The `hermes` command. Each subcommand is a function in a module of its name; torch is imported when one runs."""

import atexit
import io
import logging
import os
import sys
import warnings
from typing import Annotated

import typer

import hermes
from hermes.cli.bench import bench
from hermes.cli.doctor import doctor
from hermes.cli.errors import GuardedGroup
from hermes.cli.fleet import fleet
from hermes.cli.pack import pack, unpack
from hermes.cli.plan import plan
from hermes.cli.profile import profile
from hermes.cli.run import run
from hermes.cli.synth import synth
from hermes.errors import BudgetError
from hermes.memory.probe import find_cgroup
from hermes.units import format_bytes

__all__ = ["app", "main"]

IMPORT_BYTES = 236 * 2**20
"""The peak of a process that imports torch 2.13, 218 MiB, and what the kernel adds to it."""

app = typer.Typer(
    name="hermes",
    cls=GuardedGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (run, plan, profile, doctor, synth, pack, unpack):
    app.command()(command)
app.add_typer(fleet, name="fleet")
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


def main() -> None:
    """Run the command; ends the process.

    At once: with all output written and the exit handlers of what was imported meanwhile run, the interpreter would
    still take torch's and transformers' modules apart one by one, for half a second.
    """
    status = 1

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(leave)  # the first to be registered is the last to run
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # Like standard error: a name that is no text, or a text that this terminal has no letters for, ends no command.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="hermes")
    except SystemExit as end:
        status = int(end.code or 0)
        raise


def _say_version(wanted: bool) -> None:
    if wanted:
        print(hermes.__version__)
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the log, warnings, and tracebacks of errors.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Run Transformers larger than a memory budget: weights stream from disk, the output stays the same."""
    _set_up_logging(verbose=verbose)
    if ctx.invoked_subcommand not in ("bench", "pack", "synth", "unpack"):
        _check_limit()


def _check_limit() -> None:
    """Say so where a cgroup leaves no room for torch, whose import the kernel would end without a word."""
    cgroup = find_cgroup()
    if cgroup is not None and cgroup.limit_bytes is not None and cgroup.limit_bytes < IMPORT_BYTES:
        raise BudgetError(
            f"the cgroup's limit of {format_bytes(cgroup.limit_bytes)} is below the {format_bytes(IMPORT_BYTES)} that "
            f"importing torch takes; raise the limit",
            minimum_bytes=IMPORT_BYTES,
        )


def _set_up_logging(*, verbose: bool) -> None:
    """Warnings of ours as lines; transformers' chatter only when asked for, its report of odd weights always."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    log = logging.getLogger("hermes")
    log.handlers = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.WARNING)
    log.propagate = False
    if verbose:
        return
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # Both are read when transformers is imported, which is later. It reports missing and unexpected weights through
    # the logger named here, so that one keeps its voice.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers.modeling_utils").setLevel(logging.WARNING)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"
