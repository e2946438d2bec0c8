"""What a checkpoint is for, from its config.json alone: nothing is imported, nothing of the model is built."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hermes.errors import ModelError

__all__ = ["TASKS", "context_tokens", "is_encoder_decoder", "num_beams", "read_config", "read_settings", "task_of"]

TASKS = ("text-generation", "text2text-generation", "feature-extraction", "image-classification")
"""What `hermes run` can do; the names are those of transformers' pipelines."""

#: Families whose positions start behind the padding token's: that many of `max_position_embeddings` are never used.
_OFFSET_FAMILIES = {"camembert", "data2vec-text", "longformer", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"}


def read_config(directory: Path) -> dict[str, Any]:
    """The model's config.json. Raises ModelError when it is missing, is not JSON, or names no architecture properly."""
    path = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(
            f"{directory} is a weight file without a configuration; give the model's directory, or use hermes.stream() "
            "with a module of your own"
        )
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing; a model's directory holds one beside its weights") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ModelError(f"{path}: architectures is {str(names)[:40]}, not a list of class names; download it again")
    return config


def read_settings(path: Path) -> dict[str, Any] | None:
    """A JSON object that may lie beside the weights; None where there is no such, or it cannot be read."""
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def task_of(directory: Path) -> str:
    """One of TASKS, by the architecture that the configuration names. Raises ModelError as `read_config` does."""
    config = read_config(directory)
    architecture = (config.get("architectures") or [""])[0]
    if is_encoder_decoder(config):
        return "text2text-generation"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "text-generation"
    if architecture.endswith("ForImageClassification"):
        return "image-classification"
    return "feature-extraction"


def is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """An encoder-decoder that takes text; the speech ones are named otherwise."""
    names = config.get("architectures") or []
    is_text = not any("Speech" in name or "Whisper" in name for name in names)
    # T5 configurations of old leave the flag out: their class's default is True.
    flag = config.get("is_encoder_decoder", str(config.get("model_type")) in ("t5", "mt5", "umt5"))
    return bool(flag) and is_text


def context_tokens(config: Mapping[str, Any]) -> int | None:
    """Longest sequence the model has positions for; None where it does not say or positions are relative."""
    if config.get("relative_attention_num_buckets") or config.get("alibi"):
        return None
    inner = config.get("text_config")
    for table in (config, inner if isinstance(inner, Mapping) else {}):
        for name in ("max_position_embeddings", "n_positions"):
            value = table.get(name)
            if isinstance(value, int) and value > 0:
                padding = table.get("pad_token_id")
                unused = padding + 1 if isinstance(padding, int) else 1
                return value - unused if str(table.get("model_type")) in _OFFSET_FAMILIES else value
    return None


def num_beams(directory: Path) -> int:
    """Sequences that `generate` follows for each prompt; 1 is no search.

    As generation_config.json says, or config.json where there is none.
    """
    settings = read_settings(directory / "generation_config.json")
    count = (read_config(directory) if settings is None else settings).get("num_beams")
    return count if isinstance(count, int) and count > 1 else 1
