"""Large matrices stream in ranges of rows: where not all fits, at the profile's price, and with the same bits."""

from dataclasses import replace

import pytest
import torch
import transformers as hf

import hermes
from hermes.checkpoint.pack import pack
from hermes.memory.probe import resident_bytes
from hermes.model import binding
from hermes.model.orders import deals_out_rows
from hermes.model.product import knows_rows, knows_turned
from hermes.model.units import MATRIX_ROWS
from hermes.profile import ComputeRecord
from hermes.session import Workload, prepare, prepare_model, ranges
from hermes.session.quantizable import find_quantizable

IDS = torch.arange(3, 43)[None]
WORKLOAD = Workload(sequence_length=40, max_new_tokens=4)
SHAPE = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 2, "num_attention_heads": 4}
ROOM = 2**30
"""For all of it, without its process."""
WHOLE = {"down_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
"""Of no more rows than a range has."""


def make(path, dtype):
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, vocab_size=3000)).to(dtype).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def short_ranges(monkeypatch):
    monkeypatch.setattr(prepare, "RANGE_BYTES", 2 * MATRIX_ROWS * SHAPE["hidden_size"])


def ranges_of(prepared):
    return {unit.name for unit in prepared.partition.units if unit.rows}


def test_as_resident(tmp_path, monkeypatch):
    path = make(tmp_path, torch.bfloat16)
    monkeypatch.setattr(prepare, "PROCESS_BYTES", 2**40)  # so that no budget is one in which all fits
    resident = hf.LlamaForCausalLM.from_pretrained(path)
    generation = {"max_new_tokens": 4, "do_sample": False}
    budget = resident_bytes() + 400 * 2**20
    with torch.no_grad(), hermes.load(path, budget=budget, resident_bytes=0, sequence_length=40) as model:
        found = ranges_of(model.hermes.prepared)
        assert {name for name in found if name.startswith("model.layers.1.mlp.up_proj")} == {
            f"model.layers.1.mlp.up_proj[{begin}:{min(begin + MATRIX_ROWS, 896)}]"
            for begin in range(0, 896, MATRIX_ROWS)
        }
        assert not any(name.split("[")[0].rpartition(".")[2] in WHOLE for name in found)
        assert torch.equal(model(IDS).logits, resident(IDS).logits)
        assert torch.equal(model.generate(IDS, **generation), resident.generate(IDS, **generation))


def test_only_where_not_all_fits_and_kernels_round_alike(tmp_path, monkeypatch):
    path = make(tmp_path / "bf16", torch.bfloat16)
    assert ranges_of(prepare_model(path, workload=WORKLOAD))
    assert ranges_of(prepare_model(path, workload=WORKLOAD, room_bytes=prepare.PROCESS_BYTES))
    assert not ranges_of(prepare_model(path, workload=WORKLOAD, room_bytes=ROOM))
    monkeypatch.setattr(ranges, "knows_rows", lambda dtype, tokens, *_: tokens == 1)
    assert ranges_of(prepare_model(path, workload=WORKLOAD))  # a prompt's matrices are put together
    monkeypatch.setattr(ranges, "knows_rows", lambda dtype, tokens, *_: tokens == 40)
    assert not ranges_of(prepare_model(path, workload=WORKLOAD))


@pytest.mark.parametrize("form", ["bf16", "packed", "float32"])
def test_a_matrix_is_put_together_for_numbers_of_tokens_that_need_it_whole(tmp_path, monkeypatch, form):
    dtype = torch.float32 if form == "float32" else torch.bfloat16
    path = make(tmp_path / "plain", dtype)
    monkeypatch.setattr(prepare, "PROCESS_BYTES", 2**40)
    monkeypatch.setattr(ranges, "knows_rows", lambda dtype, tokens, *_: tokens in (1, 40))
    monkeypatch.setattr(binding, "knows_rows", lambda *what: what[1] != 7 and knows_rows(*what))
    resident = hf.LlamaForCausalLM.from_pretrained(path)
    if form == "packed":
        path = tmp_path / "packed"
        pack(tmp_path / "plain", path)
    budget = resident_bytes() + 400 * 2**20
    with torch.no_grad(), hermes.load(path, budget=budget, resident_bytes=0, sequence_length=40) as model:
        assert ranges_of(model.hermes.prepared)
        largest = 3000 if "lm_head" in model.hermes.prepared.partition.gathered else 896
        assert model.hermes.prepared.gathered_bytes(7) == largest * 256 * dtype.itemsize
        assert form == "packed" or not model.hermes.prepared.gathered_bytes(40)
        for length in (7, 40, 23):
            ids = IDS[:, :length]
            got, expected = (net(ids, output_hidden_states=True).hidden_states for net in (model, resident))
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_matrices_stay_whole_where_their_ranges_would_take_longer(tmp_path):
    """Native products of float32 with many tokens are slower than torch's; the disk is not what they wait for."""
    torch.manual_seed(0)
    config = hf.BertConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=4)
    hf.BertModel(config).save_pretrained(tmp_path)
    few, many = (prepare_model(tmp_path, workload=Workload(sequence_length=length)) for length in (64, 400))
    assert not ranges_of(many)
    shapes = ((512, 512), (1024, 512), (512, 1024))
    assert bool(ranges_of(few)) == all(knows_rows(torch.float32, 64, shape, MATRIX_ROWS, True) for shape in shapes)


def test_turned_matrices_stream_in_ranges_of_what_is_summed(tmp_path, monkeypatch):
    """One token's sums go on from range to range; for more of them a matrix is put together."""
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=256, n_layer=2, n_head=4, n_positions=64, vocab_size=1000)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    monkeypatch.setattr(prepare, "PROCESS_BYTES", 2**40)
    resident = hf.GPT2LMHeadModel.from_pretrained(tmp_path)
    budget = resident_bytes() + 400 * 2**20
    with torch.no_grad(), hermes.load(tmp_path, budget=budget, resident_bytes=0, sequence_length=40) as model:
        found = {name for name in ranges_of(model.hermes.prepared) if "mlp.c_proj" in name}
        assert len(found) == (8 if knows_turned(torch.float32, 1, (1024, 256), MATRIX_ROWS) else 0)
        for length in (1, 7, 40):
            assert torch.equal(model(IDS[:, :length]).logits, resident(IDS[:, :length]).logits)
        got, expected = (net.generate(IDS[:, :5], max_new_tokens=6, do_sample=False) for net in (model, resident))
        assert torch.equal(got, expected)


def test_one_tokens_scores_are_those_of_the_whole_head(tmp_path):
    """Of an odd number of rows, which torch's threads share: what each leaves over of four it sums otherwise."""
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=128, n_layer=1, n_head=2, n_positions=32, vocab_size=8197)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    resident = hf.GPT2LMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad(), hermes.load(tmp_path, budget=resident_bytes() + 400 * 2**20, resident_bytes=0) as model:
        rows = [unit.rows for unit in model.hermes.prepared.partition.units if unit.rows]
        assert len(rows) == (4 if deals_out_rows(2) else 3)
        assert rows[-1][1] == 8197
        for token in range(8):
            ids = torch.tensor([[token]])
            got, expected = model(ids).logits, resident(ids).logits
            assert torch.equal(got, expected) or not deals_out_rows(2)


@pytest.mark.parametrize("sequences", [2, 5, 16])
def test_scores_of_several_prompts_are_those_of_the_whole_head(tmp_path, sequences):
    """A prompt's last tokens do not lie side by side: how torch multiplies those hangs on what the weights are, too."""
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=128, n_layer=1, n_head=2, n_positions=32, vocab_size=16384)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    resident = hf.GPT2LMHeadModel.from_pretrained(tmp_path)
    ids = torch.randint(0, 8000, (sequences, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), hermes.load(tmp_path, budget=resident_bytes() + 400 * 2**20, resident_bytes=0) as model:
        assert len([unit for unit in model.hermes.prepared.partition.units if unit.rows]) > 1
        for options in ({"logits_to_keep": 1}, {}):
            got, expected = (net(ids, **options).logits for net in (model, resident))
            assert torch.equal(got, expected)


def test_a_profile_of_ranges_knows_what_the_whole_matrix_costs(tmp_path):
    path = make(tmp_path, torch.bfloat16)
    found = hermes.profile(path, workload=WORKLOAD)
    costs = {unit.name: unit.compute.seconds(1) for unit in found.units}
    for unit in prepare_model(path, workload=WORKLOAD, room_bytes=ROOM).partition.units:
        parts = [cost for name, cost in costs.items() if name.split("[")[0] == unit.module]
        assert found.compute_of(unit.name).seconds(1) == pytest.approx(sum(parts))
    up = "model.layers.0.mlp.up_proj"
    half = found.compute_of(f"{up}[{MATRIX_ROWS // 2}:{2 * MATRIX_ROWS}]").seconds(1)
    first, second = (costs[f"{up}[{begin}:{begin + MATRIX_ROWS}]"] for begin in (0, MATRIX_ROWS))
    assert half == pytest.approx(first / 2 + second)


def test_what_streams_in_ranges_can_be_quantised(tmp_path):
    path = make(tmp_path, torch.bfloat16)
    every = {name for name, _ in hf.LlamaForCausalLM.from_pretrained(path).named_parameters() if "_proj" in name}
    assert set(find_quantizable(path).matrices) == every


def test_a_prompt_costs_every_matrix_its_tokens_and_the_head_one(tmp_path):
    path = make(tmp_path, torch.bfloat16)
    found = hermes.profile(path, workload=WORKLOAD)
    slower = ComputeRecord(samples=((1, 1.0), (40, 40.0)))
    units = tuple(replace(unit, compute=slower) for unit in found.units)
    prepared = prepare_model(path, workload=WORKLOAD)
    with prepared.reader() as reader:
        factory = prepared.factory(reader.alignment, 2**20)
        problem = prepared.problem(replace(found, units=units), factory, floor_bytes=0)
    assert {cost.first_seconds for cost in problem.units if cost.name.startswith("lm_head")} == {1.0}
    assert {cost.first_seconds for cost in problem.units if not cost.name.startswith("lm_head")} == {40.0}
