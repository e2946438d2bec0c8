"""A session from its start to its end: what it leaves behind, whoever ends it."""

import errno
import gc
import os
import signal
import threading
import time
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hermes
from hermes.engine import Engine
from hermes.memory.probe import resident_bytes

WIDTH, DEPTH = 256, 6


def agents():
    return [thread for thread in threading.enumerate() if thread.name.startswith("hermes-")]


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


@pytest.fixture
def stream(tmp_path):
    """Starts a session over a row of linear layers."""
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    save_file(nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]).state_dict(), path)

    def start(**options):
        with torch.device("meta"):
            module = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]).eval()
        budget = resident_bytes() + 400 * 2**20
        return hermes.stream(module, path, budget, example_args=(torch.ones(1, WIDTH),), **options)

    return start


def test_a_closed_sessions_engine_goes_although_the_module_stays(stream):
    with stream() as model:
        engine = weakref.ref(model.hermes.engine)
    del model.hermes
    gc.collect()
    assert engine() is None


def no_room(*_, **__):
    raise OSError(errno.ENOMEM, "no room")


@pytest.mark.parametrize(
    "fails", ["session.session.settle_functions", "engine.engine.Holdings", "session.session.Binding"]
)
def test_a_session_that_cannot_be_started_leaves_no_file_open(stream, monkeypatch, fails):
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(f"hermes.{fails}", no_room)
    with pytest.raises(OSError, match="no room"):
        stream()
    assert len(os.listdir("/proc/self/fd")) <= len(before)
    assert not agents()


def test_an_agent_in_whose_thread_a_module_is_collected_waits_for_nobody(stream, monkeypatch):
    """It holds the engine's lock, which another one waits for that is to be joined."""
    taken_in, dropped, collecting = Engine._take_in_fetched, threading.Event(), []

    def take_in(engine):
        if threading.current_thread().name.startswith("hermes-loader-") and not collecting:
            collecting.append(True)
            assert dropped.wait(10)
            gc.collect()
        taken_in(engine)

    monkeypatch.setattr(Engine, "_take_in_fetched", take_in)
    gc.disable()
    try:
        model = stream(resident_bytes=0, num_agents=2)
        wait_until(lambda under_way=model.hermes.engine._line.under_way: collecting and len(under_way) == 2)
        del model
        dropped.set()
        wait_until(lambda: not agents())
    finally:
        gc.enable()


def test_a_module_that_is_dropped_ends_its_agents(stream):
    model = stream()
    del model
    gc.collect()
    assert not agents()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_waits_for_no_agent(stream, monkeypatch):
    model = stream(resident_bytes=0)
    gate, reading, read_into = threading.Event(), threading.Event(), model.hermes.engine._reader.read_into

    def wait_and_read(*args):
        reading.set()
        gate.wait()
        return read_into(*args)

    monkeypatch.setattr(model.hermes.engine._reader, "read_into", wait_and_read)
    computing = threading.Thread(target=model, args=(torch.ones(1, WIDTH),))
    computing.start()
    assert reading.wait(10)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        model.hermes.close()
        for end in [end for end in weakref.finalize._registry if end.peek()[0] is model]:
            end()  # as at the end of the interpreter
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    gate.set()
    computing.join()
    model.hermes.close()
    assert status == 0
