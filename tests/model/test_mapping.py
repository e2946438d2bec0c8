"""Which bytes make which parameter: runs, transformers' conversions, prefixes, and what does not fit."""

import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import conversion_mapping, initialization
from transformers import core_model_loading as loading

from hermes.checkpoint.open import open_checkpoint
from hermes.errors import ModelError
from hermes.model.blocks import torch_dtype
from hermes.model.mapping import map_weights
from hermes.model.runs import Rearranged, Runs

SIZES = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64}


def _read(checkpoint, source):
    """A source's flat values, with plain reads."""
    read = bytearray()
    for extent in source.extents:
        with open(checkpoint.files[extent.file].path, "rb") as file:
            file.seek(extent.offset)
            read += file.read(extent.nbytes)
    flat = torch.frombuffer(read, dtype=torch_dtype(source.dtype))
    if source.convert is None:
        return flat
    parts = flat.split([math.prod(shape) for shape in source.shapes])
    return source.convert([part.view(shape) for part, shape in zip(parts, source.shapes, strict=True)]).flatten()


def _assert_loads(module, checkpoint, state):
    """Every source is the tensor that transformers (or torch) loads."""
    weights = map_weights(module, checkpoint)
    assert weights.sources
    for name, source in weights.sources.items():
        assert torch.equal(_read(checkpoint, source), state[name].detach().flatten()), name
    return weights


@pytest.fixture
def llama(tmp_path):
    """Saves a tiny Llama (or a cousin) with its tensors changed; gives its directory."""

    def save(change=lambda state: state, model_class=transformers.LlamaForCausalLM, **sizes):
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**SIZES | sizes))
        model.save_pretrained(tmp_path)
        state = change(load_file(tmp_path / "model.safetensors"))
        save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    return save


@pytest.fixture
def rules(monkeypatch):
    """Gives a model class conversions of our choice, for transformers and for us."""

    def use(*conversions, name="LlamaForCausalLM"):
        conversion_mapping.get_checkpoint_conversion_mapping(name)  # fills the table
        monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, name, list(conversions))

    return use


def _qkv(cut):
    def change(state):
        for layer in range(2):
            at = f"model.layers.{layer}.self_attn."
            state[f"{at}qkv.weight"] = cut([state.pop(f"{at}{name}_proj.weight") for name in "qkv"])
        return state

    return change


def _each(name, cut):
    """Replace every tensor `name` by `cut`'s dict of suffix to tensor."""

    def change(state):
        for key in [key for key in state if key.endswith(name)]:
            for new, tensor in cut(state.pop(key)).items():
                state[key.removesuffix(name) + new] = tensor
        return state

    return change


TARGETS = [f"self_attn.{name}_proj.weight" for name in "qkv"]
OUT, UP = "self_attn.o_proj.weight", "mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("sources", "targets", "operations", "change", "converted"),
    [
        ("self_attn.qkv.weight", TARGETS, [loading.Chunk(0)], _qkv(torch.cat), 0),
        ("self_attn.qkv.weight", TARGETS, [loading.Split(0)], _qkv(torch.cat), 0),
        ("self_attn.qkv.weight", TARGETS, [loading.Chunk(1)], _qkv(lambda parts: torch.cat(parts, 1)), 6),
        (
            "self_attn.qkv.weight",
            TARGETS,
            [loading.Chunk(0), loading.PermuteForRope(permute_layer_names=["q_proj", "k_proj"])],
            _qkv(torch.cat),
            6,
        ),
        (["o_a", "o_b"], OUT, [loading.Concatenate(0)], _each(OUT, lambda t: {"o_a": t[:5], "o_b": t[5:]}), 0),
        (["o_b", "o_a"], OUT, [loading.Concatenate(0)], _each(OUT, lambda t: {"o_a": t[5:], "o_b": t[:5]}), 0),
        (["o_a", "o_b"], OUT, [loading.Concatenate(1)], _each(OUT, lambda t: {"o_a": t[:, :5], "o_b": t[:, 5:]}), 2),
        (
            "o_parts.*.w",
            OUT,
            [loading.MergeModulelist(0)],
            _each(OUT, lambda t: {f"o_parts.{i}.w": t[i] for i in range(32)}),
            0,
        ),
        (
            "o_parts.*.w",
            OUT,
            [loading.MergeModulelist(1)],
            _each(OUT, lambda t: {f"o_parts.{i}.w": t[:, i] for i in range(32)}),
            2,
        ),
        ("up.w", UP, [loading.Transpose(0, 1)], _each(UP, lambda t: {"up.w": t.T}), 2),
        ("up.w", UP, [loading.Transpose(0, 1, check_dims=True)], _each(UP, lambda t: {"up.w": t.T}), 2),
        ("up.w", UP, [loading.Transpose(0, 1, check_dims=True)], _each(UP, lambda t: {"up.w": t}), 0),
        ("up.w", UP, [loading.Interleave(0)], _each(UP, lambda t: {"up.w": t}), 2),
        (
            "fused.w",
            ["mlp.gate_proj.weight", UP],
            [loading.Interleave(0), loading.Chunk(0)],
            lambda s: _each(UP, lambda t: {"fused.w": torch.cat([t, t + 1])})(
                {name: tensor for name, tensor in s.items() if "gate_proj" not in name}
            ),
            4,
        ),
    ],
)
def test_conversions_are_those_of_transformers(sources, targets, operations, change, converted, llama, rules):
    heads = 2 if isinstance(operations[0], loading.Split) else 4
    directory = llama(change, num_key_value_heads=heads)
    rules(loading.WeightConverter(sources, targets, operations))
    model, info = transformers.LlamaForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    checkpoint = open_checkpoint(directory)
    weights = _assert_loads(model, checkpoint, model.state_dict())
    assert weights.sources.keys() == model.state_dict().keys()
    assert sum(source.convert is not None for source in weights.sources.values()) == converted
    assert (weights.missing, weights.unexpected) == ((), ())


@pytest.mark.parametrize("model_class", [transformers.MixtralForCausalLM, transformers.Qwen3MoeForCausalLM])
def test_experts_are_runs_of_whole_tensors(model_class, llama):
    experts = {"num_experts": 12, "num_local_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    directory = llama(model_class=model_class, **experts)
    model = model_class.from_pretrained(directory)
    weights = _assert_loads(model, open_checkpoint(directory), model.state_dict())
    gate_up = weights.sources["model.layers.1.mlp.experts.gate_up_proj"]
    assert gate_up.convert is None
    assert 12 <= len(gate_up.extents) <= 24
    assert gate_up.nbytes == model.model.layers[1].mlp.experts.gate_up_proj.nbytes


def test_missing_expert_is_an_error(llama):
    def change(state):
        del state["model.layers.0.block_sparse_moe.experts.2.w2.weight"]
        return state

    directory = llama(change, transformers.MixtralForCausalLM, num_local_experts=4)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))
    with pytest.raises(ModelError, match=r"down_proj: config says \[4, 32, 48\], checkpoint has \[3, 32, 48\]"):
        map_weights(model, open_checkpoint(directory))


def test_uneven_expert_is_an_error(llama):
    def change(state):
        state["model.layers.0.block_sparse_moe.experts.2.w2.weight"] = torch.zeros(3, 3)
        return state

    directory = llama(change, transformers.MixtralForCausalLM, num_local_experts=4)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))
    with pytest.raises(ModelError, match=r"down_proj: config says \[4, 32, 48\], checkpoint has 4 parts of .*\[3, 3\]"):
        map_weights(model, open_checkpoint(directory))


def test_parts_of_several_dtypes_are_an_error(llama):
    def change(state):
        name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
        state[name] = state[name].half()
        return state

    directory = llama(change, transformers.MixtralForCausalLM, num_local_experts=4)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))
    with pytest.raises(ModelError, match=r"down_proj: its 4 parts are stored in several dtypes \(F16, F32\)"):
        map_weights(model, open_checkpoint(directory))


def test_other_shape_than_the_configuration_says(llama):
    directory = llama()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"vocab_size": 80}))
    with pytest.raises(ModelError, match=r"lm_head.weight: config says \[80, 32\], checkpoint has \[67, 32\]"):
        map_weights(model, open_checkpoint(directory))


def test_old_names_and_unexpected_ones(llama):
    def change(state):
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # one that transformers knows to ignore
        state["model.norm.gamma"] = state.pop("model.norm.weight")
        return state | {"surplus.weight": torch.ones(2)}

    directory = llama(change)
    model, info = transformers.LlamaForCausalLM.from_pretrained(directory, output_loading_info=True)
    weights = map_weights(model, open_checkpoint(directory))
    assert set(weights.unexpected) == info["unexpected_keys"]
    assert set(weights.missing) == info["missing_keys"]
    assert "surplus.weight" in weights.unexpected


def test_tied_weights_stored_twice(llama):
    """As one storage they are one source; as two, both are read, for they may differ."""

    def change(state):
        return state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}

    directory = llama(change, tie_word_embeddings=True)
    config = transformers.LlamaConfig.from_pretrained(directory)
    with torch.device("meta"), initialization.no_tie_weights():
        model = transformers.LlamaForCausalLM(config)
    twice = map_weights(model, open_checkpoint(directory))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= twice.sources.keys()
    state = load_file(directory / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, directory / "once.bin")
    once = map_weights(model, open_checkpoint(directory / "once.bin"))
    assert twice.sources.keys() - once.sources.keys() == {"lm_head.weight"}
    del state["model.embed_tokens.weight"]
    torch.save(state, directory / "head.bin")
    head = map_weights(model, open_checkpoint(directory / "head.bin"))
    assert twice.sources.keys() - head.sources.keys() == {"model.embed_tokens.weight"}
    assert once.missing == head.missing == ()


def _net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net."])
def test_plain_module_takes_one_prefix_off(prefix, tmp_path):
    net = _net()
    stored = {f"{prefix}{name}": tensor for name, tensor in net.state_dict().items()}
    save_file(stored, tmp_path / "w.safetensors")
    weights = _assert_loads(net, open_checkpoint(tmp_path / "w.safetensors"), net.state_dict())
    assert weights.sources.keys() == net.state_dict().keys()
    assert (weights.missing, weights.unexpected) == ((), ())


@pytest.mark.parametrize("prefix", ["model", "net"])
def test_plain_module_puts_one_prefix_on(prefix, tmp_path):
    net = _net()
    save_file(net.state_dict() | {"optimizer": torch.ones(1)}, tmp_path / "w.safetensors")
    outer = nn.ModuleDict({prefix: net})
    weights = _assert_loads(outer, open_checkpoint(tmp_path / "w.safetensors"), outer.state_dict())
    assert weights.unexpected == ("optimizer",)


def test_plain_module_wants_everything(tmp_path):
    net = _net()
    save_file({"0.weight": net[0].weight.data, "other": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"lacks 8 \(0\.bias, 1\.weight, .*num_batches_tracked|and 3 more\)") as caught:
        map_weights(net, open_checkpoint(tmp_path / "w.safetensors"))
    assert str(caught.value).count(",") == 4
    save_file({"0.weight": torch.ones(9, 9)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"0.weight: config says \[4, 3\], checkpoint has \[9, 9\]"):
        map_weights(net, open_checkpoint(tmp_path / "w.safetensors"))


def test_plain_module_has_shared_tensors_once(tmp_path):
    net = _net()
    net.append(net[2])
    save_file(net[:3].state_dict(), tmp_path / "w.safetensors")
    weights = map_weights(net, open_checkpoint(tmp_path / "w.safetensors"))
    assert weights.sources.keys() == net[:3].state_dict().keys()


def _values(runs, sources):
    flat = [sources[source].flatten()[first : first + length] for source, first, length in runs.runs]
    return (torch.cat(flat) if flat else torch.empty(0)).reshape(runs.shape)


@st.composite
def _programs(draw):
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    names = st.sampled_from(["cat", "stack", "chunk", "split", "pick"])
    steps = st.tuples(names, st.integers(-3, 3), st.integers(1, 4))
    return shape, draw(st.integers(1, 4)), draw(st.lists(steps, max_size=4))


def _execute(tensors, steps):
    """Every step makes a new list of tensors."""
    for step, dim, number in steps:
        dim = min(max(dim, -len(tensors[0].shape)), len(tensors[0].shape) - 1)
        if step == "cat":
            tensors = [torch.cat(tensors, dim=dim)]
        elif step == "stack":
            tensors = [torch.stack(tensors, dim=dim)]
        elif step == "chunk":
            tensors = [part for tensor in tensors for part in torch.chunk(tensor, number, dim=dim)]
        elif step == "split":
            sizes = [1] * (tensors[0].shape[dim] - 1) + [1]
            tensors = list(torch.split(tensors[0], sizes, dim))
        else:
            tensors = tensors[-number:]
    return tensors


@given(_programs())
def test_runs_are_what_torch_does(program):
    """Whenever runs come out, they are the values that torch itself would have put there."""
    shape, number, steps = program
    sources = torch.arange(number * math.prod(shape)).reshape(number, *shape).unbind()
    try:
        made = _execute([Runs.whole(i, shape) for i in range(number)], steps)
    except Rearranged:
        return
    except ValueError:
        with pytest.raises(RuntimeError):
            _execute(list(sources), steps)
        return
    wanted = _execute(list(sources), steps)
    assert len(made) == len(wanted)
    for runs, values in zip(made, wanted, strict=True):
        assert runs.shape == values.shape
        assert torch.equal(_values(runs, sources), values)
        assert len(runs.runs) <= number * max(1, 4 * len(steps)), "strips"  # a split makes four parts at most
