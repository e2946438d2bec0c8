"""A session from its start to its end: what it leaves behind, whoever ends it."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hermes
from hermes.memory.probe import resident_bytes

WIDTH, DEPTH = 256, 6


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
    for layer in model:  # whose placeholders know what they were bound by
        layer.weight = layer.bias = None
    gc.collect()
    assert engine() is None
