"""What stays on a device, what is refused there, and what fails: on the simulated one of `second_device.cpp`."""

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
from devices import assert_equal, load, smallest
from hermes.checkpoint import open_checkpoint
from hermes.checkpoint.pack import pack
from hermes.checkpoint.quantize import quantize
from hermes.checkpoint.synth import synth
from hermes.device import find_devices
from hermes.errors import BudgetError, EngineError, HermesError, InputError, ReadError
from hermes.memory.probe import resident_bytes
from hermes.model.inputs import moved
from small_models import FAMILIES, IDS, bits


def passes(model):
    for _ in range(3):  # agents are ahead: what is wrong with the next one shows in one of these
        model(IDS.to("second"))


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
        budget = resident_bytes() + 600 * 2**20
        with hermes.stream(bare, tmp_path / "w.safetensors", budget, device="second", device_budget="100MiB") as model:
            assert torch.equal(model(x).cpu(), expected.cpu())


def test_what_the_host_has_no_memory_for_is_not_reserved_on_the_device(checkpoints, second):
    with load(checkpoints["bert"], resident_bytes=None) as model:
        ledgers = model.hermes.source.ledger, model.hermes.ledger
        nbytes = ledgers[1].free_bytes + 4096
        ledgers[0].resize(ledgers[0].budget_bytes + nbytes)
        with pytest.raises(BudgetError):
            model.hermes.source.take(nbytes)
        assert "late" not in ledgers[0].accounts


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
        load(path, "second", least, resident_bytes=None)
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


def test_closed_by_the_copy_agent_itself(checkpoints, second, monkeypatch, tight):
    with load(checkpoints["llama"]) as model, torch.no_grad():
        device, source, raised = model.hermes.target.device, model.hermes.source, []
        model(IDS.to("second"))

        def close(*_):
            try:
                source.close()
            except RuntimeError as error:
                raised.append(error)

        monkeypatch.setattr(device, "copy_in", close)
        with pytest.raises(EngineError):
            passes(model)
        assert not raised


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


def test_what_doctor_says_of_it(second):
    assert [str(device) for device in find_devices()][-1] == "second:0 (simulated): 1 GiB free, its own"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "mps", "second:1", "cuda:99"])
def test_devices_that_are_not_there(name, checkpoints, second):
    with pytest.raises(InputError, match="device"):
        hermes.load(checkpoints["bert"], budget="4GiB", device=name)


def test_a_budget_for_no_device(checkpoints):
    with pytest.raises(InputError, match="device budget"):
        hermes.load(checkpoints["bert"], budget="4GiB", device_budget="1GiB")


def shell(*arguments, directory):
    """`hermes run` begun, in a process that knows the device."""
    words = ["hermes", "run", *map(str, arguments)]
    code = (
        f"import pathlib, runpy, second_device, sys; second_device.load(pathlib.Path({str(directory)!r})); "
        f"sys.argv = {words!r}; runpy.run_module('hermes', run_name='__main__')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(second_device.__file__).parent,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(("arch", "given"), [("tiny-gpt2", "--prompt"), ("tiny-bert", "--text")])
def test_from_the_shell(arch, given, tmp_path, second, request):
    path = synth(arch, tmp_path / arch)
    options = [path, given, "the same words", "--device", "second"]
    options += ["--max-new-tokens", "5"] if arch == "tiny-gpt2" else []
    budgets = ["--budget", "2GiB", "--device-budget", "200MiB"]
    library = request.config.cache.mkdir("second-device")
    running = [shell(*options, *more, "--json", directory=library) for more in (["--resident"], budgets)]
    (resident, _), (streamed, told) = (process.communicate(timeout=100) for process in running)
    assert running[1].returncode == 0, told
    outcome = json.loads(streamed)
    assert outcome["outputs"] == json.loads(resident)["outputs"]
    assert outcome["device"]["name"] == "second:0"
    assert 0 < outcome["device"]["peak_bytes"] <= 200 * 2**20


def test_arguments_are_moved_wherever_they_stand(second):
    given = {"a": [torch.ones(2), 3], "b": (torch.ones(1, device="meta"), None)}
    there = moved(given, torch.device("second"))
    assert there["a"][0].device.type == "second"
    assert there["a"][1] == 3
    assert there["b"][0].is_meta
