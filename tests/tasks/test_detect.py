import json

import pytest

from hermes.errors import ModelError
from hermes.tasks.detect import context_tokens, read_config, task_of


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
        ({"text_config": {"max_position_embeddings": 77}}, 77),
        ({}, None),
    ],
)
def test_context_tokens(config, limit):
    assert context_tokens(config) == limit


@pytest.mark.parametrize(("content", "message"), [(None, "missing"), ("{", "JSON"), ("[1]", "not a JSON object")])
def test_read_config_refuses(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)


def test_read_config_refuses_a_single_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"hermes\.stream"):
        read_config(tmp_path / "model.safetensors")
