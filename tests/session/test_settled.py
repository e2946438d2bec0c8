"""A model that is all in memory: blocks are bound once a pass, and given up in the middle of one without a trace."""

import threading

import pytest
import torch
import transformers as hf

import hermes
from hermes.memory.probe import resident_bytes


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    config = hf.BertConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)
    model = hf.BertModel(config)
    model.save_pretrained(tmp_path)
    return tmp_path


def test_a_pass_wants_nothing_and_gives_up_what_it_must(checkpoint, monkeypatch):
    ids = torch.arange(3, 60)[None]
    expected = hf.BertModel.from_pretrained(checkpoint).eval()(ids).last_hidden_state
    with hermes.load(checkpoint, budget=resident_bytes() + 400 * 2**20) as model, torch.inference_mode():
        engine = model.hermes.engine
        wanted = []
        want = type(engine).want
        monkeypatch.setattr(type(engine), "want", lambda self, block: wanted.append(block) or want(self, block))
        assert torch.equal(model(ids).last_hidden_state, expected)
        assert wanted
        assert engine.is_settled
        wanted.clear()
        assert torch.equal(model(ids).last_hidden_state, expected)
        assert not wanted
        assert model.encoder.layer[2].output.dense.weight.is_meta  # between passes nothing is bound

        module = model.encoder.layer[2].intermediate.dense
        forward = module.forward

        def squeezed(x):
            thread = threading.Thread(target=engine.take, args=(engine.ledger.free_bytes + 2**20,))
            thread.start()
            thread.join()
            return forward(x)

        monkeypatch.setitem(module.__dict__, "forward", squeezed)
        assert torch.equal(model(ids).last_hidden_state, expected)
        assert not engine.is_settled
        assert engine.stats.evicted_bytes
        assert wanted
        monkeypatch.undo()
        for _ in range(2):
            assert torch.equal(model(ids).last_hidden_state, expected)


def test_weights_that_go_back_while_all_are_bound(checkpoint, monkeypatch):
    """After it was asked whether all stay, and before it was asked where they lie."""
    ids = torch.arange(3, 60)[None]
    expected = hf.BertModel.from_pretrained(checkpoint).eval()(ids).last_hidden_state
    with hermes.load(checkpoint, budget=resident_bytes() + 400 * 2**20) as model, torch.inference_mode():
        engine = model.hermes.engine
        places = engine.places

        def squeezed(block):
            if engine.is_settled:
                thread = threading.Thread(target=engine.take, args=(engine.ledger.free_bytes + 2**20,))
                thread.start()
                thread.join()
            return places(block)

        monkeypatch.setattr(engine, "places", squeezed)
        for _ in range(4):
            assert torch.equal(model(ids).last_hidden_state, expected)
        assert engine.stats.evicted_bytes


def test_tokens_of_a_model_that_is_all_in_memory_read_nothing(tmp_path):
    torch.manual_seed(0)
    hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=256, n_layer=2, n_head=4, vocab_size=24000, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path)
    expected = hf.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    with hermes.load(tmp_path, budget=resident_bytes() + 400 * 2**20) as model, torch.inference_mode():
        partition, stats = model.hermes.prepared.partition, model.hermes.engine.stats
        assert partition.rowwise
        assert partition.heads  # tied to one of them
        for ids in (torch.arange(5)[None], torch.tensor([[7, 23999, 7, 11000, 13, 12999]])):
            read_before = stats.bytes_read
            assert torch.equal(model(ids).logits, expected(ids).logits)
        assert stats.bytes_read == read_before
