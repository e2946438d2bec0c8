import json

import pytest

from hermes.errors import ModelError
from hermes.tasks.detect import context_tokens, num_beams, read_config, task_of


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "text-generation"),
        ({"architectures": ["LlamaForCausalLM"]}, "text-generation"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "text2text-generation"),
        ({"architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True}, "text2text-generation"),
        ({"architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True}, "feature-extraction"),
        ({"architectures": ["ViTForImageClassification"]}, "image-classification"),
        ({"architectures": ["BertForMaskedLM"]}, "feature-extraction"),
        ({}, "feature-extraction"),
    ],
)
def test_task_of(tmp_path, config, task):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert task_of(tmp_path) == task


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 512, "pad_token_id": 0}, 512),
        ({"n_positions": 1024}, 1024),
        ({"n_positions": 512, "relative_attention_num_buckets": 32}, None),
        ({"max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1}, 512),
        ({"max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": "one"}, 513),
        ({"max_position_embeddings": 514, "model_type": ["roberta"]}, 514),
        ({"text_config": {"max_position_embeddings": 77}}, 77),
        ({}, None),
    ],
)
def test_context_tokens(config, limit):
    assert context_tokens(config) == limit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        ("{", "JSON"),
        ("[" * 200_000, "cannot be read as JSON"),
        ("[1]", "not a JSON object"),
        ('{"architectures": 5}', "architectures is 5, not a list of class names"),
        ('{"architectures": {"0": "BertModel"}}', "architectures is {'0': 'BertModel'}, not a list"),
        ('{"architectures": [null]}', r"architectures is \[None\], not a list"),
    ],
)
def test_read_config_refuses(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)


def test_read_config_refuses_a_single_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"hermes\.stream"):
        read_config(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "generation", "beams"),
    [
        ("{}", None, 1),
        ('{"num_beams": 4}', None, 4),
        ('{"num_beams": 4}', "[", 4),
        ('{"num_beams": 4}', '{"num_beams": 3}', 3),
        ('{"num_beams": 4}', "{}", 1),
        ("{}", '{"num_beams": "many"}', 1),
        ("{}", "[" * 200_000, 1),
    ],
)
def test_num_beams(tmp_path, config, generation, beams):
    (tmp_path / "config.json").write_text(config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(generation)
    assert num_beams(tmp_path) == beams
