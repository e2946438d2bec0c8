"""The run itself, streamed or fully resident, with a clock beside it: a job and a model become an `Outcome`.

Both kinds are timed alike: from the first call of the model to its last output, loading and planning apart.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hermes.cli.jobs import Job
from hermes.cli.plan import plan_document
from hermes.errors import HermesError, ModelError
from hermes.memory.probe import peak_resident_bytes, process_read_bytes

if TYPE_CHECKING:
    from hermes.report.outcome import Outcome
    from hermes.session import Session

__all__ = ["load_resident", "open_streamed", "run_resident", "run_streamed"]

_STARTED_SECONDS = time.perf_counter()
_TICKS_PER_SECOND = 100
"""Of the kernel's times in /proc: fixed by its interface."""


def run_streamed(name: str, module: Any, session: "Session", job: Job, *, quiet: bool) -> "Outcome":
    """Do the job with the module of an open session. Unless quiet, text reaches standard output as it comes."""
    from hermes.report.outcome import Outcome, seconds_per_pass
    from hermes.report.progress import ProgressLine

    plan, stats = session.plan, session.stats
    line = ProgressLine(
        stats,
        num_blocks=len(plan.resident),
        num_passes=job.workload.num_passes,
        budget_bytes=plan.budget_bytes,
    )
    result = _perform(module, job, line, quiet=quiet)
    predicted_seconds = plan.total_seconds
    if stats.passes != job.workload.num_passes:  # an end token came early
        predicted_seconds = plan.first_pass_seconds + max(0, stats.passes - 1) * plan.steady_pass_seconds
    return Outcome(
        model=name,
        task=job.task,
        outputs=result.outputs,
        budget_bytes=plan.budget_bytes,
        floor_bytes=plan.floor_bytes,
        load_seconds=result.load_seconds,
        seconds=result.seconds,
        first_output_seconds=result.first_output_seconds,
        seconds_per_pass=seconds_per_pass(stats.pass_seconds),
        passes=stats.passes,
        bytes_read=stats.bytes_read,
        stall_seconds=stats.stall_seconds,
        predicted_seconds=predicted_seconds,
        predicted_peak_bytes=plan.peak_bytes,
        plan=plan_document(plan, session.prepared),
        peak_bytes=peak_resident_bytes(),
        device=None if session.target is None else session.target.document(),
    )


def run_resident(
    name: str, directory: Path, job: Job, dtype: str | None, trust_remote_code: bool, *, device: str, quiet: bool
) -> "Outcome":
    """Do the job with plain transformers, no engine: the yardstick.

    Raises ModelError if it cannot load the model, InputError where there is no such device.
    """
    from hermes.device import find_device
    from hermes.report.outcome import Outcome, seconds_per_pass

    read_before = process_read_bytes()
    settled = find_device(device)
    module = load_resident(directory, job.task, dtype, trust_remote_code).to(settled)
    starts: list[float] = []
    pass_seconds: list[float] = []
    module.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    module.register_forward_hook(lambda *_: pass_seconds.append(time.perf_counter() - starts[-1]))
    result = _perform(module, job, None, quiet=quiet)
    read_after = process_read_bytes()
    return Outcome(
        model=name,
        task=job.task,
        outputs=result.outputs,
        budget_bytes=None,
        floor_bytes=None,
        load_seconds=result.load_seconds,
        seconds=result.seconds,
        first_output_seconds=result.first_output_seconds,
        seconds_per_pass=seconds_per_pass(pass_seconds),
        passes=len(pass_seconds),
        bytes_read=None if read_before is None or read_after is None else read_after - read_before,
        stall_seconds=None,
        predicted_seconds=None,
        predicted_peak_bytes=None,
        plan=None,
        peak_bytes=peak_resident_bytes(),
    )


def open_streamed(directory: Path, task: str, **options: Any) -> tuple[Any, "Session"]:
    """The model, and its session, which is the caller's to close; options and errors are `open_session`'s.

    Raises ModelError, too, where text would come from layers whose weights are missing.
    """
    from hermes.api import open_session

    prepared, session = open_session(directory, task=task, **options)
    try:
        _check_weights(directory, task, prepared.module, prepared.weights.missing)
    except ModelError:
        session.close()
        raise
    return prepared.module, session


def _check_weights(directory: Path, task: str, module: Any, missing: Collection[str]) -> None:
    from hermes.tasks.text_generation import check_blocks

    if task in ("text-generation", "text2text-generation"):
        check_blocks(directory, module, missing)


def load_resident(directory: Path, task: str, dtype: str | None, trust_remote_code: bool) -> Any:
    """The model as any user of transformers would load it, in the dtype that a streamed run computes in.

    Raises ModelError.
    """
    import transformers

    from hermes.api import torch_dtype
    from hermes.checkpoint import open_checkpoint
    from hermes.model.mapping import map_weights
    from hermes.model.resident import load_packed, load_quantized

    auto_class = {
        "text-generation": transformers.AutoModelForCausalLM,
        "text2text-generation": transformers.AutoModelForSeq2SeqLM,
        "feature-extraction": transformers.AutoModel,
        "image-classification": transformers.AutoModelForImageClassification,
    }[task]
    transformers.utils.logging.disable_progress_bar()
    settled = torch_dtype(dtype)
    checkpoint = open_checkpoint(directory)
    try:
        if checkpoint.packed or checkpoint.quantized:
            load: Any = load_quantized if checkpoint.quantized else load_packed
            loaded = load(auto_class, directory, checkpoint, dtype=settled, trust_remote_code=trust_remote_code)
            missing = map_weights(loaded, checkpoint).missing
        else:
            loaded, report = auto_class.from_pretrained(
                str(directory),
                dtype=settled or "auto",
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
            )
            missing = report["missing_keys"]
    except HermesError:
        raise
    # Everything: transformers has no error of its own for what does not fit.
    except Exception as error:
        raise ModelError(f"{directory}: transformers cannot load it: {' '.join(str(error).split())[:300]}") from error
    _check_weights(directory, task, loaded, missing)
    return loaded.eval()


@dataclass(kw_only=True)
class _Performance:
    """Outputs of a job, and how long they took."""

    load_seconds: float
    seconds: float = 0.0
    first_output_seconds: float = 0.0
    outputs: list[dict[str, Any]] = field(default_factory=list)


def _perform(module: Any, job: Job, line: Callable[[], str] | None, *, quiet: bool) -> _Performance:
    """Do the job. What comes of the first input is said as it comes, the others when all are done; nothing if quiet."""
    from hermes.report.progress import show_progress

    first_seconds: float | None = None
    with show_progress(line) as say:
        result = _Performance(load_seconds=_process_age_seconds())
        start = time.perf_counter()

        def on_token(number: int, text: str) -> None:
            nonlocal first_seconds
            if first_seconds is None:
                first_seconds = time.perf_counter() - start
            if text and number == 0 and not quiet:
                say(text)

        result.outputs = job.perform(module, on_token)
        result.seconds = time.perf_counter() - start
        result.first_output_seconds = result.seconds if first_seconds is None else first_seconds
        if not quiet:
            rest = [job.render(output) for output in result.outputs[1 if job.streams else 0 :]]
            if job.streams:
                say("\n")
            for text in rest:
                say(f"\n{text}\n" if job.streams else f"{text}\n")
    return result


def _process_age_seconds() -> float:
    """Since this process was started; off Linux, since this module was imported."""
    try:
        with open("/proc/self/stat", "rb") as stat:
            started_ticks = int(stat.read().rpartition(b")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / _TICKS_PER_SECOND
    except (OSError, AttributeError):
        return time.perf_counter() - _STARTED_SECONDS
