"""Text that goes on from prompts, by transformers' own `generate`: of decoders, and of encoder-decoders."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hermes.errors import InputError, ModelError
from hermes.model.lean import lean_imports
from hermes.tasks.detect import context_tokens, is_encoder_decoder, task_of
from hermes.tasks.text import encode_texts

__all__ = [
    "PROMPT_LOOKUP",
    "GenerateOptions",
    "Generated",
    "check_blocks",
    "check_context",
    "encode_prompts",
    "generate_text",
    "load_draft",
]

PROMPT_LOOKUP = "prompt-lookup"
DRAFT_TOKENS = 7
"""Guessed at a time: with the token that follows, a pass is over eight."""
_BLOCK = re.compile(r".*?\.\d+\.")
_NUM_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Named and meant as in transformers' `generate`; None leaves it to the model's generation configuration."""

    max_new_tokens: int
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    """Of the sampling; greedy output does not depend on it."""
    draft: str | None = None
    """PROMPT_LOOKUP, or the directory of a small model of the same vocabulary: several tokens are checked in a pass."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What came after one prompt; `token_ids` ends with the end token if there was one."""

    prompt: str
    text: str
    token_ids: tuple[int, ...]


def encode_prompts(tokenizer: Any, prompts: Sequence[str], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Inputs [prompt, token]: padded on the left, where a decoder does not see it. Raises InputError."""
    return encode_texts(tokenizer, prompts, padding_side="right" if is_encoder_decoder(config) else "left")


def check_context(config: Mapping[str, Any], *, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise InputError if the model has too few positions for prompt and output."""
    limit = context_tokens(config)
    if limit is None:
        return
    if is_encoder_decoder(config):
        if prompt_tokens > limit:
            raise InputError(f"the prompt is {prompt_tokens} tokens long, the model takes {limit}; shorten it")
        prompt_tokens = 1  # what the decoder starts from
    if prompt_tokens >= limit:
        raise InputError(
            f"the prompt is {prompt_tokens} tokens long, and the model's context of {limit} leaves no room for more; "
            "shorten it"
        )
    if prompt_tokens + max_new_tokens > limit:
        raise InputError(
            f"{prompt_tokens} tokens of prompt and {max_new_tokens} new ones exceed the model's context of {limit}; "
            f"shorten the prompt, or try --max-new-tokens {limit - prompt_tokens}"
        )


def check_blocks(directory: Path, model: Any, missing: Collection[str]) -> None:
    """Raise ModelError if all parameters of some block are `missing`: what it made of random ones would be noise.

    A block is a submodule with a number. A head that is tied, or new, is none.
    """
    blocks: defaultdict[str, list[str]] = defaultdict(list)
    for name, _ in model.named_parameters():
        if block := _BLOCK.match(name):
            blocks[block[0]].append(name)
    absent = set(missing)
    if lost := [name for names in blocks.values() if absent.issuperset(names) for name in names]:
        more = ", ..." if len(lost) > _NUM_NAMED else ""
        raise ModelError(
            f"{directory}: its weights lack {len(lost)} parameters of layers that config.json asks for "
            f"({', '.join(lost[:_NUM_NAMED])}{more}); give the config.json that belongs to them"
        )


def generate_text(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    options: GenerateOptions,
    on_token: Callable[[int, str], None] | None = None,
    draft_model: Any = None,
) -> list[Generated]:
    """Go on from all prompts at once; one sweep over the weights serves them all. Blocking.

    Args:
        model: a transformers model that generates, streamed or resident.
        tokenizer: its tokenizer; gets a padding token if it has none.
        prompts: texts, in any lengths.
        options: how to choose tokens.
        on_token: called with (prompt number, new text) at each token; never where the model's generation configuration
            asks for a beam search, which settles its text at the end.
        draft_model: from `load_draft`, where the options name one.

    Raises:
        InputError: an empty prompt, or one that is too long for the model: before any weight is used.
    """
    config = model.config.to_dict()
    inputs = encode_prompts(tokenizer, prompts, config)
    prompt_tokens = inputs["input_ids"].shape[1]
    check_context(config, prompt_tokens=prompt_tokens, max_new_tokens=options.max_new_tokens)
    end_ids = _end_ids(model)
    arguments: dict[str, Any] = {
        name: value
        for name in ("temperature", "top_k", "top_p", "repetition_penalty")
        if (value := getattr(options, name)) is not None
    }
    if options.draft == PROMPT_LOOKUP:
        arguments["prompt_lookup_num_tokens"] = DRAFT_TOKENS
    elif draft_model is not None:
        arguments["assistant_model"] = draft_model
    if on_token is not None and (model.generation_config.num_beams or 1) == 1:
        from hermes.tasks.streaming import BatchStreamer

        arguments["streamer"] = BatchStreamer(tokenizer, end_ids, on_token)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    output = model.generate(
        **{name: value.to(model.device) for name, value in inputs.items() if name in ("input_ids", "attention_mask")},
        max_new_tokens=options.max_new_tokens,
        do_sample=options.do_sample,
        num_return_sequences=1,
        return_dict_in_generate=False,
        pad_token_id=tokenizer.pad_token_id,
        **arguments,
    )
    given_tokens = 1 if is_encoder_decoder(config) else prompt_tokens
    results = []
    for prompt, ids in zip(prompts, output[:, given_tokens:].tolist(), strict=True):
        end = next((place + 1 for place, token in enumerate(ids) if token in end_ids), len(ids))
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        results.append(Generated(prompt=prompt, text=text, token_ids=tuple(ids[:end])))
    return results


def load_draft(directory: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> Any:
    """A small model, all of it in memory, that guesses tokens for one with `config`. Blocking.

    Load it before the large one is planned: what it takes then counts as this process's floor. Raises ModelError where
    it cannot be loaded, InputError where it is no decoder or has another vocabulary.
    """
    if (task := task_of(directory)) != "text-generation":
        raise InputError(f"the draft {directory} is a model for {task}; give one for text-generation, or prompt-lookup")
    from transformers import AutoModelForCausalLM

    with lean_imports():
        try:
            draft = AutoModelForCausalLM.from_pretrained(
                str(directory), dtype="auto", trust_remote_code=trust_remote_code, local_files_only=True
            ).eval()
        # Everything: transformers has no error of its own for what is no model.
        except Exception as error:
            raise ModelError(f"{directory}: cannot be the draft: {' '.join(str(error).split())[:300]}") from error
    if draft.config.vocab_size != config.get("vocab_size"):
        raise InputError(
            f"the draft {directory} has a vocabulary of {draft.config.vocab_size}, the model one of "
            f"{config.get('vocab_size')}; use a draft of the same family"
        )
    draft.generation_config.num_assistant_tokens = DRAFT_TOKENS
    draft.generation_config.num_assistant_tokens_schedule = (
        "heuristic"  # more after a good guess, fewer after a bad one
    )
    return draft


def _end_ids(model: Any) -> frozenset[int]:
    ids = model.generation_config.eos_token_id
    return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)
