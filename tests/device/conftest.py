"""A device with memory of its own that every machine has, and small models on disk."""

import threading

import pytest
import torch

import second_device
from small_models import save_families


@pytest.fixture(scope="session")
def driver(request):
    """Of the device named "second"."""
    return second_device.load(request.config.cache.mkdir("second-device"))


@pytest.fixture
def second(driver):
    """The same, with nothing registered before and after, and no agent left behind."""
    driver.is_unified = False
    assert not driver.registered
    torch.ops.second_device.reset_peak()
    yield driver
    assert not driver.registered
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hermes-")]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return save_families(tmp_path_factory.mktemp("families"))
