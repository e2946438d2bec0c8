"""`hermes run`: one model, one set of inputs, inside a memory budget; or fully resident, as the yardstick.

The order matters: whatever can be wrong with options and inputs is said before torch is imported or a weight is read.
What is done with the inputs is in `jobs`, the run itself in `execute`, how its result looks in `hermes.report`.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hermes.checkpoint import open_checkpoint, resolve_model
from hermes.cli.execute import open_streamed, run_resident, run_streamed
from hermes.cli.jobs import Inputs, make_job
from hermes.cli.options import (
    Agents,
    Budget,
    DeviceBudget,
    DeviceName,
    Dtype,
    Granularity,
    Model,
    ProfileFile,
    ResidentBytes,
    Revision,
    Sequential,
    Task,
    TrustRemoteCode,
    plan_choices,
)
from hermes.errors import BudgetError, InputError
from hermes.memory.allocator import keep_heap_tight
from hermes.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from hermes.tasks.text_generation import GenerateOptions

__all__ = ["run"]


def run(
    model: Model,
    budget: Budget = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to go on from; repeatable. Else standard input.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to generate; else up to 128, as far as the context allows.")
    ] = None,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="Draw tokens instead of taking the likeliest.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="Of sampling; above 0.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Draw from so many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Draw from the likeliest of this share.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 makes repeating less likely.")] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="prompt-lookup, or a small model of the same vocabulary: guesses tokens; a sweep checks several."
        ),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text to embed; repeatable.")] = None,
    pool: Annotated[
        str | None, typer.Option(help="mean, cls, last, max or none; else as the model's directory says, or mean.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image file to classify; repeatable.")] = None,
    input: Annotated[
        Path | None,
        typer.Option(help='Work through a file: a JSON string, or an object with "text" or "prompt", a line.'),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where its results go, in the same order.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Records of --input at a time; else as many as the budget has room for.")
    ] = None,
    resident: Annotated[bool, typer.Option("--resident", help="Plain transformers, all weights in memory.")] = False,
    sequential: Sequential = False,
    agents: Agents = None,
    granularity: Granularity = None,
    resident_bytes: ResidentBytes = None,
    dtype: Dtype = None,
    device: DeviceName = "cpu",
    device_budget: DeviceBudget = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Of sampling.")] = None,
    profile: ProfileFile = None,
    task: Task = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace of all agents to this file.")] = None,
) -> None:
    """Run a model inside a memory budget: generate text, embed texts, or classify images."""
    options: dict[str, Any] = {
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "draft": draft,
    }
    _check_sampling(options)
    if resident:
        _check_resident(
            budget=budget,
            trace=trace,
            sequential=sequential or None,
            agents=agents,
            granularity=granularity,
            resident_bytes=resident_bytes,
            profile=profile,
            device_budget=device_budget,
        )
    budget_bytes = _budget(budget, resident=resident)
    choices = plan_choices(agents=agents, granularity=granularity, resident_bytes=resident_bytes, sequential=sequential)
    choices["profile"] = profile
    if trace is not None and not trace.parent.is_dir():
        raise InputError(f"--trace {trace}: no such directory; make it first")
    if device != "cpu" and (input is not None or draft is not None):
        raise InputError(f"--device {device} is not for --input or --draft; those compute on the CPU")
    directory = resolve_model(model, revision=revision)
    if directory.is_dir():
        open_checkpoint(directory)  # a broken one is said at once
    if not resident:
        keep_heap_tight()  # before torch brings threads and buffers

    def generate(max_new_tokens: int) -> "GenerateOptions":
        from hermes.tasks.text_generation import GenerateOptions

        return GenerateOptions(max_new_tokens=max_new_tokens, **options)

    if input is not None or output is not None or batch is not None:
        if input is None or output is None or prompt or text or image or draft or trace:
            raise InputError("--input and --output (and --batch) go together, without other inputs, --draft or --trace")
        from hermes.cli.batch import run_file

        done = run_file(
            model,
            directory,
            input,
            output,
            budget_bytes=budget_bytes,
            batch_size=batch,
            task=task or ("feature-extraction" if pool is not None else None),
            pool=pool,
            generate=generate,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            choices=choices,
            quiet=json_output,
        )
        print(json.dumps(asdict(done)) if json_output else done.summary(), file=None if json_output else sys.stderr)
        return

    job = make_job(
        directory,
        Inputs(prompts=prompt or (), texts=text or (), images=image or ()),
        task=task,
        generate=generate,
        max_new_tokens=max_new_tokens,
        pool=pool,
        trust_remote_code=trust_remote_code,
    )
    if budget_bytes is None:
        outcome = run_resident(model, directory, job, dtype, trust_remote_code, device=device, quiet=json_output)
    else:
        from hermes.report.progress import import_terminal

        import_terminal()
        module, session = open_streamed(
            directory,
            job.task,
            budget_bytes=budget_bytes,
            workload=job.workload,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            device=device,
            device_budget=device_budget,
            record=trace is not None,
            **choices,
        )
        with session:
            outcome = run_streamed(model, module, session, job, quiet=json_output)
            if trace is not None:
                from hermes.report.trace import write_trace

                write_trace(session.stats, trace)
    if json_output:
        print(json.dumps(outcome.document()))
    else:
        print(*outcome.summary(), sep="\n", file=sys.stderr)
    if budget_bytes is not None and outcome.peak_bytes > budget_bytes:
        print(
            f"warning: peak {format_bytes(outcome.peak_bytes)} exceeded the budget of {format_bytes(budget_bytes)}",
            file=sys.stderr,
        )


def _check_resident(**options: object) -> None:
    """Those of the engine, which plain transformers would pass over without a word."""
    if given := [name for name, value in options.items() if value is not None]:
        raise InputError(f"--resident holds all weights in memory; leave out {_spelt(given)}, for streaming alone")


def _budget(budget: str | None, *, resident: bool) -> int | None:
    """Bytes; None is no engine and no bound."""
    if resident:
        return None
    if budget is None:
        raise BudgetError("run needs --budget (as 700MiB), or --resident to hold all weights in memory")
    return parse_bytes(budget)


def _check_sampling(options: dict[str, Any]) -> None:
    given = [name for name in ("temperature", "top_k", "top_p") if options[name] is not None]
    if given and not options["do_sample"]:
        raise InputError(f"{_spelt(given)} changes nothing without --do-sample")
    for name in ("temperature", "repetition_penalty"):
        value = options[name]
        if value is not None and not value > 0:
            raise InputError(f"{_spelt([name])} is {value}; it must be above 0")


def _spelt(names: list[str]) -> str:
    """As on the command line."""
    return " and ".join("--" + name.replace("_", "-") for name in names)
