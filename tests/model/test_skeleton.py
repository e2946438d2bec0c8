"""Skeleton, sources and plain file reads together are `from_pretrained`, bit for bit."""

import itertools
import json
import logging
import shutil

import pytest
import torch
import transformers
from torch import nn

from hermes.checkpoint.open import open_checkpoint
from hermes.errors import CheckpointError, ModelError
from hermes.model.blocks import torch_dtype
from hermes.model.mapping import WeightMap, map_weights
from hermes.model.skeleton import AUTO_CLASSES, build_skeleton, finish_skeleton

TEXT = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT |= {"max_position_embeddings": 64}
GROUPED = TEXT | {"num_key_value_heads": 2}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": 16, "patch_size": 8}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}

FAMILIES = {
    "BertForMaskedLM": TEXT,
    "ViTForImageClassification": VISION,
    "GPT2LMHeadModel": {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SPECIAL},
    "GPTJForCausalLM": {
        **{"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        **SPECIAL,
    },
    "LlamaForCausalLM": GROUPED,
    "T5ForConditionalGeneration": {
        **{"vocab_size": 67, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        "decoder_start_token_id": 0,
    },
    "WhisperForConditionalGeneration": {
        **{"vocab_size": 67, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
        **{"max_source_positions": 16, "max_target_positions": 16, "decoder_start_token_id": 1, **SPECIAL},
    },
    "CLIPModel": {"text_config": TEXT | SPECIAL, "vision_config": VISION, "projection_dim": 16},
    "Qwen2ForCausalLM": GROUPED | {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": GROUPED | {"head_dim": 8},
    "MixtralForCausalLM": GROUPED | {"num_local_experts": 4},
    "Qwen2MoeForCausalLM": GROUPED | EXPERTS | {"shared_expert_intermediate_size": 40},
    "Qwen3MoeForCausalLM": GROUPED | EXPERTS | {"head_dim": 8},
    "ResNetForImageClassification": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]},
}


def _bind(model, weights, checkpoint):
    """What the engine does, at once and with plain reads."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    homes = [
        (table, name) for module in model.modules() for table in (module._parameters, module._buffers) for name in table
    ]
    for name, source in weights.sources.items():
        read = bytearray()
        for extent in source.extents:
            with open(checkpoint.files[extent.file].path, "rb") as file:
                file.seek(extent.offset)
                read += file.read(extent.nbytes)
        assert len(read) == source.nbytes
        flat = torch.frombuffer(read, dtype=torch_dtype(source.dtype))
        hollow = tensors[name]
        assert hollow.is_meta
        if source.convert is not None:
            parts = flat.split([torch.Size(shape).numel() for shape in source.shapes])
            flat = source.convert([part.view(shape) for part, shape in zip(parts, source.shapes, strict=True)])
        full = flat.reshape(hollow.shape).to(hollow.dtype)
        full = nn.Parameter(full, hollow.requires_grad) if isinstance(hollow, nn.Parameter) else full
        for table, leaf in homes:
            if table[leaf] is hollow:
                table[leaf] = full


def _streamed(directory, **kwargs):
    """A skeleton with everything bound, and its map."""
    model = build_skeleton(directory, **{"dtype": None, **kwargs})
    tensors = (*model.parameters(), *model.buffers())
    assert all(tensor.is_meta for tensor in tensors)
    checkpoint = open_checkpoint(directory)
    weights = map_weights(model, checkpoint)
    finish_skeleton(model, weights)
    hollow = {id(tensor) for tensor in (*model.parameters(), *model.buffers()) if tensor.is_meta}
    assert hollow == {id(model.get_parameter_or_buffer(name)) for name in weights.sources}
    assert len(hollow) == len(weights.sources)
    _bind(model, weights, checkpoint)
    return model, weights


def _assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    for kind in ("named_parameters", "named_buffers"):
        pairs = zip(*(getattr(model, kind)(remove_duplicate=False) for model in (ours, theirs)), strict=True)
        for (name, mine), (other_name, other) in pairs:
            assert name == other_name
            assert (mine.dtype, mine.shape, mine.device) == (other.dtype, other.shape, other.device), name
            assert torch.equal(mine, other), name
            assert mine.requires_grad is other.requires_grad, name
    ids = [[id(p) for _, p in model.named_parameters(remove_duplicate=False)] for model in (ours, theirs)]
    assert [i.index(x) for i in ids[:1] for x in i] == [i.index(x) for i in ids[1:] for x in i], "tied otherwise"
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert ours.training is theirs.training is False
    assert ours.name_or_path == theirs.name_or_path
    if theirs.can_generate():
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def _inputs(model):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (2, 7), generator=generator)
    pixels = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float32).to(model.dtype)
    name = type(model).__name__
    if name.startswith("CLIP"):
        return {"input_ids": ids, "pixel_values": pixels}
    if name.startswith("Whisper"):
        mel = torch.randn(2, 8, 32, generator=generator).to(model.dtype)
        return {"input_features": mel, "decoder_input_ids": ids}
    if name.startswith("T5"):
        return {"input_ids": ids, "decoder_input_ids": ids.flip(0)}
    return {"pixel_values": pixels} if model.main_input_name == "pixel_values" else {"input_ids": ids}


def _outputs(model):
    with torch.no_grad():
        output = model(**_inputs(model)).to_tuple()
    tensors = [tensor for tensor in output if isinstance(tensor, torch.Tensor)]
    assert tensors
    return tensors


def _random_model(name):
    model_class = getattr(transformers, name)
    torch.manual_seed(1)
    model = model_class(model_class.config_class(**FAMILIES[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # no zeros or ones that two parameters share
        for buffer_name, buffer in model.named_buffers():
            if "running" in buffer_name:
                buffer.add_(torch.rand_like(buffer))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directory of a family's seeded model, made once."""
    made = {}

    def save(name, dtype=torch.float32):
        if (name, dtype) not in made:
            made[name, dtype] = tmp_path_factory.mktemp(name)
            _random_model(name).to(dtype).save_pretrained(made[name, dtype])
        return made[name, dtype]

    return save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_is_from_pretrained(name, dtype, saved):
    directory = saved(name, dtype)
    theirs = getattr(transformers, name).from_pretrained(directory)
    ours, weights = _streamed(directory)
    _assert_same(ours, theirs)
    assert theirs.dtype is dtype
    assert (weights.missing, weights.unexpected) == ((), ())
    assert all(source.convert is None for source in weights.sources.values())
    for mine, other in zip(_outputs(ours), _outputs(theirs), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "MixtralForCausalLM", "ResNetForImageClassification"])
def test_asked_dtype(name, dtype, saved):
    stored = torch.bfloat16 if dtype is torch.float32 else torch.float32
    directory = saved(name, stored)
    theirs = getattr(transformers, name).from_pretrained(directory, dtype=dtype)
    ours, _ = _streamed(directory, dtype=dtype)
    _assert_same(ours, theirs)


def test_sharded_and_zip_checkpoints(saved, tmp_path):
    name = "Qwen2ForCausalLM"
    theirs = getattr(transformers, name).from_pretrained(saved(name))
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shutil.copytree(saved(name), tmp_path / "zip")
    (tmp_path / "zip" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "zip" / "pytorch_model.bin")
    for directory in (tmp_path / "shards", tmp_path / "zip"):
        ours, weights = _streamed(directory)
        assert "lm_head.weight" not in weights.sources, "tied, on disk once"
        _assert_same(ours, type(theirs).from_pretrained(directory))


def test_other_names_for_the_same(saved, tmp_path):
    """A head's checkpoint into a bare model, a bare one into a head's, and a bare GPT-2 with old buffers."""
    base = saved("BertForMaskedLM")
    ours, weights = _streamed(base, auto_class="BertModel")
    theirs, info = transformers.BertModel.from_pretrained(base, output_loading_info=True)
    assert set(weights.unexpected) == info["unexpected_keys"]
    assert set(weights.missing) == info["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    theirs.pooler.load_state_dict(ours.pooler.state_dict())  # drawn anew by each
    _assert_same(ours, theirs)
    gpt2 = transformers.GPT2LMHeadModel.from_pretrained(saved("GPT2LMHeadModel"))
    gpt2.transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _assert_same(_streamed(tmp_path)[0], transformers.GPT2LMHeadModel.from_pretrained(tmp_path))


def test_missing_head_is_initialised_as_by_transformers(saved, tmp_path, caplog):
    model = transformers.BertModel(transformers.BertConfig(**TEXT))
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    theirs, info = transformers.BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    torch.manual_seed(5)
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        ours, weights = _streamed(tmp_path, task="text-classification")
    transformers.utils.logging.disable_propagation()
    assert set(weights.missing) == info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    _assert_same(ours, theirs)
    assert "BertForSequenceClassification LOAD REPORT" in caplog.text
    assert "MISSING" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "name", "expected"),
    [
        ({"task": "text-generation"}, "LlamaForCausalLM", "LlamaForCausalLM"),
        ({"task": "text-generation"}, "T5ForConditionalGeneration", "T5ForConditionalGeneration"),
        ({"task": "embedding"}, "LlamaForCausalLM", "LlamaModel"),
        ({"task": "embedding", "auto_class": "AutoModelForCausalLM"}, "LlamaForCausalLM", "LlamaForCausalLM"),
        ({"auto_class": transformers.AutoModelForImageClassification}, "CLIPModel", "CLIPForImageClassification"),
        ({"auto_class": transformers.ViTModel}, "ViTForImageClassification", "ViTModel"),
        ({"task": "image-classification"}, "ResNetForImageClassification", "ResNetForImageClassification"),
    ],
)
def test_class(kwargs, name, expected, saved):
    assert type(build_skeleton(saved(name), dtype=None, **kwargs)).__name__ == expected


def test_every_task_names_auto_classes():
    for name in itertools.chain.from_iterable(AUTO_CLASSES.values()):
        assert hasattr(getattr(transformers, name), "_model_mapping")


def test_attention_as_asked(saved):
    assert build_skeleton(saved("LlamaForCausalLM"), dtype=None).config._attn_implementation == "sdpa"
    model = build_skeleton(saved("CLIPModel"), dtype=None, attn_implementation="eager")
    assert model.config.text_config._attn_implementation == "eager"


def test_dtype_of_the_checkpoint_where_the_configuration_has_none(saved, tmp_path):
    shutil.copytree(saved("LlamaForCausalLM", torch.bfloat16), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, _ = _streamed(tmp_path)
    assert ours.dtype is torch.bfloat16
    _assert_same(ours, transformers.LlamaForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        (None, CheckpointError, r"config\.json: No such file"),
        ("{", CheckpointError, "not valid JSON"),
        ("[]", CheckpointError, "not a JSON object"),
        ('{"model_type": "hal9000"}', ModelError, "unsupported architecture 'hal9000'"),
        ("{}", ModelError, "unsupported architecture"),
        ('{"model_type": "bert", "quantization_config": {"bits": 4}}', ModelError, "quantised"),
        ('{"model_type": "bert", "hidden_size": 33, "num_attention_heads": 4}', ModelError, "hidden size"),
        ('{"model_type": "bert", "hidden_size": "wide"}', ModelError, "hidden_size"),
        ('{"model_type": "bert", "architectures": ["BertForWorldPeace"]}', ModelError, "BertForWorldPeace"),
        (
            '{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}',
            ModelError,
            "--trust-remote-code",
        ),
    ],
)
def test_bad_configuration_is_one_line(config, error, match, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(error, match=match) as caught:
        build_skeleton(tmp_path, dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_wrong_class_or_task(saved):
    directory = saved("BertForMaskedLM")
    with pytest.raises(ModelError, match="unknown task 'cooking'"):
        build_skeleton(directory, dtype=None, task="cooking")
    with pytest.raises(ModelError, match="'bert' cannot be built as AutoModelForImageClassification"):
        build_skeleton(directory, dtype=None, task="image-classification")


def test_remote_code_only_when_trusted(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = tmp_path / "own"
    shutil.copytree(saved("LlamaForCausalLM"), directory)
    (directory / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="trust-remote-code"):
        build_skeleton(directory, dtype=None)
    assert not (tmp_path / "modules").exists()
    for kwargs in ({}, {"task": "text-generation"}):
        ours, weights = _streamed(directory, trust_remote_code=True, **kwargs)
        assert type(ours).__name__ == "OwnForCausalLM"
        assert weights.missing == ()
        resident = transformers.LlamaForCausalLM.from_pretrained(saved("LlamaForCausalLM"))
        assert torch.equal(_outputs(ours)[0], _outputs(resident)[0])


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 4)
        self.again = nn.Linear(6, 4)
        self.again.weight = self.last.weight
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return (self.last(x) + self.again(x)) * self.scale


def test_plain_module_gives_its_memory_up(tmp_path):
    torch.manual_seed(0)
    trained, net = _Net().eval(), _Net().eval()
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    checkpoint = open_checkpoint(tmp_path / "w.pt")
    weights = map_weights(net, checkpoint)
    finish_skeleton(net, weights)
    assert all(parameter.is_meta and parameter.requires_grad for parameter in net.parameters())
    assert net.again.weight is net.last.weight
    assert net.scale.item() == 2
    _bind(net, weights, checkpoint)
    x = torch.randn(3, 4)
    assert torch.equal(net(x), trained(x))


def test_plain_module_keeps_what_is_not_mapped():
    net = _Net()
    finish_skeleton(net, WeightMap(sources={}, missing=(), unexpected=()))
    assert not any(tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))


def test_plain_module_on_meta_lacks_its_own_buffers(tmp_path):
    torch.save(_Net().state_dict(), tmp_path / "w.pt")
    with torch.device("meta"):
        net = _Net()
    weights = map_weights(net, open_checkpoint(tmp_path / "w.pt"))
    with pytest.raises(ModelError, match="no value for scale"):
        finish_skeleton(net, weights)


def test_transformers_model_that_the_user_made(saved):
    directory = saved("GPT2LMHeadModel")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(directory)
    model = transformers.GPT2LMHeadModel(theirs.config).eval()
    checkpoint = open_checkpoint(directory)
    weights = map_weights(model, checkpoint)
    finish_skeleton(model, weights)
    assert all(parameter.is_meta for parameter in model.parameters())
    _bind(model, weights, checkpoint)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(_outputs(model)[0], _outputs(theirs)[0])
