"""On a real GPU: the laws of `test_second.py`, and what the simulated device can't show of the driver."""

import pytest
import torch

import hermes
from hermes.device import Device
from hermes.errors import BudgetError
from hermes.memory.probe import resident_bytes
from small_models import FAMILIES, IDS, bits, cast

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
MIB = 2**20


def load(path, device_budget, **options):
    options = {"sequence_length": 8, "max_new_tokens": 8, "resident_bytes": 0} | options
    budget = resident_bytes() + 1200 * MIB
    return hermes.load(path, budget=budget, device="cuda", device_budget=device_budget, **options)


def smallest(path, **options):
    with pytest.raises(BudgetError) as refused:
        load(path, 1, **options)
    return refused.value.minimum_bytes


@pytest.fixture(scope="module", autouse=True)
def context():
    """Before any budget is counted: the driver's own memory is not Hermes's."""
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_is_resident(name, dtype, checkpoints):
    family, path = FAMILIES[name], checkpoints[name]
    options = {"auto_class": family.model, "dtype": dtype}
    inputs = {name: value.to("cuda") for name, value in cast(family.inputs, dtype).items()}
    with torch.no_grad():
        resident = family.model.from_pretrained(path, dtype=dtype).to("cuda")
        expected = bits(resident(**inputs))
        with load(path, smallest(path, **options), **options) as model:
            assert model.hermes.target.plan.pass_bytes > 0
            for _ in range(3):
                got = bits(model(**inputs))
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            if family.generates:
                wanted = {"max_new_tokens": 8, "do_sample": False}
                given = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
                assert torch.equal(model.generate(**given, **wanted), resident.generate(**given, **wanted))


def test_the_budget_of_the_device_holds(checkpoints):
    path = checkpoints["llama"]
    least = smallest(path)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with load(path, least) as model, torch.no_grad():
        for _ in range(3):
            model(IDS.to("cuda"))
    assert torch.cuda.max_memory_allocated() - before <= least


def test_registered_memory_is_seen_without_a_copy():
    device = Device("cuda")
    arena = device.host_memory(4 * MIB)
    host = torch.frombuffer(arena.view, dtype=torch.uint8)
    there = device.view(arena)
    host[1000] = 42
    assert int(there[1000]) == 42
    del there
    arena.close()
    assert host.is_pinned() is False


def test_memory_that_is_shared(checkpoints, monkeypatch):
    monkeypatch.setattr("hermes.device.device._Cuda.is_integrated", lambda *_: True)
    family, path = FAMILIES["bert"], checkpoints["bert"]
    with torch.no_grad():
        expected = bits(family.model.from_pretrained(path).to("cuda")(IDS.to("cuda")))
        with load(path, None) as model:
            assert model.hermes.target.plan is None
            for _ in range(3):
                got = bits(model(IDS.to("cuda")))
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_copies_wait_for_what_was_computed_before():
    device = Device("cuda")
    target, source = device.empty(64 * MIB), torch.full((64 * MIB,), 3, dtype=torch.uint8)
    target.fill_(1)
    late = torch.zeros(4096, 4096, device="cuda")
    for _ in range(50):
        late = late @ late
    copied = target.clone()  # computed from what was there before, if the copy waits
    device.copy_in([(target, source)], device.mark())
    assert int(copied.min()) == int(copied.max()) == 1
    assert int(target.min()) == 3
