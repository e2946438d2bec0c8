"""Texts to vectors: one forward pass of an encoder, then its hidden states pooled over the tokens that are real."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hermes.errors import InputError
from hermes.model.inputs import moved
from hermes.tasks.detect import context_tokens, is_encoder_decoder, read_settings
from hermes.tasks.text import encode_texts

__all__ = ["POOLS", "embed_texts", "encode_for_embedding", "pool_of"]

POOLS = ("mean", "cls", "last", "max", "none")

#: sentence-transformers' names in 1_Pooling/config.json.
_POOLING_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


def pool_of(directory: Path) -> str:
    """The pooling that a sentence encoder was trained with, as its directory says; "mean" where it does not."""
    settings = read_settings(directory / "1_Pooling" / "config.json") or {}
    return next((pool for mode, pool in _POOLING_MODES.items() if settings.get(mode)), "mean")


def encode_for_embedding(tokenizer: Any, texts: Sequence[str], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Inputs [text, token], padded on the right, cut to what the model has positions for. Raises InputError."""
    if is_encoder_decoder(config):
        raise InputError("embeddings need a model with one input; this is an encoder-decoder, try --prompt")
    limits = [limit for limit in (context_tokens(config), tokenizer.model_max_length) if limit and limit < 2**31]
    return encode_texts(tokenizer, texts, padding_side="right", max_tokens=min(limits, default=None))


def embed_texts(
    model: Any, tokenizer: Any, texts: Sequence[str], *, pool: str = "mean", normalise: bool = False
) -> list[torch.Tensor]:
    """A vector in float32 for each text, in order; all texts in one sweep over the weights. Blocking.

    Args:
        model: a transformers model without a head (AutoModel), streamed or resident.
        tokenizer: its tokenizer.
        texts: longer ones are cut at the model's longest sequence.
        pool: "mean" or "max" over tokens, the first ("cls") or the "last"; "none" gives a row for each token instead.
        normalise: scale each vector to length one.

    Raises:
        InputError: an empty text, an unknown pool, or a model without hidden states.
    """
    if pool not in POOLS:
        raise InputError(f"unknown pool {pool!r}; choose from {', '.join(POOLS)}")
    inputs = moved(encode_for_embedding(tokenizer, texts, model.config.to_dict()), model.device)
    with torch.no_grad():
        hidden = getattr(model(**inputs), "last_hidden_state", None)
    if hidden is None:
        raise InputError(f"{type(model).__name__} gives no hidden states to pool; use its base model (AutoModel)")
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    vectors = [_pooled(rows[keep].float(), pool) for rows, keep in zip(hidden, mask, strict=True)]
    return [torch.nn.functional.normalize(vector, dim=-1) for vector in vectors] if normalise else vectors


def _pooled(rows: torch.Tensor, pool: str) -> torch.Tensor:
    """[token, width] of one text's real tokens to [width]; "none" keeps them."""
    match pool:
        case "mean":
            return rows.mean(dim=0)
        case "max":
            return rows.amax(dim=0)
        case "cls":
            return rows[0].clone()
        case "last":
            return rows[-1].clone()
        case _:
            return rows
