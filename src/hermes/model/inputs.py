"""Shapes of a model's inputs: made up for tracing and profiling it, or read off a call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

__all__ = [
    "PassShape",
    "example_inputs",
    "max_length",
    "moved",
    "pass_shape",
    "vocabulary_size",
]


_TEXT_INPUTS = ("decoder_input_ids", "input_ids", "inputs_embeds")


@dataclass(frozen=True, kw_only=True, slots=True)
class PassShape:
    """How much one forward pass is given.

    Attributes:
        batch_size: sequences or images.
        tokens: of each sequence, in this pass; None for what has none.
        past_tokens: of each, in its key-value cache.
        all_logits: scores are computed for every token, not for the last alone.
    """

    batch_size: int
    tokens: int | None
    past_tokens: int = 0
    all_logits: bool = False


def pass_shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> PassShape | None:
    """The shape of a transformers model's forward call; None where no tensor among its inputs tells."""
    text = next((kwargs[name] for name in _TEXT_INPUTS if isinstance(kwargs.get(name), torch.Tensor)), None)
    found = text if text is not None else next((a for a in (*args, *kwargs.values()) if torch.is_tensor(a)), None)
    if found is None or found.ndim < 1:
        return None
    is_text = text is not None or (found.ndim == 2 and not found.is_floating_point())
    cache = kwargs.get("past_key_values")
    return PassShape(
        batch_size=found.shape[0],
        tokens=found.shape[1] if is_text and found.ndim > 1 else None,
        past_tokens=int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0,
        all_logits=not kwargs.get("logits_to_keep"),
    )


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


def moved(inputs: Any, device: torch.device) -> Any:
    """Arguments of a call with every tensor in them on a device, but such as have no values."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor if tensor.is_meta else tensor.to(device), inputs)
