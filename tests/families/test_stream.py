"""`hermes.stream`: any module, any state-dict file, whatever its control flow."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import hermes
from hermes.memory.probe import resident_bytes

MIB = 2**20


class Winding(nn.Module):
    """Takes a path that depends on its input, loops over one layer, and shares a weight past its own module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 64)
        self.scale = nn.Parameter(torch.ones(64))
        self.left = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        self.right = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.loop = nn.Linear(64, 64)
        self.register_buffer("shift", torch.zeros(64))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.scale + self.shift
        for _ in range(int(ids.max()) % 4 + 1):
            x = torch.tanh(self.loop(x))
            x = self.left(x) if x.sum() > 0 else self.right(x)
        return functional.linear(x, self.embed.weight)


class Straight(nn.Module):
    """Attention whose projection weights are used by the module around them, convolutions, running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 1000)

    def forward(self, pixels: torch.Tensor, *, flip: bool = False) -> torch.Tensor:
        x = functional.relu(self.norm(self.conv(pixels.flip(-1) if flip else pixels)))
        x = x.flatten(2).transpose(1, 2)
        x, _ = self.attention(x, x, x)
        return self.head(x.mean(1))


def seeded(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    module = cls().eval()
    for tensor in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
        nn.init.uniform_(tensor, 0.01, 0.2)
    return module


def saved(module: nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(module.state_dict(), path)
    else:
        torch.save(module.state_dict(), path)
    return path


def budget() -> int:
    return resident_bytes() + 300 * MIB


PIXELS = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
INPUTS = [torch.tensor([[1, 2, 3]]), torch.tensor([[499, 7, 2]]), torch.tensor([[8, 8, 6]]), torch.tensor([[1, 2, 3]])]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("on_meta", [True, False])
def test_control_flow_that_depends_on_values(tmp_path: Path, suffix: str, on_meta: bool) -> None:
    module = seeded(Winding)
    path = saved(module, tmp_path / f"w{suffix}")
    with torch.no_grad():
        expected = [module(ids) for ids in INPUTS]
        with torch.device("meta" if on_meta else "cpu"):
            net = Winding()
        with hermes.stream(net, path, budget(), resident_bytes=0) as streamed:
            assert isinstance(streamed, Winding)
            for _ in range(2):
                for ids, answer in zip(INPUTS, expected, strict=True):
                    assert torch.equal(streamed(ids), answer)


@pytest.mark.parametrize("example", [True, False])
def test_attention_convolution_and_buffers(tmp_path: Path, example: bool) -> None:
    module = seeded(Straight)
    path = saved(module, tmp_path / "w.safetensors")
    options: dict[str, Any] = {"example_args": (PIXELS,), "example_kwargs": {"flip": True}} if example else {}
    with torch.no_grad(), torch.device("meta"):
        net = Straight()
    with torch.no_grad(), hermes.stream(net, path, budget(), resident_bytes=0, **options) as streamed:
        for flip in (True, False):
            assert torch.equal(streamed(PIXELS, flip=flip), module(PIXELS, flip=flip))


def test_inference_mode_and_gradients_of_inputs(tmp_path: Path) -> None:
    module = seeded(Straight)
    path = saved(module, tmp_path / "w.safetensors")
    expected = module(PIXELS).detach()
    with hermes.stream(seeded(Straight), path, budget(), resident_bytes=0, example_args=(PIXELS,)) as streamed:
        with torch.inference_mode():
            assert torch.equal(streamed(PIXELS), expected)
        assert torch.equal(streamed(PIXELS), expected)


def test_twice_in_one_process_and_after_close(tmp_path: Path) -> None:
    module = seeded(Straight)
    path = saved(module, tmp_path / "w.safetensors")
    with torch.no_grad():
        expected = module(PIXELS)
        first = hermes.stream(seeded(Straight), path, budget(), resident_bytes=0)
        second = hermes.stream(seeded(Straight), path, budget())
        assert torch.equal(first(PIXELS), expected)
        assert torch.equal(second(PIXELS), expected)
        first.hermes.close()
        first.hermes.close()
        assert torch.equal(second(PIXELS), expected)
        second.hermes.close()
        with pytest.raises(hermes.EngineError, match="closed"):
            first(PIXELS)
        with pytest.raises(hermes.EngineError, match="closed"):
            first.head(torch.zeros(1, 32))
        with hermes.stream(first, path, budget(), resident_bytes=0) as again:
            assert torch.equal(again(PIXELS), expected)


def test_what_is_asked_about_weights_costs_nothing(tmp_path: Path) -> None:
    path = saved(seeded(Straight), tmp_path / "w.safetensors")
    with hermes.stream(seeded(Straight), path, budget(), resident_bytes=0) as streamed:
        read = streamed.hermes.stats.bytes_read
        assert {p.device.type for p in streamed.head.parameters()} == {"cpu"}  # where its inputs are to be
        assert all(p.is_meta for p in streamed.head.parameters())
        assert sum(p.numel() for p in streamed.parameters()) > 30_000
        assert streamed.head.weight.requires_grad is True
        assert streamed.head.weight.grad is None
        assert set(streamed.state_dict()) == set(seeded(Straight).state_dict())
        assert streamed.requires_grad_(False) is streamed
        assert "late" not in streamed.hermes.ledger.accounts
        assert streamed.hermes.stats.bytes_read >= read
        # Computed with outside any module's forward, a weight is read, and kept.
        assert torch.equal(streamed.head.weight.T.contiguous(), seeded(Straight).head.weight.detach().T)
        assert streamed.hermes.ledger.accounts["late"] > 0


class Reaching(nn.Module):
    """Takes weights of modules in other modules' time, in all ways, and has what is computed differently added."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.own = nn.Linear(64, 64)
        self.own.forward = lambda x: functional.linear(x, self.own.weight, self.own.bias) * 2  # type: ignore[method-assign]
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.again = self.layers[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.table.weight.device)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        x = self.normed(self.own(x)) + functional.linear(x, self.layers[1].weight.detach())
        x = x + functional.linear(x, self.layers[2].weight.data) if x.sum() != 3 else x
        return functional.linear(self.again(x), self.table.weight)


class Wrapper(nn.Module):
    """Leaves its own name out of the state dict, as torch's checkpoint wrapper does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.state_dict(*args, **kwargs)


def test_a_wrapper_whose_name_is_not_in_the_state_dict(tmp_path: Path) -> None:
    def wrapped() -> nn.Module:
        return nn.Sequential(Wrapper(), nn.Linear(64, 8))

    torch.manual_seed(0)
    module, x = wrapped().eval(), torch.linspace(-1, 1, 3 * 64).view(3, 64)
    path = saved(module, tmp_path / "w.safetensors")
    with torch.no_grad(), hermes.stream(wrapped(), path, budget(), resident_bytes=0, example_args=(x,)) as streamed:
        assert torch.equal(streamed(x), module(x))


@pytest.mark.parametrize("example", [True, False])
def test_weights_in_other_modules_time_are_there_once(tmp_path: Path, example: bool) -> None:
    module, x = seeded(Reaching), torch.linspace(-1, 1, 3 * 64).view(3, 64)
    path = saved(module, tmp_path / "w.pt")
    own = (net := seeded(Reaching)).own.forward
    options: dict[str, Any] = {"example_args": (x,)} if example else {}
    with torch.no_grad():
        expected = module(x)
    with hermes.stream(net, path, budget(), resident_bytes=0, **options) as streamed:
        late = []
        for _ in range(4):
            assert torch.equal(streamed(x), expected)
            late.append(streamed.hermes.ledger.accounts.get("late", 0))
        assert len(set(late)) == 1
    assert net.own.forward is own


class Latents(nn.Module):
    """Returns a view of its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(64, 64))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.latents.expand(2, -1, -1), self.latents


class Keeping(nn.Module):
    """Holds on to such views while other weights pass by, and makes a table at its first use."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = Latents()
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None or len(self.table) != len(x):
            self.table = torch.arange(len(x))
        first, second = self.latents()
        x = self.layers(x) * self.table[:, None]
        return x + first.mean(0).mean(0) + second[0]


@pytest.mark.parametrize("example", [True, False])
def test_views_of_weights_outlive_their_turn(tmp_path: Path, example: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo", torch)  # so that tracing is not in a process of its own
    module, x = seeded(Keeping), torch.linspace(-1, 1, 3 * 64).view(3, 64)
    path = saved(module, tmp_path / "w.safetensors")
    options: dict[str, Any] = {"example_args": (x,)} if example else {}
    with torch.no_grad(), hermes.stream(seeded(Keeping), path, budget(), resident_bytes=0, **options) as streamed:
        assert streamed.table is None
        for _ in range(2):
            assert torch.equal(streamed(x), module(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_torchs_own_encoder_takes_its_own_ways(tmp_path: Path, example: bool, padding: bool) -> None:
    """Nested tensors for padding, one kernel for a layer: chosen by what the weights are, before they are used."""

    def encoder() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 3)

    torch.manual_seed(0)
    module, x = encoder().eval(), torch.randn(2, 6, 64)
    path = saved(module, tmp_path / "w.safetensors")
    mask = torch.tensor([[False] * 4 + [True] * 2, [False] * 6]) if padding else None
    options: dict[str, Any] = {"example_args": (x,)} if example else {}
    with torch.no_grad(), hermes.stream(encoder(), path, budget(), resident_bytes=0, **options) as streamed:
        assert torch.equal(streamed(x, src_key_padding_mask=mask), module(x, src_key_padding_mask=mask))


@pytest.mark.filterwarnings("ignore:for .*which is a no-op")
def test_what_would_be_lost_is_refused(tmp_path: Path) -> None:
    module = seeded(Straight)
    path = saved(module, tmp_path / "w.safetensors")
    with hermes.stream(seeded(Straight), path, budget(), resident_bytes=0) as streamed:
        with pytest.raises(RuntimeError, match="on disk"):
            streamed.load_state_dict(module.state_dict())
        for write in (lambda w: w.zero_(), lambda w: w.data.fill_(1), lambda w: w.__setitem__(0, 1.0)):
            with pytest.raises(hermes.InputError, match="on disk"):
                write(streamed.head.weight)
        with pytest.raises(hermes.InputError, match="on disk"):
            torch.save(streamed.state_dict(), tmp_path / "again.pt")
        with torch.no_grad():
            assert torch.equal(streamed(PIXELS), module(PIXELS))


def test_a_pass_waits_for_another_threads(tmp_path: Path) -> None:
    module = seeded(Straight)
    path = saved(module, tmp_path / "w.safetensors")
    with torch.no_grad():
        expected = module(PIXELS)
    with hermes.stream(seeded(Straight), path, budget(), resident_bytes=0, example_args=(PIXELS,)) as streamed:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: streamed(PIXELS), range(60)))
        assert all(torch.equal(answer, expected) for answer in answers)


def test_outputs_have_no_gradients(tmp_path: Path) -> None:
    module = seeded(Straight)
    path = saved(module, tmp_path / "w.safetensors")
    with hermes.stream(seeded(Straight), path, budget(), resident_bytes=0) as streamed:
        assert not streamed(PIXELS.clone().requires_grad_()).requires_grad
        assert not streamed.head(torch.zeros(1, 32)).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_agents": 0}, "num_agents 0"),
        ({"granularity": "tiny"}, "choose leaf"),
        ({"resident_bytes": -1}, "0 or more"),
        ({"example_args": PIXELS}, "not a tuple"),
    ],
)
def test_options_that_there_are_not(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = saved(seeded(Straight), tmp_path / "w.safetensors")
    with pytest.raises(hermes.InputError, match=message):
        hermes.stream(seeded(Straight), path, budget(), **options)


def test_loaded_in_a_mode_that_is_not_the_callers(tmp_path: Path) -> None:
    module = seeded(Winding)
    path = saved(module, tmp_path / "w.safetensors")
    with torch.inference_mode():
        streamed = hermes.stream(seeded(Winding), path, budget(), resident_bytes=0)
        streamed(INPUTS[0])
    with streamed, torch.no_grad():
        assert torch.equal(streamed(INPUTS[1]), module(INPUTS[1]))


def test_an_exception_in_forward_leaves_it_usable(tmp_path: Path) -> None:
    module = seeded(Straight)
    path = saved(module, tmp_path / "w.safetensors")
    with torch.no_grad(), hermes.stream(seeded(Straight), path, budget(), resident_bytes=0) as streamed:
        with pytest.raises(RuntimeError):
            streamed(torch.zeros(1, 5, 8, 8))
        assert torch.equal(streamed(PIXELS), module(PIXELS))


def test_wrong_checkpoint_is_refused(tmp_path: Path) -> None:
    path = saved(seeded(Straight), tmp_path / "w.safetensors")
    with pytest.raises(hermes.ModelError, match="lacks"):
        hermes.stream(seeded(Winding), path, budget())
