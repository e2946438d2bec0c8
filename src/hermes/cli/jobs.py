"""What one `hermes run` is asked to do: the task, its inputs made ready, and how its outputs look.

Inputs are made ready before the model is opened: their real shapes are what memory is planned for, and a prompt that
is too long or an image that cannot be read is refused before any weight is.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hermes.checkpoint import resolve_model
from hermes.errors import InputError
from hermes.tasks.detect import TASKS, context_tokens, num_beams, read_config, task_of

if TYPE_CHECKING:
    from hermes.session.workload import Workload
    from hermes.tasks.text_generation import GenerateOptions

__all__ = ["Inputs", "Job", "make_job"]

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What was asked on the command line; at most one of the three kinds."""

    prompts: Sequence[str] = ()
    texts: Sequence[str] = ()
    images: Sequence[Path] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A task with its inputs.

    Attributes:
        task: as transformers names it.
        workload: the inputs' real shapes.
        perform: (model, on_token) -> outputs, one JSON object for each input, in order.
        render: an output as text for people.
        streams: whether `on_token(input number, text)` will be called while it runs.
    """

    task: str
    workload: "Workload"
    perform: Callable[[Any, Callable[[int, str], None]], list[dict[str, Any]]]
    render: Callable[[dict[str, Any]], str]
    streams: bool = False


def make_job(
    directory: Path,
    inputs: Inputs,
    *,
    task: str | None,
    generate: Callable[[int], "GenerateOptions"],
    max_new_tokens: int | None,
    pool: str | None,
    trust_remote_code: bool,
) -> Job:
    """Read, tokenize or decode the inputs. Raises InputError, ModelError; no weight is touched."""
    task = _settle_task(directory, inputs, task)
    if task == "image-classification":
        return _image_job(directory, inputs.images)
    if task == "feature-extraction":
        return _text_job(directory, inputs.texts or _standard_input().split("\n"), pool, trust_remote_code)
    prompts = inputs.prompts or [_standard_input()]
    return _prompt_job(directory, prompts, task, generate, max_new_tokens, trust_remote_code)


def _settle_task(directory: Path, inputs: Inputs, task: str | None) -> str:
    kinds = {
        "--prompt": (inputs.prompts, ("text-generation", "text2text-generation")),
        "--text": (inputs.texts, ("feature-extraction",)),
        "--image": (inputs.images, ("image-classification",)),
    }
    given = [option for option, (values, _) in kinds.items() if values]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} do not go together; give one kind of input")
    if task is not None and task not in TASKS:
        raise InputError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    known = task_of(directory)
    if task is None and given == ["--text"]:
        return "feature-extraction"  # any text model without its head
    settled = task or known
    for option in given:
        if settled not in kinds[option][1]:
            right = next(name for name, (_, tasks) in kinds.items() if settled in tasks)
            raise InputError(f"{option} is not for {directory}: this is a model for {settled}, which takes {right}")
    return settled


def _standard_input() -> str:
    """All of it, but the newline at its end."""
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("nothing to do: give --prompt, --text or --image, or pipe text in")
    content = sys.stdin.buffer.read().replace(b"\r\n", b"\n").removesuffix(b"\n")
    if not content:
        raise InputError("there is nothing to read: standard input is empty; give --prompt, --text or --image")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"standard input, line {line}: not UTF-8; convert it") from error


def _prompt_job(
    directory: Path,
    prompts: Sequence[str],
    task: str,
    generate: Callable[[int], "GenerateOptions"],
    max_new_tokens: int | None,
    trust_remote_code: bool,
) -> Job:
    from hermes.session.workload import Workload
    from hermes.tasks.text import load_tokenizer
    from hermes.tasks.text_generation import PROMPT_LOOKUP, check_context, encode_prompts, generate_text, load_draft

    config = read_config(directory)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    batch_size, prompt_tokens = encode_prompts(tokenizer, prompts, config)["input_ids"].shape
    if max_new_tokens is None:
        limit = context_tokens(config)
        room = DEFAULT_NEW_TOKENS if limit is None else limit - prompt_tokens
        max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
    check_context(config, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens)
    options = generate(max_new_tokens)
    draft = None
    beams = num_beams(directory)
    if options.draft is not None and len(prompts) > 1:
        raise InputError(f"--draft is for one prompt, not {len(prompts)}; many at once share each sweep anyway")
    if options.draft is not None and beams > 1:
        raise InputError(f"--draft is not for {directory}, whose generation searches with {beams} beams; leave it out")
    if options.draft not in (None, PROMPT_LOOKUP):
        draft = load_draft(resolve_model(options.draft), config, trust_remote_code=trust_remote_code)

    def perform(model: Any, on_token: Callable[[int, str], None]) -> list[dict[str, Any]]:
        return [asdict(output) for output in generate_text(model, tokenizer, prompts, options, on_token, draft)]

    return Job(
        task=task,
        workload=Workload(batch_size=batch_size * beams, sequence_length=prompt_tokens, max_new_tokens=max_new_tokens),
        perform=perform,
        render=lambda output: str(output["text"]),
        streams=beams == 1,
    )


def _text_job(directory: Path, texts: Sequence[str], pool: str | None, trust_remote_code: bool) -> Job:
    from hermes.session.workload import Workload
    from hermes.tasks.embedding import POOLS, embed_texts, encode_for_embedding, pool_of
    from hermes.tasks.text import load_tokenizer

    pool = pool_of(directory) if pool is None else pool
    if pool not in POOLS:
        raise InputError(f"unknown pool {pool!r}; choose from {', '.join(POOLS)}")
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    inputs = encode_for_embedding(tokenizer, texts, read_config(directory))
    batch_size, sequence_length = inputs["input_ids"].shape

    def perform(model: Any, _: Callable[[int, str], None]) -> list[dict[str, Any]]:
        vectors = embed_texts(model, tokenizer, texts, pool=pool)
        return [{"text": text, "embedding": vector.tolist()} for text, vector in zip(texts, vectors, strict=True)]

    return Job(
        task="feature-extraction",
        workload=Workload(batch_size=batch_size, sequence_length=sequence_length),
        perform=perform,
        render=lambda output: json.dumps(output["embedding"]),
    )


def _image_job(directory: Path, images: Sequence[Path]) -> Job:
    from hermes.tasks.image import open_images

    opened = open_images(images)
    from hermes.session.workload import Workload
    from hermes.tasks.classification import classify_images, prepare_images

    pixels = prepare_images(directory, opened)
    config = read_config(directory)
    image_tokens = 1
    size, patch = config.get("image_size"), config.get("patch_size")
    if isinstance(size, int) and isinstance(patch, int) and patch > 0:
        image_tokens = (size // patch) ** 2 + 1

    def perform(model: Any, _: Callable[[int, str], None]) -> list[dict[str, Any]]:
        found = classify_images(model, pixels)
        return [
            {"image": str(image), "labels": [asdict(label) for label in labels]}
            for image, labels in zip(images, found, strict=True)
        ]

    def render(output: dict[str, Any]) -> str:
        labels = ", ".join(f"{label['label']} {label['score']:.1%}" for label in output["labels"])
        return f"{output['image']}: {labels}"

    return Job(
        task="image-classification",
        workload=Workload(batch_size=len(images), sequence_length=image_tokens),
        perform=perform,
        render=render,
    )
