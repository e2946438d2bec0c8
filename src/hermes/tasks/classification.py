"""Labels for images: the image processor beside the weights (of the Pillow kind: no torchvision), and one pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hermes.errors import InputError
from hermes.model.lean import lean_imports

__all__ = ["Label", "classify_images", "prepare_images"]


@dataclass(frozen=True, kw_only=True)
class Label:
    """One class that an image may be of, and how sure the model is, from 0 to 1."""

    label: str
    score: float


def prepare_images(directory: Path, images: Sequence[Any]) -> torch.Tensor:
    """Pillow images as pixels [image, channel, height, width] in float32, prepared as the model's directory says.

    Raises InputError where the directory has no image processor that can be used.
    """
    try:
        with lean_imports():
            from transformers import AutoImageProcessor

            processor = AutoImageProcessor.from_pretrained(str(directory), backend="pil", local_files_only=True)
        pixels: torch.Tensor = processor(list(images), return_tensors="pt")["pixel_values"]
    # Everything: each processor fails in its own way (missing files, missing packages, unknown names).
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{directory}: no image processor that can be used: {reason}") from error
    return pixels


def classify_images(model: Any, pixels: torch.Tensor, *, top_k: int = 5) -> list[list[Label]]:
    """The `top_k` likeliest labels of each image, best first; all images in one sweep over the weights. Blocking.

    Args:
        model: a transformers model for image classification, streamed or resident.
        pixels: what `prepare_images` made.
        top_k: labels for each image; fewer where the model knows fewer.

    Raises:
        InputError: the model gives no scores.
    """
    with torch.no_grad():
        logits = getattr(model(pixel_values=pixels.to(model.device, model.dtype)), "logits", None)
    if logits is None:
        raise InputError(f"{type(model).__name__} gives no scores for labels; it is not an image classifier")
    names = model.config.id2label
    scores, indices = logits.float().softmax(dim=-1).topk(min(top_k, logits.shape[-1]))
    return [
        [Label(label=str(names.get(index, index)), score=score) for score, index in zip(row, places, strict=True)]
        for row, places in zip(scores.tolist(), indices.tolist(), strict=True)
    ]
