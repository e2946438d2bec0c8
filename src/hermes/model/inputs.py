"""Inputs of the right shape for tracing and profiling a model: zeros, or ones where zero is not allowed."""

from typing import Any

import torch
from torch import nn

__all__ = ["example_inputs", "max_length", "vocabulary_size"]


def example_inputs(model: nn.Module, *, batch_size: int, sequence_length: int) -> dict[str, Any] | None:
    """Keyword arguments for one forward pass of a transformers model; None where its inputs cannot be guessed.

    Text: `input_ids` and `attention_mask` [batch, sequence]. Images: `pixel_values` [batch, channels, height, width]
    from the configuration. Speech: `input_features` [batch, mel bins, frames]. Encoder-decoders get one decoder token.
    """
    config = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if config is None or name is None:
        return None
    inputs: dict[str, Any] = {}
    text = torch.ones(batch_size, sequence_length, dtype=torch.long)
    if name == "input_ids":
        inputs["input_ids"] = text
        inputs["attention_mask"] = torch.ones_like(text)
    vision = getattr(config, "vision_config", config)
    if name == "pixel_values" or getattr(config, "vision_config", None) is not None:
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        inputs["pixel_values"] = torch.zeros(batch_size, getattr(vision, "num_channels", 3), height, width, dtype=dtype)
    elif name == "input_features":
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        frames = 2 * getattr(config, "max_source_positions", 1500)
        inputs["input_features"] = torch.zeros(batch_size, getattr(config, "num_mel_bins", 80), frames, dtype=dtype)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.ones(batch_size, 1, dtype=torch.long)
    return inputs or None


def max_length(model: nn.Module) -> int | None:
    """Longest sequence the model's configuration allows, in tokens; None if it does not say."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the vocabulary; 0 where there is none."""
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None)
    return int(getattr(config, "vocab_size", 0) or getattr(text, "vocab_size", 0) or 0)
