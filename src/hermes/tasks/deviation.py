"""How far what one model says is from what another says: both are streamed, one after the other, over one prompt."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hermes.api import load
from hermes.errors import InputError
from hermes.tasks.detect import context_tokens, read_config, task_of
from hermes.tasks.text import encode_texts, load_tokenizer

__all__ = ["PROMPT", "Deviation", "find_deviation"]

PROMPT = (
    "A machine with little memory reads the weights of a large model from its disk again and again, and what it says "
    "is the same, only later."
)
_OUTPUTS = {
    "text-generation": "logits",
    "text2text-generation": "logits",
    "feature-extraction": "last_hidden_state",
}


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """Of the outputs at every position of a prompt.

    Attributes:
        output: "logits" or "last_hidden_state".
        relative_error: root of the sum of squares of all differences, over that of the reference's outputs.
        positions: tokens.
        agreeing: positions with the same most likely token; None where the output is no logits.
    """

    output: str
    relative_error: float
    positions: int
    agreeing: int | None


def find_deviation(model: Path, reference: Path, *, budget_bytes: int, prompt: str = PROMPT) -> Deviation:
    """Run both over the prompt. Blocking. Raises InputError for models without text, and as `load` does."""
    task = task_of(reference)
    if task not in _OUTPUTS:
        raise InputError(f"{reference}: outputs are compared for models of text; this one is for {task}")
    config = read_config(reference)
    inputs = encode_texts(load_tokenizer(reference), [prompt], padding_side="right", max_tokens=context_tokens(config))
    if task == "text2text-generation":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    expected = _outputs(reference, task, inputs, budget_bytes)
    found = _outputs(model, task, inputs, budget_bytes)
    if found.shape != expected.shape:
        raise InputError(
            f"{model} gives {list(found.shape)} numbers and {reference} {list(expected.shape)}: give the model that it "
            "was made from"
        )
    lost, there = float((found - expected).double().square().sum()), float(expected.double().square().sum())
    is_logits = _OUTPUTS[task] == "logits"
    return Deviation(
        output=_OUTPUTS[task],
        relative_error=math.sqrt(lost / there) if there else math.inf if lost else 0.0,
        positions=expected.shape[0],
        agreeing=int((found.argmax(-1) == expected.argmax(-1)).sum()) if is_logits else None,
    )


def _outputs(directory: Path, task: str, inputs: Mapping[str, torch.Tensor], budget_bytes: int) -> torch.Tensor:
    """In float32, [position, width]."""
    num_tokens = inputs["input_ids"].shape[1]
    with load(directory, budget=budget_bytes, task=task, sequence_length=num_tokens, max_new_tokens=1) as model:
        with torch.no_grad():
            output: torch.Tensor = model(**inputs)[_OUTPUTS[task]]
        return output[0].float()
