"""The block API: any order of loading, one order of running, the resident output."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hermes
from hermes.memory.probe import resident_bytes


class Loop(nn.Module):
    """A shortcut around the second layer, and the first one again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.isnan().any():
            raise ValueError("not a number")
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.layers[0](x)


@pytest.fixture
def opened(tmp_path):
    torch.manual_seed(1)
    net = Loop().eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    with torch.device("meta"):
        bare = Loop()
    x = torch.ones(1, 256)
    budget = resident_bytes() + 150 * 2**20
    with hermes.Blocks(bare, tmp_path / "w.safetensors", budget, example_args=(x,), granularity="leaf") as blocks:
        yield net, blocks


def test_loaded_run_unloaded(opened):
    net, blocks = opened
    x = torch.linspace(-1, 1, 256).view(1, 256)
    assert len(blocks.names) == 3
    for ahead in (0, 1, 2):
        blocks.begin(x)
        order = []
        while (block := blocks.next_block) is not None:
            for further in range(block, min(3, block + 1 + ahead)):
                blocks.load_block(further)
            blocks.run_block(block)
            blocks.unload_block(block)
            order.append(block)
        assert order == [0, 1, 2, 0]
        with torch.no_grad():
            assert torch.equal(blocks.result(), net(x))


def test_nothing_is_read_unasked(opened):
    _, blocks = opened
    stats = blocks._session.stats
    before = stats.bytes_read
    blocks.begin(torch.ones(1, 256))
    assert blocks.next_block == 0
    assert stats.bytes_read == before
    blocks.run_block(0)
    assert stats.bytes_read - before <= blocks.block_bytes[0]
    for _ in range(20):  # loaded and not run: the window does not fill up
        assert blocks.load_block(2)
        blocks.unload_block(2)
    with pytest.raises(hermes.InputError, match="comes to block 1"):
        blocks.run_block(2)
    with pytest.raises(hermes.InputError, match="under way"):
        blocks.begin(torch.ones(1, 256))
    with pytest.raises(hermes.InputError, match="block 1 next"):
        blocks.result()
    with pytest.raises(hermes.InputError, match="no block 7"):
        blocks.load_block(7)


def test_an_exception_comes_out_and_the_next_forward_runs(opened):
    net, blocks = opened
    blocks.begin(torch.full((1, 256), torch.nan))
    with pytest.raises(ValueError, match="not a number"):
        blocks.result()
    blocks.begin(torch.ones(1, 256))
    while (block := blocks.next_block) is not None:
        blocks.run_block(block)
    with torch.no_grad():
        assert torch.equal(blocks.result(), net(torch.ones(1, 256)))


def test_two_share_a_process_with_a_window_each(tmp_path):
    torch.manual_seed(2)
    net = Loop().eval()
    path = tmp_path / "w.safetensors"
    save_file(net.state_dict(), path)
    x = torch.ones(1, 256)
    budget = resident_bytes() + 250 * 2**20
    opened = []
    for _ in range(2):
        with torch.device("meta"):
            bare = Loop()
        opened.append(hermes.Blocks(bare, path, budget, example_args=(x,), window="1MiB", granularity="leaf"))
    with torch.device("meta"):
        bare = Loop()
    with pytest.raises(hermes.InputError, match="needs a window"):
        hermes.Blocks(bare, path, budget, example_args=(x,), window="64KiB", granularity="leaf")
    for blocks in opened:
        assert blocks.window_bytes == 2**20
        blocks.begin(x)
    while any(blocks.next_block is not None for blocks in opened):
        for blocks in opened:
            if (block := blocks.next_block) is not None:
                blocks.run_block(block)
    for blocks in opened:
        with torch.no_grad():
            assert torch.equal(blocks.result(), net(x))
        blocks.close()
