"""`hermes fleet run FLEET.toml`: several models under one budget, and a table of what each did."""

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hermes.cli.fleet_file import ModelEntry, read_fleet_file
from hermes.errors import BudgetError, HermesError, InputError
from hermes.memory.allocator import keep_heap_tight

if TYPE_CHECKING:
    from hermes.fleet import Fleet

__all__ = ["fleet"]

fleet = typer.Typer(no_args_is_help=True, help="Several models under one budget.")

SEED = 0


@fleet.callback()
def _group() -> None:
    """Several models under one budget."""


@fleet.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FLEET.toml", help="Models, weights and requests.")],
    budget: Annotated[str | None, typer.Option(help="Memory of the whole process; else the file's.")] = None,
    policy: Annotated[str | None, typer.Option(help="round-robin, deadline or auto; else the file's.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Run what the file asks of its models, all inside one budget; measured beside predicted."""
    asked = read_fleet_file(file)
    settled = budget or asked.budget
    if settled is None:
        raise BudgetError(f'no budget: add budget = "1GiB" to {file}, or give --budget')
    keep_heap_tight()
    from hermes.fleet import Fleet

    with Fleet(budget=settled, policy=policy or asked.policy, device=asked.device) as running:
        calls: dict[str, list[Callable[[Any], Any]]] = {}
        for name, entry in asked.models.items():
            _say(f"measuring {name} ({len(calls) + 1} of {len(asked.models)}) ...")
            calls[name] = _add(running, file, name, entry)
        _say(f"{len(calls)} models start ...")
        running.start()
        _say(f"{sum(entry.requests for entry in asked.models.values())} requests ...")
        clients = [
            threading.Thread(target=_ask, args=(running, name, entry, calls[name]), daemon=True)
            for name, entry in asked.models.items()
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        report = running.report()
    if json_output:
        print(json.dumps(asdict(report)))
    else:
        from rich.console import Console

        from hermes.report.fleet import fleet_lines, fleet_table

        console = Console()
        console.print(fleet_table(report))
        for line in fleet_lines(report):
            console.print(line, highlight=False)
    failed = {name: model.failure for name, model in report.models.items() if model.failure is not None}
    if failed:
        raise InputError("; ".join(f"{name} failed: {why}" for name, why in failed.items()))


def _say(phase: str) -> None:
    """To whoever waits, at a terminal or reading a log."""
    print(phase, file=sys.stderr, flush=True)


def _add(running: "Fleet", file: Path, name: str, entry: ModelEntry) -> list[Callable[[Any], Any]]:
    """Bring a model in; its requests, which are taken in turn."""
    options: dict[str, Any] = {"importance": entry.importance, "deadline_seconds": entry.deadline}
    if entry.model is not None:
        from hermes.model.inputs import example_inputs, moved

        running.add(name, entry.model, batch_size=entry.batch, sequence_length=entry.seq, **options)

        def call(model: Any) -> Any:
            inputs = example_inputs(model, batch_size=entry.batch, sequence_length=entry.seq) or {}
            return model(**moved(inputs, running.device))

        return [call]
    inputs, module = _inputs(entry), _module(entry.module or "")
    try:
        running.add(name, module, entry.weights, example_args=(inputs[0],), **options)
    except (HermesError, OSError):
        raise
    except Exception as error:  # of the module's own code
        raise InputError(
            f"{file}: {name}: {entry.module} cannot take an input of shape {list(inputs[0].shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return [_call(one.to(running.device)) for one in inputs]


def _call(one: Any) -> Callable[[Any], Any]:
    return lambda model: model(one)


def _ask(running: "Fleet", name: str, entry: ModelEntry, calls: list[Callable[[Any], Any]]) -> None:
    start = time.perf_counter()
    futures = []
    for number in range(entry.requests):
        if entry.rate is not None:
            time.sleep(max(0.0, start + number / entry.rate - time.perf_counter()))
        futures.append(running.call(name, calls[number % len(calls)]))
        if entry.rate is None:
            futures[-1].exception()  # wait; what failed is in the report
    for future in futures:
        future.exception()


def _inputs(entry: ModelEntry) -> list[Any]:
    import torch

    if entry.inputs is None:
        generator = torch.Generator().manual_seed(SEED)
        return [torch.rand(entry.shape or (1,), generator=generator)]
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(entry.inputs)
    except SafetensorError as error:
        raise InputError(f"{entry.inputs}: not a safetensors file: {error}") from None
    if not tensors:
        raise InputError(f"{entry.inputs}: no tensors in it; each one is an input")
    return [tensors[name] for name in sorted(tensors)]


def _module(reference: str) -> Any:
    """What FILE.py:NAME makes, on the meta device. The file is run as a program would import it."""
    import importlib.util

    import torch

    file, _, name = reference.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"hermes_fleet_{Path(file).stem}", file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise InputError(f"{file}: no such Python file")
    code = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = code
    spec.loader.exec_module(code)
    maker = getattr(code, name, None)
    if not callable(maker):
        raise InputError(f"{file} has no class or function {name}")
    with torch.device("meta"):
        made = maker()
    if not isinstance(made, torch.nn.Module):
        raise InputError(f"{reference} makes a {type(made).__name__}, not a torch.nn.Module")
    return made
