"""Quantised models: products by the kernels and by floats agree, and streamed ones have the bits of resident ones."""

import json

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional

import hermes
from hermes.checkpoint import open_checkpoint
from hermes.checkpoint.index import Extent, QuantizedTensor, TensorEntry
from hermes.checkpoint.quantize import quantize, quantize_rows
from hermes.checkpoint.quantized import BITS, stored_shapes
from hermes.errors import InputError, ModelError
from hermes.memory.probe import resident_bytes
from hermes.model import quantized
from hermes.model.blocks import LoadFactory
from hermes.model.quantized import MOST_TOKENS, QuantizedMatrix, QuantizedRows
from hermes.model.resident import load_quantized
from hermes.session.quantizable import find_quantizable

SCHEMES = sorted(BITS)
LLAMA = {
    "hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 2, "num_attention_heads": 6,
    "max_position_embeddings": 128, "attention_bias": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def matrix(bits, rows, columns):
    """A quantised matrix, its scales in bf16."""
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator) / 50
    values, scales, *_ = quantize_rows(weight.numpy(), bits)
    scales = torch.from_numpy(scales if bits == 8 else scales.transpose(1, 0, 2).copy()).bfloat16()

    def entry(name, dtype, shape):
        return TensorEntry(name=name, dtype=dtype, shape=tuple(shape), extent=Extent(file=0, offset=0, nbytes=0))

    described = QuantizedTensor(
        bits=bits,
        shape=(rows, columns),
        values=entry("w", "I8" if bits == 8 else "U8", stored_shapes(bits, rows, columns)[0]),
        scales=entry("w.scales", "BF16", scales.shape),
    )
    return QuantizedMatrix(described, torch.from_numpy(values), scales), weight


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(64, 32), (640, 576), (256, 1056), (8192, 224)])
@pytest.mark.parametrize("tokens", [1, 3, 16, 65])
def test_products(bits, shape, tokens):
    quantised, weight = matrix(bits, *shape)
    bias = torch.randn(shape[0])
    x = torch.randn(1, tokens, shape[1])
    floats = quantised.floats()
    assert (floats - weight).norm() / weight.norm() < (0.01 if bits == 8 else 0.1)
    assert torch.equal(quantised.floats(64), floats[64:]) or shape[0] == 64
    expected = functional.linear(x, floats, bias)
    torch.testing.assert_close(quantised.linear(x, bias), expected, rtol=1e-5, atol=1e-5)
    rounded = functional.linear(x.bfloat16().float(), floats, bias.bfloat16().float())
    got = quantised.linear(x.bfloat16(), bias.bfloat16())
    assert got.shape == rounded.shape
    assert (got.float() - rounded).norm() / rounded.norm() < 0.006
    without = quantised.linear(x.half(), None)
    assert (without.float() - functional.linear(x, floats)).norm() / rounded.norm() < 0.002


@pytest.mark.parametrize("bits", [8, 4])
def test_without_a_kernel(bits, monkeypatch):
    """Rows made floats serve every dtype and number of tokens; a kernel of another layout is not used."""
    quantised, _ = matrix(bits, 128, 96)
    x = torch.randn(2, 96).bfloat16()
    assert quantized._kernel_fits(bits) or (bits == 4 and torch.backends.cpu.get_cpu_capability() != "AVX512")
    with_kernel = quantised.linear(x, None)
    quantized._kernel_fits.cache_clear()
    if bits == 8:
        monkeypatch.delattr(torch, "_weight_int8pack_mm")
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        other = type("Ops", (), {"_convert_weight_to_int4pack_for_cpu": staticmethod(lambda *a: packed(*a) ^ 1)})
        monkeypatch.setattr(torch.ops, "aten", other)
    try:
        assert not quantized._kernel_fits(bits)
        without = quantised.linear(x, None)
    finally:
        quantized._kernel_fits.cache_clear()
    assert (with_kernel.float() - without.float()).norm() / without.float().norm() < 0.006


def test_a_matrix_that_is_not_there_is_not_multiplied():
    quantised, _ = matrix(8, 64, 64)
    rows = QuantizedRows(quantised_entry(quantised), 0)
    with pytest.raises(RuntimeError, match="not in memory"):
        rows.linear(torch.zeros(1, 64), None)


def quantised_entry(quantised):
    entry = TensorEntry(name="w", dtype="I8", shape=quantised.shape, extent=Extent(file=0, offset=0, nbytes=0))
    return QuantizedTensor(bits=8, shape=quantised.shape, values=entry, scales=entry)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories: a decoder in bf16 whose head is cut by rows, one with tied embeddings, an encoder in fp32."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, vocab_size=9000)).bfloat16().save_pretrained(root / "llama")
    tied = hf.LlamaConfig(**LLAMA, vocab_size=512, tie_word_embeddings=True)
    hf.LlamaForCausalLM(tied).bfloat16().save_pretrained(root / "tied")
    bert = hf.BertConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=2000,
        max_position_embeddings=128,
    )  # fmt: skip
    hf.BertModel(bert).save_pretrained(root / "bert")
    for name in ("llama", "tied", "bert"):
        for scheme in SCHEMES:
            quantize(root / name, root / f"{name}-{scheme}", scheme, find_quantizable(root / name).matrices)
    return root


def resident(auto_class, directory, dtype=None):
    return load_quantized(auto_class, directory, open_checkpoint(directory), dtype=dtype, trust_remote_code=False)


def streamed(directory, kept, **options):
    return hermes.load(directory, budget=resident_bytes() + 600 * 2**20, resident_bytes=kept, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kept", [0, None])
@pytest.mark.parametrize(("name", "length"), [("llama", 7), ("llama", MOST_TOKENS[4] + 6), ("tied", 7)])
def test_generation(models, scheme, kept, length, name):
    directory = models / f"{name}-{scheme}"
    ids = torch.arange(3, 3 + length)[None]
    expected = resident(hf.AutoModelForCausalLM, directory).generate(
        ids, max_new_tokens=12, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    with streamed(directory, kept, sequence_length=length) as model:
        got = model.generate(ids, max_new_tokens=12, do_sample=False, output_scores=True, return_dict_in_generate=True)
        assert torch.equal(got.sequences, expected.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.scores, expected.scores, strict=True))
        prepared = model.hermes.prepared
    blocks, _ = prepared.blocks(prepared.factory(4096, 2**20), "leaf")
    rows = [name for block in blocks for name, of in block.matrices.items() if isinstance(of, QuantizedRows)]
    assert len(rows) == 2 * 7


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kept", [0, None])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_encoding(models, scheme, kept, dtype):
    directory = models / f"bert-{scheme}"
    for length in (9, 100):
        ids = torch.arange(3, 3 + length)[None]
        with torch.no_grad():
            expected = resident(hf.AutoModel, directory, dtype)(ids).last_hidden_state
            with streamed(directory, kept, sequence_length=length, dtype=dtype) as model:
                for _ in range(2):
                    assert torch.equal(model(ids).last_hidden_state, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_close_to_full_precision(models, scheme):
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        full = hf.AutoModel.from_pretrained(models / "bert")(ids).last_hidden_state
        got = resident(hf.AutoModel, models / f"bert-{scheme}")(ids).last_hidden_state
    assert 0 < (got - full).norm() / full.norm() < (0.02 if scheme == "int8" else 0.2)


def test_what_is_quantised(models):
    """Every linear layer but the heads."""
    for name in ("llama", "tied"):
        found = find_quantizable(models / name)
        assert len(found.matrices) == 2 * 7
        assert found.left == {"vocabulary head": 1}
    assert len(find_quantizable(models / "bert").matrices) == 2 * 6 + 1


def test_shapes_that_do_not_divide(tmp_path):
    config = hf.LlamaConfig(**{**LLAMA, "intermediate_size": 550}, vocab_size=512)
    hf.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "odd")
    found = find_quantizable(tmp_path / "odd")
    assert found.left == {"vocabulary head": 1, "rows no multiple of 64 or columns of 32": 2 * 3}
    quantize(tmp_path / "odd", tmp_path / "out", "int4", found.matrices)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad(), streamed(tmp_path / "out", 0, sequence_length=9, max_new_tokens=1) as model:
        assert torch.equal(model(ids).logits, resident(hf.AutoModelForCausalLM, tmp_path / "out")(ids).logits)


def test_nothing_to_quantise(tmp_path):
    config = hf.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=500, n_positions=64)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no matrix can be quantised: vocabulary head"):
        find_quantizable(tmp_path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_matrix_that_is_used_elsewhere_is_made_floats(models, scheme):
    directory = models / f"llama-{scheme}"
    plain = resident(hf.AutoModelForCausalLM, directory).model.layers[0].mlp.up_proj.weight * 1
    with streamed(directory, None, sequence_length=8) as model:
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight * 1, plain)
    full = hf.LlamaForCausalLM.from_pretrained(models / "llama").model.layers[0].mlp.up_proj.weight
    assert 0 < (plain.float() - full.float()).norm() / full.float().norm() < 0.1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plain_module(scheme, tmp_path):
    """From a state-dict file alone: it says itself what is quantised."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 64))
    (tmp_path / "net").mkdir()
    from safetensors.torch import save_file

    save_file(net.state_dict(), tmp_path / "net" / "model.safetensors")
    (tmp_path / "net" / "config.json").write_text("{}")
    quantize(tmp_path / "net", tmp_path / "out", scheme, ["0.weight", "2.weight"])
    x = torch.randn(3, 192)
    expected = net(x)
    with hermes.stream(net, tmp_path / "out" / "model.safetensors", resident_bytes() + 200 * 2**20) as model:
        got = model(x)
    assert 0 < (got - expected).norm() / expected.norm() < (0.02 if scheme == "int8" else 0.2)


def test_a_merged_matrix_is_refused(tmp_path):
    """Experts are stacked into one parameter: what says that one of them is quantised was not made by this program."""
    config = hf.MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=2, vocab_size=500,
    )  # fmt: skip
    hf.MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    names = [name for name in open_checkpoint(tmp_path / "experts").tensors if "experts.0.w1" in name]
    assert names
    assert not set(names) & set(find_quantizable(tmp_path / "experts").matrices)
    quantize(tmp_path / "experts", tmp_path / "out", "int8", names)
    with pytest.raises(ModelError, match="cannot be merged"):
        streamed(tmp_path / "out", None)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_plain_transformers_refuses_it(models, scheme):
    assert (
        json.loads((models / f"bert-{scheme}" / "config.json").read_text())["quantization_config"]["bits"]
        == BITS[scheme]
    )
    with pytest.raises(RuntimeError, match="mismatch"):
        hf.AutoModel.from_pretrained(models / f"bert-{scheme}")


def test_loads_are_what_is_stored(models):
    """Blocks are planned with the bytes of values and scales."""
    with streamed(models / "llama-int4", 0, sequence_length=8) as model:
        prepared = model.hermes.prepared
        factory: LoadFactory = prepared.factory(4096, 2**20)
        unit = next(unit for unit in prepared.partition.units if unit.module.endswith("up_proj"))
        assert sum(load.nbytes for load in factory.block([unit]).loads) == 576 * 192 * 5 // 8
        assert prepared.sample(unit).nbytes == 576 * 192 * 5 // 8
