"""What holds on every device: the bits of the model resident there, in its budget, from the memory that is meant."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hermes
from devices import assert_equal, load, memory, put, smallest
from hermes.device import Device
from hermes.memory.probe import resident_bytes
from small_models import FAMILIES, IDS, bits, cast

ALWAYS = ("bert", "vit", "gpt2", "llama", "mixtral", "t5", "whisper")
PAIRS = [
    *(pytest.param(name, torch.float32, marks=[] if name in ALWAYS else pytest.mark.slow) for name in FAMILIES),
    ("llama", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_streamed_is_resident(name, dtype, checkpoints, kind, tight):
    family, path = FAMILIES[name], checkpoints[name]
    inputs = put(cast(family.inputs, dtype), kind)
    with torch.no_grad():
        resident = family.model.from_pretrained(path, dtype=dtype).to(kind)
        expected = bits(resident(**inputs))
        with load(path, kind, auto_class=family.model, dtype=dtype) as model:
            assert model.hermes.target.plan.pass_bytes > 0
            for _ in range(3):
                assert_equal(bits(model(**inputs)), expected)
            assert model.device.type == kind
            if family.generates:
                wanted = {"max_new_tokens": 8, "do_sample": False}
                given = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
                assert torch.equal(model.generate(**given, **wanted).cpu(), resident.generate(**given, **wanted).cpu())


@pytest.mark.parametrize(("granularity", "share"), [("leaf", 0.0), ("leaf", 0.5), ("layer", 0.2), ("leaf", 1.0)])
def test_any_budget(granularity, share, checkpoints, kind):
    family, path, ids = FAMILIES["llama"], checkpoints["llama"], IDS.to(kind)
    least = smallest(path, kind, granularity=granularity)
    allocated, peak, reset = memory(kind)
    with torch.no_grad():
        expected = bits(family.model.from_pretrained(path).to(kind)(input_ids=ids))
        before = allocated()
        reset()
        with load(path, kind, int(least + share * 600_000), granularity=granularity) as model:
            plan, source, stats = model.hermes.target.plan, model.hermes.source, model.hermes.stats
            for number in range(3):
                copied = source.copied_bytes
                assert_equal(bits(model(input_ids=ids)), expected)
                if number:  # the agents are ahead by a window at most, in both
                    assert abs(source.copied_bytes - copied - plan.pass_bytes) <= plan.ring_bytes
            assert (plan.pass_bytes == 0) == (share == 1.0)
            assert stats.passes == 3
        taken = peak() - before
    assert taken <= plan.peak_bytes
    assert model.hermes.target.device.peak_bytes >= taken


@pytest.mark.parametrize(("name", "resident_bytes"), [("bert", 0), ("gpt2", 300_000), ("llama", None)])
def test_memory_that_is_shared_is_not_copied(name, resident_bytes, checkpoints, kind, shared):
    family, path = FAMILIES[name], checkpoints[name]
    inputs = put(family.inputs, kind)
    with torch.no_grad():
        expected = bits(family.model.from_pretrained(path).to(kind)(**inputs))
        with load(path, kind, auto_class=family.model, resident_bytes=resident_bytes) as model:
            assert model.hermes.target.plan is None
            places = []  # by which kernels choose
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_hook(lambda layer, *_: places.append(layer.weight.data_ptr() % 64))
            for _ in range(3):
                assert_equal(bits(model(**inputs)), expected)
            assert (model.hermes.stats.pass_bytes[-1] == 0) == (resident_bytes is None)
            assert set(places) <= {0}


def test_what_a_device_computes_from_stays_where_it_is(checkpoints, kind, shared):
    ids = IDS.to(kind)
    with load(checkpoints["bert"], kind, resident_bytes=None) as model, torch.no_grad():
        expected = bits(model(ids))
        engine = model.hermes.engine
        reserved = engine.ledger.reserved_bytes
        assert engine.resize(reserved - 64 * 2**10) == reserved
        assert_equal(bits(model(ids)), expected)
        assert model.hermes.stats.pass_bytes[-1] == 0


class Late(nn.Module):
    """Copies each layer's weight aside, on the device, long after the next layer's has been asked for."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(300, 300, bias=False) for _ in range(6))

    def forward(self, x):
        seen = []
        for layer in self.layers:
            x = layer(x)
            one, other = (torch.empty_like(layer.weight) for _ in range(2))
            for _ in range(5):
                one.copy_(other, non_blocking=True)
            one.copy_(layer.weight, non_blocking=True)
            seen += [one, other]
        return seen


@pytest.mark.parametrize("shares", [False, True])
def test_no_weight_goes_before_the_device_is_done_with_it(shares, tmp_path, kind, tight, request):
    if shares:
        request.getfixturevalue("shared")
    torch.manual_seed(0)
    whole = Late()
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    with torch.device("meta"):
        bare = Late()
    stream = torch.Stream(torch.device(kind))
    budget = resident_bytes() + 600 * 2**20
    with hermes.stream(bare, tmp_path / "w.safetensors", budget, device=kind, resident_bytes=0) as model:
        window = (model.hermes.plan if shares else model.hermes.target.plan).ring_bytes
        assert window < len(whole.layers) * whole.layers[0].weight.nbytes  # so that places are given out again
        for _ in range(2):
            with torch.no_grad(), stream:
                seen = model(torch.ones(1, 300).to(kind))
            stream.synchronize()
            assert_equal(seen[::2], [layer.weight for layer in whole.layers])


def test_registered_memory_is_seen_without_a_copy(kind):
    device = Device(kind)
    arena = device.host_memory(4 * 2**20)
    host = torch.frombuffer(arena.view, dtype=torch.uint8)
    host[1000] = 42
    there = device.view(arena)
    assert there.device.type == kind
    assert int(there[1000]) == 42
    del there
    arena.close()


def test_copies_wait_for_what_was_computed_before(kind):
    device = Device(kind)
    target, source = device.empty(2**20), torch.full((2**20,), 3, dtype=torch.uint8)
    ones = torch.ones(2**20, dtype=torch.uint8)
    late = device.empty(2**20)
    with torch.no_grad():
        target.fill_(1)
        with torch.Stream(device.device):  # work that is late
            late.copy_(ones, non_blocking=True)
            mark = device.mark()
        device.copy_in([(target, source)], mark)
        assert target.cpu().unique().tolist() == [3]
        assert late.cpu().unique().tolist() == [1]
