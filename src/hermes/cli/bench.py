"""`hermes bench`: what quantising has changed in a model; or Hermes beside its peers, from a checkout.

The peers' suite is in the repository, not in the package.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import hermes
from hermes.checkpoint.hub import resolve_model
from hermes.checkpoint.open import open_checkpoint
from hermes.errors import InputError
from hermes.report.deviation import describe_deviation, weight_error
from hermes.units import format_bytes, parse_bytes

__all__ = ["bench"]

SUITE = Path("benchmarks") / "suite.py"


def bench(
    ctx: typer.Context,
    against: Annotated[
        str | None, typer.Option("--against", metavar="SOURCE", help="The model that MODEL was quantised from.")
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", help="For this process, which streams one model after the other.")
    ] = "2GiB",
    prompt: Annotated[str | None, typer.Option("--prompt", help="What both models read; else a sentence.")] = None,
) -> None:
    """With a quantised MODEL: its error against full precision. Without: Hermes beside its peers.

    For MODEL, the error of its weights; with --against, that of its outputs over one prompt, too.

    Beside its peers means the paper's pipelines, accelerate, llama.cpp and others, each under one cap. Options are the
    suite's: --model, --cap, --disk, --peer, --samples, --timeout, --timeline, --report, --clean. Needs root, for the
    cgroups.
    """
    if ctx.args and not ctx.args[0].startswith("-"):
        if len(ctx.args) > 1:
            raise InputError(f"hermes bench {ctx.args[0]}: {ctx.args[1]!r} is not understood beside a MODEL")
        _print_errors(ctx.args[0], against, budget, prompt)
        return
    if against is not None or prompt is not None:
        raise InputError("--against and --prompt are for a quantised MODEL: hermes bench MODEL --against SOURCE")
    suite = Path(hermes.__file__).resolve().parents[2] / SUITE
    if not suite.exists():
        raise InputError(f"{SUITE} is not installed with the package; run hermes bench from a checkout")
    raise typer.Exit(subprocess.run([sys.executable, suite, *ctx.args], check=False).returncode)


def _print_errors(model: str, against: str | None, budget: str, prompt: str | None) -> None:
    budget_bytes = parse_bytes(budget)
    directory = resolve_model(model)
    checkpoint = open_checkpoint(directory)
    if not checkpoint.quantized:
        raise InputError(
            f"{model} is not quantised; give a directory that hermes pack --quantize has made, or --model {model} to "
            "measure this one beside the peers"
        )
    bits = sorted({matrix.bits for matrix in checkpoint.quantized.values()})
    scheme = " and ".join(f"int{number}" for number in bits)
    print(
        f"{model}: {len(checkpoint.quantized)} matrices in {scheme}, {format_bytes(checkpoint.nbytes)} of weights; "
        f"{weight_error(checkpoint)}"
    )
    if against is not None:
        from hermes.tasks.deviation import PROMPT, find_deviation

        source = resolve_model(against)
        found = find_deviation(directory, source, budget_bytes=budget_bytes, prompt=prompt or PROMPT)
        print(f"against {against}: {describe_deviation(found)}")
