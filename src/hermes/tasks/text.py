"""From texts to token ids: the tokenizer beside the weights, and batches of one length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hermes.errors import InputError
from hermes.model.lean import lean_imports

__all__ = ["encode_texts", "load_tokenizer"]


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that the directory holds. Raises InputError where there is none that can be used."""
    try:
        with lean_imports():  # some models' tokenizers are looked for in their configuration, whose module imports much
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                str(directory),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                clean_up_tokenization_spaces=False,
            )
    # Everything: each tokenizer class fails in its own way (missing files, missing packages, unknown names).
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{directory}: no tokenizer that can be used: {reason}") from error
    # Without any file of one, some classes come up with an empty vocabulary instead of an error.
    if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_ids)):
        raise InputError(
            f"{directory}: no tokenizer that can be used: it has no vocabulary; is tokenizer.json missing?"
        )
    return tokenizer


def encode_texts(
    tokenizer: Any, texts: Sequence[str], *, padding_side: str, max_tokens: int | None = None
) -> dict[str, torch.Tensor]:
    """Model inputs [text, token], padded to the longest; truncated to `max_tokens` where that is given.

    Padding is the tokenizer's own, else the end-of-text token: the attention mask hides it.

    Raises:
        InputError: no text, a text that is no UTF-8 or of no tokens, or several texts and nothing to pad with.
    """
    if not texts:
        raise InputError("there is nothing to read: no text was given")
    for number, text in enumerate(texts, 1):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text {number} of {len(texts)} is no UTF-8: character {error.start + 1} is {text[error.start]!r}; "
                "give whole characters"
            ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None and len(texts) > 1:
            raise InputError("this tokenizer has no padding token: give one text at a time")
        tokenizer.pad_token = tokenizer.eos_token
    lengths = [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    if 0 in lengths:
        raise InputError(
            f"text {lengths.index(0) + 1} of {len(lengths)} is empty; a model needs one token to go on from"
        )
    cut = max_tokens is not None and max(lengths) > max_tokens
    encoded = tokenizer(
        list(texts),
        padding=len(set(lengths)) > 1,
        padding_side=padding_side,
        truncation=cut,
        max_length=max_tokens if cut else None,
        return_tensors="pt",
        verbose=False,
    )
    return dict(encoded)
