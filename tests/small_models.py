"""Small models of every family, with inputs for them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from hermes.model.trace import tensors_in

IDS = torch.tensor([[5, 9, 17, 33, 2, 8, 101, 77]])
PIXELS = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
TEXT = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Family:
    model: type
    config: Any
    inputs: dict[str, Any] = field(default_factory=lambda: {"input_ids": IDS})
    generates: bool = False


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TALL = {**SMALL, "num_hidden_layers": 3}
TINY_IMAGE = {"image_size": 32, "patch_size": 8}
LLAMA = {**TALL, "num_key_value_heads": 2, "max_position_embeddings": 128, **TEXT}
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, **TEXT}
EXPERTS = {
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_experts_per_tok": 2,
}
SPEECH = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "max_target_positions": 64,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "decoder_start_token_id": 1,
}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
FAMILIES = {
    "bert": Family(hf.BertModel, hf.BertConfig(**TALL, **TEXT)),
    "bert-mlm": Family(hf.BertForMaskedLM, hf.BertConfig(**SMALL, **TEXT)),
    "vit": Family(hf.ViTForImageClassification, hf.ViTConfig(**TALL, **TINY_IMAGE), {"pixel_values": PIXELS}),
    "gpt2": Family(hf.GPT2LMHeadModel, hf.GPT2Config(**GPT), generates=True),
    "gpt-j": Family(hf.GPTJForCausalLM, hf.GPTJConfig(**GPT, rotary_dim=8), generates=True),
    "llama": Family(hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA), generates=True),
    "qwen2": Family(hf.Qwen2ForCausalLM, hf.Qwen2Config(**LLAMA, tie_word_embeddings=True), generates=True),
    "qwen3": Family(hf.Qwen3ForCausalLM, hf.Qwen3Config(**LLAMA, head_dim=16), generates=True),
    "mixtral": Family(hf.MixtralForCausalLM, hf.MixtralConfig(**LLAMA, num_local_experts=4), generates=True),
    "qwen2-moe": Family(hf.Qwen2MoeForCausalLM, hf.Qwen2MoeConfig(**LLAMA, **EXPERTS), generates=True),
    "t5": Family(
        hf.T5ForConditionalGeneration,
        hf.T5Config(**T5, vocab_size=300, decoder_start_token_id=0),
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]},
        generates=True,
    ),
    "whisper": Family(
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(**SPEECH, **TEXT),
        {"input_features": torch.linspace(-1, 1, 16 * 100).view(1, 16, 100), "decoder_input_ids": IDS[:, :3]},
    ),
    "clip": Family(
        hf.CLIPModel,
        hf.CLIPConfig(text_config={**SMALL, **TEXT}, vision_config={**SMALL, **TINY_IMAGE}, projection_dim=32),
        {"input_ids": IDS, "pixel_values": PIXELS},
    ),
    "resnet": Family(
        hf.ResNetForImageClassification,
        hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic"),
        {"pixel_values": PIXELS},
    ),
}


def save_families(root: Path, names: list[str] | None = None) -> dict[str, Path]:
    """Each one's directory, as fp32."""
    paths = {}
    for name in names or FAMILIES:
        family = FAMILIES[name]
        torch.manual_seed(0)
        model = family.model(family.config).eval()
        for parameter in model.parameters():  # norms at one and biases at zero would hide a mix-up
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(root / name)
        paths[name] = root / name
    return paths


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def bits(output: Any) -> list[torch.Tensor]:
    return [tensor.view(torch.uint8) if tensor.is_floating_point() else tensor for tensor in tensors_in(output)]
