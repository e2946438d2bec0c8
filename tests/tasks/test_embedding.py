import json

import pytest
import torch
from transformers import AutoModel

import hermes
from hermes.errors import InputError
from hermes.tasks.embedding import embed_texts, pool_of
from hermes.tasks.text import load_tokenizer

TEXTS = ["Hello there", "a rather longer sentence than the first one", "x" * 300]


@pytest.fixture(scope="module")
def bert(tiny):
    directory = tiny("tiny-bert")
    return AutoModel.from_pretrained(directory, dtype="auto").eval(), load_tokenizer(directory), directory


@pytest.mark.parametrize("pool", ["mean", "cls", "last", "max", "none"])
def test_streamed_vectors_are_resident_vectors(bert, pool):
    resident, tokenizer, directory = bert
    expected = embed_texts(resident, tokenizer, TEXTS, pool=pool)
    with hermes.load(directory, budget="8GiB", task="feature-extraction", batch_size=3, resident_bytes=0) as model:
        found = embed_texts(model, tokenizer, TEXTS, pool=pool)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    if pool == "none":
        # special tokens at both ends; the last text is cut at the model's 128 positions
        assert [len(rows) for rows in expected] == [len(TEXTS[0]) + 2, len(TEXTS[1]) + 2, 128]


def test_padding_does_not_count(bert):
    model, tokenizer, _ = bert
    for pool in ("mean", "last", "max"):
        (alone,) = embed_texts(model, tokenizer, TEXTS[:1], pool=pool)
        together, _ = embed_texts(model, tokenizer, TEXTS[:2], pool=pool)
        torch.testing.assert_close(alone, together)


def test_pools_are_what_they_say(bert):
    model, tokenizer, _ = bert
    (rows,) = embed_texts(model, tokenizer, TEXTS[:1], pool="none")
    pooled = {pool: embed_texts(model, tokenizer, TEXTS[:1], pool=pool)[0] for pool in ("mean", "cls", "last", "max")}
    torch.testing.assert_close(pooled["mean"], rows.mean(0))
    assert torch.equal(pooled["cls"], rows[0])
    assert torch.equal(pooled["last"], rows[-1])
    assert torch.equal(pooled["max"], rows.amax(0))


def test_normalised(bert):
    model, tokenizer, _ = bert
    for vector in embed_texts(model, tokenizer, TEXTS, normalise=True):
        assert float(vector.norm()) == pytest.approx(1.0)


def test_refusals(bert):
    model, tokenizer, _ = bert
    with pytest.raises(InputError, match="unknown pool 'median'"):
        embed_texts(model, tokenizer, TEXTS, pool="median")
    with pytest.raises(InputError, match="nothing to read"):
        embed_texts(model, tokenizer, [])


def test_pool_of_a_sentence_encoder(tmp_path):
    assert pool_of(tmp_path) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    assert pool_of(tmp_path) == "cls"
