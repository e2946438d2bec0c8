"""llama.cpp with mmap, through llama-cpp-python built for this machine, on a GGUF of the same bf16 weights.

    python llamacpp.py MODEL [--convert]

`--convert` writes MODEL.gguf (not timed) and ends. Only Llama's architecture; tokens go in as numbers.
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import numpy as np
from work import NEW_TOKENS, PROMPT_TOKENS, Work, report


def convert(model: Path, target: Path) -> None:
    """What convert_hf_to_gguf.py writes for a Llama, without a vocabulary."""
    import gguf
    import safetensors
    import torch

    config = json.loads((model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for number in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{number}.{a}.weight": f"blk.{number}.{b}.weight" for a, b in parts.items()}
    handles = [safetensors.safe_open(file, framework="pt") for file in sorted(model.glob("*.safetensors"))]
    entries = [(name, handle) for handle in handles for name in handle.keys()]
    read = []
    for name, handle in entries:
        shape = list(handle.get_slice(name).get_shape())
        exact = len(shape) == 1  # norms are kept in fp32
        kind = gguf.GGMLQuantizationType.F32 if exact else gguf.GGMLQuantizationType.BF16
        size = int(np.prod(shape)) * (4 if exact else 2)
        dtype = np.dtype(np.float32) if exact else np.dtype(np.uint8)
        writer.add_tensor_info(names[name], shape if exact else [*shape[:-1], shape[-1] * 2], dtype, size, kind)
        read.append((name, handle, exact))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, handle, exact in read:
        tensor = handle.get_tensor(name)
        if exact:
            writer.write_tensor_data(tensor.float().numpy())
            continue
        n = heads if "q_proj" in name else kv_heads if "k_proj" in name else 0
        if n:  # llama.cpp rotates neighbouring pairs, transformers halves
            rows, columns = tensor.shape
            tensor = tensor.view(n, 2, rows // n // 2, columns).transpose(1, 2).reshape(rows, columns)
        writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
    writer.close()


def main() -> None:
    model = Path(sys.argv[1])
    file = model.with_name(f"{model.name}.gguf")
    if "--convert" in sys.argv:
        convert(model, file)
        return
    import llama_cpp as ll

    work = Work(model)
    ll.llama_backend_init()
    start = time.perf_counter()
    parameters = ll.llama_model_default_params()
    parameters.use_mmap = True
    loaded = ll.llama_model_load_from_file(str(file).encode(), parameters)
    settings = ll.llama_context_default_params()
    settings.n_ctx, settings.n_batch = 128, 128
    settings.n_threads = settings.n_threads_batch = len(__import__("os").sched_getaffinity(0))
    context = ll.llama_init_from_model(loaded, settings)
    vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(loaded))
    load_seconds = time.perf_counter() - start
    tokens = list(range(100, 100 + PROMPT_TOKENS))
    pass_seconds, made = [], []
    for _ in range(NEW_TOKENS):
        begun = time.perf_counter()
        array = (ll.llama_token * len(tokens))(*tokens)
        assert ll.llama_decode(context, ll.llama_batch_get_one(array, len(tokens))) == 0
        scores = np.ctypeslib.as_array(
            ctypes.cast(ll.llama_get_logits_ith(context, -1), ctypes.POINTER(ctypes.c_float)), (vocabulary,)
        )
        tokens = [int(scores.argmax())]
        made += tokens
        pass_seconds.append(time.perf_counter() - begun)
    report(work, load_seconds=load_seconds, pass_seconds=pass_seconds, tokens=made)


main()
