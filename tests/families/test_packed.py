"""Law 3 for packed checkpoints: they stream, and are resident, to the same bits as what was packed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf

import hermes
from hermes.api import settle_plan
from hermes.checkpoint import open_checkpoint
from hermes.checkpoint.pack import pack
from hermes.memory.probe import resident_bytes
from hermes.model.resident import load_packed
from hermes.model.trace import tensors_in
from hermes.session import Workload, prepare_model, start_session

IDS = torch.tensor([[5, 9, 17, 33, 2, 8, 101, 77]])
TEXT = {"vocab_size": 9000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 96, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[type, Any]] = {
    "bert": (hf.BertModel, hf.BertConfig(**WIDTHS, **TEXT)),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(n_embd=192, n_layer=2, n_head=4, n_positions=64, **TEXT)),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**WIDTHS, max_position_embeddings=64, **TEXT)),
    "qwen3-moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**WIDTHS, **EXPERTS, max_position_embeddings=64, **TEXT)),
    "t5": (
        hf.T5EncoderModel,
        hf.T5Config(d_model=192, d_kv=48, d_ff=384, num_layers=2, num_heads=4, vocab_size=9000),
    ),
}


def bits(output: Any) -> list[torch.Tensor]:
    return [tensor.view(torch.uint8) if tensor.is_floating_point() else tensor for tensor in tensors_in(output)]


PAIRS = [*((name, torch.float32) for name in FAMILIES), ("llama", torch.bfloat16), ("gpt2", torch.float16)]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family, the dtype it is saved in, and where: as it is, and packed."""
    name, stored = request.param
    family, config = FAMILIES[name]
    root = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    model = family(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.to(stored).save_pretrained(root / "plain")
    pack(root / "plain", root / "packed")
    return family, stored, root / "plain", root / "packed"


def test_streamed_packed_is_resident(pair: Any) -> None:
    family, stored, plain, packed = pair
    computed = torch.float32 if stored is torch.float16 else stored  # which is cast behind the unpacking
    with torch.no_grad():
        expected = bits(family.from_pretrained(plain, dtype=computed)(input_ids=IDS))
        sizes = {}
        for path in (plain, packed):
            with hermes.load(
                path,
                budget=resident_bytes() + 600 * 2**20,
                auto_class=family,
                dtype=computed,
                sequence_length=8,
                resident_bytes=0,
            ) as model:
                for _ in range(2):
                    got = bits(model(input_ids=IDS))
                    assert len(got) == len(expected)
                    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
                sizes[path] = model.hermes.plan.pass_bytes  # without looked-up rows, which cost whole chunks
        assert sizes[packed] < sizes[plain]


def test_kept_packed_is_resident(pair: Any) -> None:
    """Weights that stay as they lie on disk are read once, unpacked to the same bits, and given back when asked."""
    family, stored, plain, packed = pair
    computed = torch.float32 if stored is torch.float16 else stored
    budget = resident_bytes() + 600 * 2**20
    prepared = prepare_model(packed, workload=Workload(sequence_length=8), auto_class=family, dtype=computed)
    reader = prepared.reader()
    plan, _ = settle_plan(prepared, reader, budget, resident_bytes=0, sequential=True)  # each pass reads its own
    blocks, _ = prepared.blocks(prepared.factory(reader.alignment, plan.piece_bytes), plan.granularity)
    every = tuple(frozenset(n for n, load in enumerate(block.loads) if load.unpacked_bytes) for block in blocks)
    with torch.no_grad(), start_session(prepared, replace(plan, packed=every), reader) as session:
        expected = bits(family.from_pretrained(plain, dtype=computed)(input_ids=IDS))
        read = []
        for number in range(4):
            got = bits(prepared.module(input_ids=IDS))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            read.append(session.stats.pass_bytes[-1])
            if number == 1:
                shelved = session.ledger.accounts["packed"]
                session.engine.resize(session.ledger.reserved_bytes - shelved // 2)
        assert read[1] < read[0] / 2
        assert read[3] > read[1]
        assert 0 < session.ledger.accounts["packed"] <= shelved // 2
        assert session.stats.evicted_bytes >= shelved // 2


def test_resident_packed_is_resident(pair: Any) -> None:
    family, stored, plain, packed = pair
    with torch.no_grad():
        expected = family.from_pretrained(plain, dtype=stored)
        auto_class = hf.AutoModelForCausalLM if family.__name__.endswith(("LM", "LMHeadModel")) else hf.AutoModel
        auto_class = family if family is hf.T5EncoderModel else auto_class
        got = load_packed(auto_class, packed, open_checkpoint(packed), dtype=stored, trust_remote_code=False).eval()
        assert got.state_dict().keys() == expected.state_dict().keys()
        for a, b in zip(bits(got(input_ids=IDS)), bits(expected(input_ids=IDS)), strict=True):
            assert torch.equal(a, b)
        if got.can_generate():
            assert got.generation_config.to_dict() == expected.generation_config.to_dict()


def test_a_corrupt_chunk_stops_the_pass_and_is_named(pair: Any) -> None:
    family, stored, _, packed = pair
    checkpoint = open_checkpoint(packed)
    tensor = max(checkpoint.packed[0].tensors, key=lambda tensor: (tensor.nbytes, "embed" not in tensor.name))
    content = bytearray(tensor.path.read_bytes())
    for place in tensor.places[:-1]:
        content[place + 100] ^= 1
    tensor.path.write_bytes(content)
    with (
        pytest.raises(hermes.HermesError, match=rf"tensor '{tensor.name}': chunk \d+ is corrupt \(checksum differs\)"),
        torch.no_grad(),
        hermes.load(
            packed,
            budget=resident_bytes() + 600 * 2**20,
            auto_class=family,
            dtype=stored,
            sequence_length=8,
            resident_bytes=0,
        ) as model,
    ):
        model(input_ids=IDS)
