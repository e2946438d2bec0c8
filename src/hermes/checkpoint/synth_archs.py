"""The architectures `synth` knows: configurations as published, and the names and shapes their checkpoints hold.

Names are those of the published files, not of transformers' modules: GPT-2's carry no `transformer.` prefix, BERT's
come from the pre-training model and hold a pooler and a second head that most uses leave alone. Tied weights are
stored once. Values are in `synth_weights`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["ARCHS", "Arch"]

Config = dict[str, Any]
Tensors = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Arch:
    """One architecture: its config.json and the dtype it is published in."""

    config: Config
    dtype: str

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of every stored tensor, in model order."""
        return list(_TENSORS[self.config["model_type"]](self.config))


def _linear(name: str, num_outputs: int, num_inputs: int, *, bias: bool = True) -> Tensors:
    yield f"{name}.weight", (num_outputs, num_inputs)
    if bias:
        yield f"{name}.bias", (num_outputs,)


def _norm(name: str, width: int) -> Tensors:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _bert(c: Config) -> Tensors:
    width, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    yield "bert.embeddings.word_embeddings.weight", (vocab, width)
    yield "bert.embeddings.position_embeddings.weight", (c["max_position_embeddings"], width)
    yield "bert.embeddings.token_type_embeddings.weight", (c["type_vocab_size"], width)
    yield from _norm("bert.embeddings.LayerNorm", width)
    for i in range(c["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            yield from _linear(f"{layer}.attention.self.{part}", width, width)
        yield from _linear(f"{layer}.attention.output.dense", width, width)
        yield from _norm(f"{layer}.attention.output.LayerNorm", width)
        yield from _linear(f"{layer}.intermediate.dense", inner, width)
        yield from _linear(f"{layer}.output.dense", width, inner)
        yield from _norm(f"{layer}.output.LayerNorm", width)
    yield from _linear("bert.pooler.dense", width, width)
    yield "cls.predictions.bias", (vocab,)
    yield from _linear("cls.predictions.transform.dense", width, width)
    yield from _norm("cls.predictions.transform.LayerNorm", width)
    yield from _linear("cls.seq_relationship", 2, width)


def _vit(c: Config) -> Tensors:
    width, inner, patch = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    yield "vit.embeddings.cls_token", (1, 1, width)
    yield "vit.embeddings.position_embeddings", (1, (c["image_size"] // patch) ** 2 + 1, width)
    yield "vit.embeddings.patch_embeddings.projection.weight", (width, c["num_channels"], patch, patch)
    yield "vit.embeddings.patch_embeddings.projection.bias", (width,)
    for i in range(c["num_hidden_layers"]):
        layer = f"vit.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            yield from _linear(f"{layer}.attention.attention.{part}", width, width)
        yield from _linear(f"{layer}.attention.output.dense", width, width)
        yield from _linear(f"{layer}.intermediate.dense", inner, width)
        yield from _linear(f"{layer}.output.dense", width, inner)
        yield from _norm(f"{layer}.layernorm_before", width)
        yield from _norm(f"{layer}.layernorm_after", width)
    yield from _norm("vit.layernorm", width)
    yield from _linear("classifier", len(c["id2label"]), width)


def _gpt2(c: Config) -> Tensors:
    width = c["n_embd"]
    yield "wte.weight", (c["vocab_size"], width)
    yield "wpe.weight", (c["n_positions"], width)
    for i in range(c["n_layer"]):
        yield from _norm(f"h.{i}.ln_1", width)
        # Conv1D keeps its weight as (inputs, outputs)
        for name, num_inputs, num_outputs in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            if name == "mlp.c_fc":
                yield from _norm(f"h.{i}.ln_2", width)
            yield f"h.{i}.{name}.weight", (num_inputs, num_outputs)
            yield f"h.{i}.{name}.bias", (num_outputs,)
    yield from _norm("ln_f", width)


def _gptj(c: Config) -> Tensors:
    width, vocab = c["n_embd"], c["vocab_size"]
    yield "transformer.wte.weight", (vocab, width)
    for i in range(c["n_layer"]):
        layer = f"transformer.h.{i}"
        yield from _norm(f"{layer}.ln_1", width)
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{layer}.attn.{part}", width, width, bias=False)
        yield from _linear(f"{layer}.mlp.fc_in", 4 * width, width)
        yield from _linear(f"{layer}.mlp.fc_out", width, 4 * width)
    yield from _norm("transformer.ln_f", width)
    yield from _linear("lm_head", vocab, width)


def _llama(c: Config) -> Tensors:
    width, inner = c["hidden_size"], c["intermediate_size"]
    queries, keys = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    yield "model.embed_tokens.weight", (c["vocab_size"], width)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (width,)
        yield from _linear(f"{layer}.self_attn.q_proj", queries, width, bias=False)
        yield from _linear(f"{layer}.self_attn.k_proj", keys, width, bias=False)
        yield from _linear(f"{layer}.self_attn.v_proj", keys, width, bias=False)
        yield from _linear(f"{layer}.self_attn.o_proj", width, queries, bias=False)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
        yield from _linear(f"{layer}.mlp.gate_proj", inner, width, bias=False)
        yield from _linear(f"{layer}.mlp.up_proj", inner, width, bias=False)
        yield from _linear(f"{layer}.mlp.down_proj", width, inner, bias=False)
    yield "model.norm.weight", (width,)


_TENSORS: Mapping[str, Callable[[Config], Tensors]] = {
    "bert": _bert, "vit": _vit, "gpt2": _gpt2, "gptj": _gptj, "llama": _llama,
}  # fmt: skip


def _labels(num_labels: int) -> Config:
    names = [f"LABEL_{i}" for i in range(num_labels)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


_BERT: Config = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
_VIT: Config = {
    "architectures": ["ViTForImageClassification"],
    "attention_probs_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 1024,
    "image_size": 224,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-12,
    "model_type": "vit",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": 16,
    "qkv_bias": True,
    **_labels(1000),
}
_GPT2: Config = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 1024,
    "n_head": 16,
    "n_layer": 24,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "vocab_size": 50257,
}
_GPTJ: Config = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 50400,
}
_LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 128256,
}

_TINY_HIDDEN: Config = {
    "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3,
}  # fmt: skip
_TINY_N: Config = {
    "n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 128, "vocab_size": 512, "bos_token_id": 511,
    "eos_token_id": 511,
}  # fmt: skip
_TINY_LLAMA: Config = {
    **_TINY_HIDDEN, "head_dim": 16, "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 512,
    "bos_token_id": 510, "eos_token_id": 511,
}  # fmt: skip

#: By name, as `hermes synth` takes it.
ARCHS: Mapping[str, Arch] = MappingProxyType({
    "bert-large": Arch(config=_BERT, dtype="float32"),
    "vit-large": Arch(config=_VIT, dtype="float32"),
    "gpt2-medium": Arch(config=_GPT2, dtype="float32"),
    "gpt-j-6b": Arch(config=_GPTJ, dtype="bfloat16"),
    "llama-3b": Arch(config=_LLAMA, dtype="bfloat16"),
    "tiny-bert": Arch(
        config=_BERT | _TINY_HIDDEN | {"max_position_embeddings": 128, "vocab_size": 512}, dtype="float32"
    ),
    "tiny-vit": Arch(config=_VIT | _TINY_HIDDEN | {"image_size": 32, "patch_size": 8} | _labels(10), dtype="float32"),
    "tiny-gpt2": Arch(config=_GPT2 | _TINY_N | {"n_ctx": 128}, dtype="float32"),
    "tiny-gpt-j": Arch(config=_GPTJ | _TINY_N | {"rotary_dim": 8}, dtype="float32"),
    "tiny-llama": Arch(config=_LLAMA | _TINY_LLAMA, dtype="float32"),
})  # fmt: skip
