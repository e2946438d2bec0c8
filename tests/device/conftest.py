"""A device with memory of its own that every machine has, a GPU where there is one, and small models on disk."""

import threading

import pytest
import torch

import second_device
from hermes.device import DRIVERS, plan_device
from hermes.errors import BudgetError
from small_models import save_families


@pytest.fixture(scope="session")
def driver(request):
    """Of the device named "second"."""
    return second_device.load(request.config.cache.mkdir("second-device"))


@pytest.fixture
def second(driver):
    """The same, with nothing registered before and after, and no agent left behind."""
    assert not driver.registered
    yield driver
    assert not driver.registered
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hermes-")]


no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.fixture(params=["second", pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])])
def kind(request):
    """Of device, for what must hold on each."""
    if request.param == "second":
        request.getfixturevalue("second")
    else:  # the driver's own memory, before any budget is counted
        torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
    return request.param


@pytest.fixture
def shared(kind, monkeypatch):
    """That kind of device shares the host's memory, or is taken to: a GPU reads it over its bus then."""
    monkeypatch.setattr(type(DRIVERS[kind]), "is_integrated", lambda *_: True)


@pytest.fixture
def tight(monkeypatch):
    """Every device's budget is the smallest one, found without preparing the model twice."""

    def plan(blocks, **given):
        with pytest.raises(BudgetError) as refused:
            plan_device(blocks, **given | {"budget_bytes": 1})
        return plan_device(blocks, **given | {"budget_bytes": refused.value.minimum_bytes})

    monkeypatch.setattr("hermes.session.target.plan_device", plan)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return save_families(tmp_path_factory.mktemp("families"))
