"""On a device with memory of its own: the bits that the whole model has there, in its budget, whatever fails.

The device is a simulated one (`second_device.cpp`): torch takes it for real, and its copies come late.
"""

import gc
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hermes
import second_device
from hermes.checkpoint import open_checkpoint
from hermes.checkpoint.pack import pack
from hermes.checkpoint.quantize import quantize
from hermes.checkpoint.synth import synth
from hermes.device import Device, plan_device
from hermes.errors import BudgetError, EngineError, HermesError, InputError, ReadError
from hermes.memory.probe import resident_bytes
from small_models import FAMILIES, IDS, bits, cast

MIB = 2**20


def load(path, device_budget=None, **options):
    options = {"sequence_length": 8, "max_new_tokens": 8, "resident_bytes": 0} | options
    budget = resident_bytes() + 600 * MIB
    return hermes.load(path, budget=budget, device="second", device_budget=device_budget, **options)


def on_second(inputs):
    return {name: value.to("second") for name, value in inputs.items()}


def assert_equal(got, expected):
    assert len(got) == len(expected)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))


def passes(model):
    for _ in range(3):  # agents are ahead: what is wrong with the next one shows in one of these
        model(IDS.to("second"))


def smallest(path, **options):
    """The smallest device budget."""
    with pytest.raises(BudgetError, match="--device-budget") as refused:
        load(path, 1, **options)
    return refused.value.minimum_bytes


@pytest.fixture
def tight(monkeypatch):
    """Every device's budget is the smallest one, found without preparing the model twice."""

    def plan(blocks, **given):
        with pytest.raises(BudgetError) as refused:
            plan_device(blocks, **given | {"budget_bytes": 1})
        return plan_device(blocks, **given | {"budget_bytes": refused.value.minimum_bytes})

    monkeypatch.setattr("hermes.session.target.plan_device", plan)


PAIRS = [*((name, torch.float32) for name in FAMILIES), ("llama", torch.bfloat16), ("t5", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_streamed_is_resident(name, dtype, checkpoints, second, tight):
    family, path = FAMILIES[name], checkpoints[name]
    options = {"auto_class": family.model, "dtype": dtype}
    inputs = on_second(cast(family.inputs, dtype))
    with torch.no_grad():
        resident = family.model.from_pretrained(path, dtype=dtype).to("second")
        expected = bits(resident(**inputs))
        with load(path, **options) as model:
            plan = model.hermes.target.plan
            assert plan.pass_bytes > 0
            for _ in range(3):
                assert_equal(bits(model(**inputs)), expected)
            assert model.device.type == "second"
            if family.generates:
                wanted = {"max_new_tokens": 8, "do_sample": False}
                given = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
                assert torch.equal(model.generate(**given, **wanted).cpu(), resident.generate(**given, **wanted).cpu())


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("granularity", ["leaf", "layer"])
def test_any_budget(granularity, share, checkpoints, second):
    family, path = FAMILIES["llama"], checkpoints["llama"]
    least = smallest(path, granularity=granularity)
    with torch.no_grad():
        expected = bits(family.model.from_pretrained(path).to("second")(input_ids=IDS.to("second")))
        before = torch.ops.second_device.allocated_bytes()
        torch.ops.second_device.reset_peak()
        with load(path, int(least + share * 600_000), granularity=granularity) as model:
            plan, source, stats = model.hermes.target.plan, model.hermes.source, model.hermes.stats
            for number in range(3):
                copied = source.copied_bytes
                assert_equal(bits(model(input_ids=IDS.to("second"))), expected)
                if number:  # the agents are ahead by a window at most, in both
                    assert abs(source.copied_bytes - copied - plan.pass_bytes) <= plan.ring_bytes
            assert (plan.pass_bytes == 0) == (share == 1.0)
            assert stats.passes == 3
        taken = torch.ops.second_device.peak_bytes() - before
    assert taken <= plan.peak_bytes
    assert model.hermes.target.device.peak_bytes >= taken


def test_what_stays_there_is_read_once_and_not_kept_here(checkpoints, second):
    with load(checkpoints["bert"], resident_bytes=None) as model, torch.no_grad():
        for _ in range(3):
            model(IDS.to("second"))
        assert model.hermes.source.is_settled
        assert model.hermes.plan.resident_bytes == 0
        assert model.hermes.stats.pass_bytes[1:] == [0, 0]


def test_what_passes_through_may_stay_here(checkpoints, second, tight):
    path = checkpoints["bert"]
    with load(path, resident_bytes=None) as model, torch.no_grad():
        expected = bits(model(IDS.to("second")))
        assert model.hermes.plan.resident_bytes > 0
        assert second.registered  # the device copies from it by itself
        model(IDS.to("second"))
        assert model.hermes.stats.pass_bytes[-1] == 0
        # Pages that the device holds would not come free: they are let go of first.
        engine = model.hermes.engine
        engine.resize(engine.ledger.reserved_bytes - 64 * 2**10)
        assert_equal(bits(model(IDS.to("second"))), expected)
        assert_equal(bits(model(IDS.to("second"))), expected)
        assert model.hermes.stats.evicted_bytes > 0
        assert model.hermes.stats.pass_bytes[-1] > 0


@pytest.mark.parametrize(("name", "resident_bytes"), [("bert", 0), ("gpt2", 300_000), ("llama", None)])
def test_memory_that_is_shared_is_not_copied(name, resident_bytes, checkpoints, second):
    second.is_unified = True
    family, path = FAMILIES[name], checkpoints[name]
    inputs = on_second(family.inputs)
    with torch.no_grad():
        expected = bits(family.model.from_pretrained(path).to("second")(**inputs))
        with load(path, auto_class=family.model, resident_bytes=resident_bytes) as model:
            assert model.hermes.target.plan is None
            assert second.registered
            for _ in range(3):
                assert_equal(bits(model(**inputs)), expected)
            assert (model.hermes.stats.pass_bytes[-1] == 0) == (resident_bytes is None)


def test_what_a_device_computes_from_stays_where_it_is(checkpoints, second):
    second.is_unified = True
    with load(checkpoints["bert"], resident_bytes=None) as model, torch.no_grad():
        expected = bits(model(IDS.to("second")))
        engine, registered = model.hermes.engine, dict(second.registered)
        reserved = engine.ledger.reserved_bytes
        assert engine.resize(reserved - 64 * 2**10) == reserved
        assert second.registered == registered
        assert_equal(bits(model(IDS.to("second"))), expected)
        assert model.hermes.stats.pass_bytes[-1] == 0


def test_weights_that_are_used_out_of_turn(tmp_path, second):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(300, 300), nn.Linear(300, 300)

        def forward(self, x):
            return self.second(self.first(x)) @ self.first.weight

    torch.manual_seed(0)
    module = Tied().eval()
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    x = torch.randn(3, 300).to("second")
    with torch.no_grad():
        expected = module.to("second")(x)
        with torch.device("meta"):
            bare = Tied()
        budget = resident_bytes() + 600 * MIB
        with hermes.stream(bare, tmp_path / "w.safetensors", budget, device="second", device_budget="100MiB") as model:
            assert torch.equal(model(x).cpu(), expected.cpu())


def test_a_packed_checkpoint(checkpoints, tmp_path, second, tight):
    path = checkpoints["llama"]
    pack(path, tmp_path / "packed")
    with torch.no_grad():
        expected = bits(FAMILIES["llama"].model.from_pretrained(path).to("second")(IDS.to("second")))
        with load(tmp_path / "packed") as model:
            assert_equal(bits(model(IDS.to("second"))), expected)


def test_a_longer_text_than_was_planned_for_is_refused_before_it_is_begun(checkpoints, second, tight):
    path = checkpoints["bert"]
    with load(path) as model, torch.no_grad():
        with pytest.raises(BudgetError, match="--device-budget"):
            model(torch.ones(1500, 100, dtype=torch.long).to("second"))
        model(IDS.to("second"))


def test_a_broken_file_is_named_and_everything_stops(checkpoints, tmp_path, second, tight):
    path = shutil.copytree(checkpoints["llama"], tmp_path / "broken")
    with load(path) as model, torch.no_grad():
        model(IDS.to("second"))
        file = open_checkpoint(path).files[0].path
        with open(file, "r+b") as handle:
            handle.truncate(file.stat().st_size // 2)
        with pytest.raises(ReadError, match=file.name):
            passes(model)
        with pytest.raises(HermesError):
            model(IDS.to("second"))


def test_an_error_of_the_device_comes_out_of_the_wait(checkpoints, second, monkeypatch, tight):
    path = checkpoints["llama"]
    with load(path) as model, torch.no_grad():
        model(IDS.to("second"))

        def fail(*_):
            raise RuntimeError("lost")

        monkeypatch.setattr(model.hermes.target.device, "copy_in", fail)
        with pytest.raises(EngineError, match="lost"):
            passes(model)


def test_memory_that_cannot_be_registered(checkpoints, second, monkeypatch):
    path, given = checkpoints["bert"], []
    least = smallest(path)

    def register(address, nbytes):
        given.append(address)
        if len(given) == 3:  # the first is for measuring, the second holds what stays
            raise RuntimeError("no more of it")
        type(second).register(second, address, nbytes)

    monkeypatch.setattr(second, "register", register)
    with pytest.raises(EngineError, match=r"registered: no more of it; try a smaller budget"):
        load(path, least, resident_bytes=None)
    gc.collect()  # the fixture looks for what is left


def test_closed_while_a_block_is_waited_for(checkpoints, second, monkeypatch, tight):
    path = checkpoints["llama"]
    gate = threading.Event()
    with load(path) as model, torch.no_grad():
        device = model.hermes.target.device
        copy_in = device.copy_in
        model(IDS.to("second"))
        monkeypatch.setattr(device, "copy_in", lambda *args: gate.wait() and copy_in(*args))
        closing = threading.Timer(0.2, model.hermes.close)
        closing.start()
        threading.Timer(0.4, gate.set).start()
        with pytest.raises(EngineError, match="closed"):
            passes(model)
        closing.join()


def test_a_model_that_is_dropped_stops_its_agents(checkpoints, second, tight):
    model = load(checkpoints["bert"])
    with torch.no_grad():
        model(IDS.to("second"))
    del model
    gc.collect()  # the fixture looks for what is left


def test_quantised_matrices_are_refused(checkpoints, tmp_path, second):
    quantize(checkpoints["llama"], tmp_path / "small", "int8", ["model.layers.0.mlp.up_proj.weight"])
    with pytest.raises(InputError, match="unquantised"):
        load(tmp_path / "small")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "mps", "second:1", "cuda:99"])
def test_devices_that_are_not_there(name, checkpoints, second):
    with pytest.raises(InputError, match="device"):
        hermes.load(checkpoints["bert"], budget="4GiB", device=name)


def test_a_budget_for_no_device(checkpoints):
    with pytest.raises(InputError, match="device budget"):
        hermes.load(checkpoints["bert"], budget="4GiB", device_budget="1GiB")


def test_copies_wait_for_what_was_computed_before(second):
    device = Device("second")
    target, late, ones = device.empty(8), device.empty(8), torch.ones(8, dtype=torch.uint8)
    with torch.no_grad():
        stream = torch.Stream(device.device)
        with stream:  # work that is late
            late.copy_(ones, non_blocking=True)
            mark = device.mark()
    device.copy_in([(target, torch.full((8,), 3, dtype=torch.uint8))], mark)
    assert late.cpu().tolist() == [1] * 8
    assert target.cpu().tolist() == [3] * 8


def shell(*arguments, directory):
    """`hermes run` in a process that knows the device."""
    words = ["hermes", "run", *map(str, arguments)]
    code = (
        f"import pathlib, runpy, second_device, sys; second_device.load(pathlib.Path({str(directory)!r})); "
        f"sys.argv = {words!r}; runpy.run_module('hermes', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=Path(second_device.__file__).parent,
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("arch", "given"), [("tiny-gpt2", "--prompt"), ("tiny-bert", "--text")])
def test_from_the_shell(arch, given, tmp_path, second, request):
    path = synth(arch, tmp_path / arch)
    options = [path, given, "the same words", "--device", "second"]
    options += ["--max-new-tokens", "5"] if arch == "tiny-gpt2" else []
    budgets = ["--budget", "2GiB", "--device-budget", "200MiB"]
    library = request.config.cache.mkdir("second-device")
    resident, streamed = (shell(*options, *more, "--json", directory=library) for more in (["--resident"], budgets))
    assert resident.returncode == streamed.returncode == 0, resident.stderr + streamed.stderr
    outcome = json.loads(streamed.stdout)
    assert outcome["outputs"] == json.loads(resident.stdout)["outputs"]
    assert outcome["device"]["name"] == "second:0"
    assert 0 < outcome["device"]["peak_bytes"] <= 200 * MIB
