"""`hermes bench`: Hermes beside its peers, from a checkout: the suite is in the repository, not in the package."""

import subprocess
import sys
from pathlib import Path

import typer

import hermes
from hermes.errors import InputError

__all__ = ["bench"]

SUITE = Path("benchmarks") / "suite.py"


def bench(ctx: typer.Context) -> None:
    """Compare with the paper's pipelines, accelerate, llama.cpp and others, each under one cap.

    Options are the suite's: --model, --cap, --disk, --peer, --samples, --timeout, --timeline, --report,
    --clean. Needs root, for the cgroups.
    """
    suite = Path(hermes.__file__).resolve().parents[2] / SUITE
    if not suite.exists():
        raise InputError(f"{SUITE} is not installed with the package; run hermes bench from a checkout")
    raise typer.Exit(subprocess.run([sys.executable, suite, *ctx.args], check=False).returncode)
