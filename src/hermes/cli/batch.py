"""`hermes run --input FILE --output FILE`: a whole file of texts or prompts, each sweep over the weights for many.

Records of like length go together, as many as the budget has room for; what is done is in the journal at once, and a
run that was killed goes on where it stopped.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hermes.checkpoint import open_checkpoint
from hermes.errors import BudgetError, InputError
from hermes.memory.probe import peak_resident_bytes
from hermes.tasks.detect import context_tokens, num_beams, read_config, read_settings, task_of
from hermes.tasks.records import Journal, Record, make_batches, read_records

if TYPE_CHECKING:
    from hermes.session import Session
    from hermes.session.workload import Workload
    from hermes.tasks.text_generation import GenerateOptions

__all__ = ["BatchOutcome", "run_file"]

BATCH_TOKENS = 2048
"""Of texts to embed, padding included: enough computing to hide the reading of any layer behind."""
BATCH_PROMPTS = 32


@dataclass(frozen=True, kw_only=True)
class BatchOutcome:
    """What came of a file. Seconds from the first sweep to the last; `tokens` are of the inputs, padding aside."""

    model: str
    task: str
    output: str
    records: int
    resumed: int
    sweeps: int
    tokens: int
    seconds: float
    budget_bytes: int | None
    peak_bytes: int
    bytes_read: int | None

    def summary(self) -> str:
        """One line for people."""
        from hermes.units import format_bytes, format_seconds

        done = self.records - self.resumed
        earlier = f" ({self.resumed} were there)" if self.resumed else ""
        return (
            f"{done} {'record' if done == 1 else 'records'}{earlier} in {format_seconds(self.seconds)}, "
            f"{self.sweeps} {'sweep' if self.sweeps == 1 else 'sweeps'}, "
            f"{self.tokens / max(self.seconds, 1e-9):.0f} tokens a second, peak {format_bytes(self.peak_bytes)}: "
            f"{self.output}"
        )


@dataclass(frozen=True, kw_only=True)
class _Work:
    """How one kind of record is worked on: its length in tokens, and what a model makes of a batch."""

    task: str
    lengths: list[int]
    perform: Callable[[Any, Sequence[str]], list[dict[str, Any]]]
    settings: Mapping[str, Any]
    new_tokens: int = 0
    beams: int = 1


def run_file(
    name: str,
    directory: Path,
    source: Path,
    output: Path,
    *,
    budget_bytes: int | None,
    batch_size: int | None,
    task: str | None,
    pool: str | None,
    generate: Callable[[int], "GenerateOptions"],
    max_new_tokens: int | None,
    dtype: str | None,
    trust_remote_code: bool,
    choices: Mapping[str, Any],
    quiet: bool,
) -> BatchOutcome:
    """Work through `source` into `output`; without a budget, with plain transformers. Blocking.

    Raises InputError, BudgetError and what a run raises; results so far stay in the journal.
    """
    records, input_digest = read_records(source)
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: no such directory; make it first")
    settled = task or task_of(directory)
    texts = [record.text for record in records]
    if settled == "feature-extraction":
        work = _embedding(directory, texts, pool, trust_remote_code)
    elif settled in ("text-generation", "text2text-generation"):
        work = _generation(directory, texts, settled, generate, max_new_tokens, trust_remote_code)
    else:
        raise InputError(f"--input is for texts and prompts; {directory} is a model for {settled}")
    job = {
        "model": str(directory.resolve()),
        "weights": open_checkpoint(directory).fingerprint(),
        "config": read_config(directory),
        "generation": read_settings(directory / "generation_config.json"),
        "input": input_digest,
        "task": work.task,
        "dtype": dtype,
        **work.settings,
    }
    with Journal(output, job) as journal:
        resumed = journal.done
        left = [record for record in records if record.index not in resumed]
        if not left:
            journal.finish(records)
            return _outcome(name, work, output, records, len(resumed), 0, 0, 0.0, budget_bytes, None)
        lengths = [work.lengths[record.index] for record in left]
        module, session, batches = _open(
            directory, work, lengths, batch_size, budget_bytes, dtype, trust_remote_code, choices
        )
        start = time.perf_counter()
        try:
            with _progress(len(records), len(resumed), quiet=quiet) as advance:
                for batch in batches:
                    chosen = [left[index] for index in batch]
                    results = work.perform(module, [record.text for record in chosen])
                    journal.add((record.index, result) for record, result in zip(chosen, results, strict=True))
                    advance(len(chosen))
            seconds = time.perf_counter() - start
            journal.finish(records)
        finally:
            if session is not None:
                session.close()
    bytes_read = None if session is None else session.stats.bytes_read
    return _outcome(
        name, work, output, records, len(resumed), len(batches), sum(lengths), seconds, budget_bytes, bytes_read
    )


def _open(
    directory: Path,
    work: _Work,
    lengths: Sequence[int],
    batch_size: int | None,
    budget_bytes: int | None,
    dtype: str | None,
    trust_remote_code: bool,
    choices: Mapping[str, Any],
) -> tuple[Any, "Session | None", list[list[int]]]:
    """The model, and batches that fit it: halved until a plan takes them, unless their size was given."""
    from hermes.session.workload import Workload

    embeds = work.task == "feature-extraction"
    tokens = None if batch_size is not None or not embeds else max(BATCH_TOKENS, max(lengths))
    size = batch_size if batch_size is not None or embeds else BATCH_PROMPTS
    while True:
        batches = make_batches(lengths, batch_size=size, batch_tokens=tokens)
        workload = Workload(
            batch_size=max(1, max(len(batch) * lengths[batch[0]] for batch in batches) // max(lengths))
            if embeds
            else max(map(len, batches)) * work.beams,
            sequence_length=max(lengths),
            max_new_tokens=work.new_tokens,
            num_forwards=len(batches),
            varies=len(batches) > 1,
        )
        try:
            return *_model(directory, work.task, workload, budget_bytes, dtype, trust_remote_code, choices), batches
        except BudgetError:
            if batch_size is not None or max(map(len, batches)) == 1:
                raise
            tokens = None if tokens is None else tokens // 2
            size = None if size is None else max(1, size // 2)


def _model(
    directory: Path,
    task: str,
    workload: "Workload",
    budget_bytes: int | None,
    dtype: str | None,
    trust_remote_code: bool,
    choices: Mapping[str, Any],
) -> tuple[Any, "Session | None"]:
    from hermes.cli.execute import load_resident, open_streamed

    if budget_bytes is None:
        return load_resident(directory, task, dtype, trust_remote_code), None
    return open_streamed(
        directory,
        task,
        budget_bytes=budget_bytes,
        workload=workload,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        **choices,
    )


def _embedding(directory: Path, texts: Sequence[str], pool: str | None, trust_remote_code: bool) -> _Work:
    from hermes.tasks.embedding import POOLS, embed_texts, pool_of
    from hermes.tasks.text import load_tokenizer

    settled = pool_of(directory) if pool is None else pool
    if settled not in POOLS:
        raise InputError(f"unknown pool {settled!r}; choose from {', '.join(POOLS)}")
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    limits = [limit for limit in (context_tokens(read_config(directory)), tokenizer.model_max_length) if limit]
    longest = min(limits, default=2**31)

    def perform(model: Any, batch: Sequence[str]) -> list[dict[str, Any]]:
        return [{"embedding": vector.tolist()} for vector in embed_texts(model, tokenizer, batch, pool=settled)]

    return _Work(
        task="feature-extraction",
        lengths=[min(longest, length) for length in _lengths(tokenizer, texts)],
        perform=perform,
        settings={"pool": settled},
    )


def _generation(
    directory: Path,
    texts: Sequence[str],
    task: str,
    generate: Callable[[int], "GenerateOptions"],
    max_new_tokens: int | None,
    trust_remote_code: bool,
) -> _Work:
    from hermes.cli.jobs import DEFAULT_NEW_TOKENS
    from hermes.tasks.text import load_tokenizer
    from hermes.tasks.text_generation import check_context, generate_text

    config = read_config(directory)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    lengths = _lengths(tokenizer, texts)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    limit = context_tokens(config)
    if max_new_tokens is None:
        room = DEFAULT_NEW_TOKENS if limit is None else limit - lengths[longest]
        max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
    try:
        check_context(config, prompt_tokens=lengths[longest], max_new_tokens=max_new_tokens)
    except InputError as error:
        raise InputError(f"record {longest + 1}: {error}") from error
    options = generate(max_new_tokens)

    def perform(model: Any, batch: Sequence[str]) -> list[dict[str, Any]]:
        results = generate_text(model, tokenizer, batch, options)
        return [{"generated": result.text, "token_ids": list(result.token_ids)} for result in results]

    return _Work(
        task=task,
        lengths=lengths,
        perform=perform,
        settings=asdict(options),
        new_tokens=options.max_new_tokens,
        beams=num_beams(directory),
    )


def _lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]]


@contextmanager
def _progress(total: int, done: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Records done, rate and time left, on a terminal."""
    import sys

    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("records"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task("records", total=total, completed=done)
        yield lambda count: bar.update(line, advance=count)


def _outcome(
    name: str,
    work: _Work,
    output: Path,
    records: Sequence[Record],
    resumed: int,
    sweeps: int,
    tokens: int,
    seconds: float,
    budget_bytes: int | None,
    bytes_read: int | None,
) -> BatchOutcome:
    return BatchOutcome(
        model=name,
        task=work.task,
        output=str(output),
        records=len(records),
        resumed=resumed,
        sweeps=sweeps,
        tokens=tokens,
        seconds=seconds,
        budget_bytes=budget_bytes,
        peak_bytes=peak_resident_bytes(),
        bytes_read=bytes_read,
    )
