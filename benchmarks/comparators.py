"""What Hermes is compared with: how each is run, in which environment, and the files of its own that it wants."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conditions import MIB, MODELS, ROOT, last_line

PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
HERE = ROOT / "benchmarks" / "peers"
FLOOR_BYTES_OF_PEERS = 450 * MIB
"""What transformers with accelerate holds before any weight; it is told to keep no more weights than the rest."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How one comparator is run, and what it is."""

    what: str
    command: Callable[[Path, int], list[str]]
    prepare: tuple[str, ...] = ()
    leaves: str = ""
    only: tuple[str, ...] = MODELS
    installed: bool = False  # in .venv-peers, or here
    whole: bool = False  # holds the whole model at its end: run only at the cap with room for it, if that is asked for


def script(name: str, *more: str) -> Callable[[Path, int], list[str]]:
    """A command that takes the model and nothing of the cap."""
    return lambda model, cap: [f"{name}.py", str(model), *more]


def packed(model: Path) -> Path:
    """Where its packed copy is."""
    return model.with_name(f"{model.name}.packed")


SPLIT = ("pipelines.py", "pipeswitch", "safetensors", "1", "--split")

PEERS = {
    "hermes": Peer(what="Hermes", command=lambda model, cap: ["hermes_run.py", str(model), str(cap)]),
    "hermes-nothing-resident": Peer(
        what="Hermes, no weight kept between passes",
        command=lambda model, cap: ["hermes_run.py", str(model), str(cap), "nothing-resident"],
    ),
    "hermes-packed": Peer(
        what="Hermes, packed without loss",
        command=lambda model, cap: ["hermes_run.py", str(packed(model)), str(cap)],
        prepare=("pack_weights.py",),
        leaves="packed",
        only=("gpt-j-6b", "llama-3b"),
    ),
    "baseline": Peer(what="transformers, all loaded first", command=script("resident"), whole=True),
    "pipeswitch-torch": Peer(
        what="PipeSwitch port, torch.save files",
        command=script("pipelines", "pipeswitch", "torch", "1"),
        prepare=SPLIT,
        leaves="layers",
        whole=True,
    ),
    "pipeswitch-safetensors": Peer(
        what="PipeSwitch port, safetensors",
        command=script("pipelines", "pipeswitch", "safetensors", "1"),
        whole=True,
    ),
    "pipeload-2": Peer(
        what="PIPELOAD as published, 2 agents",
        command=script("pipelines", "pipeload", "torch", "2"),
        prepare=SPLIT,
        leaves="layers",
        whole=True,
    ),
    "pipeload-6": Peer(
        what="PIPELOAD as published, 6 agents",
        command=script("pipelines", "pipeload", "torch", "6"),
        prepare=SPLIT,
        leaves="layers",
        whole=True,
    ),
    "accelerate": Peer(
        what="transformers + accelerate, disk offload",
        command=lambda model, cap: ["accelerate_offload.py", str(model), str(max(1, cap - FLOOR_BYTES_OF_PEERS))],
        installed=True,
    ),
    "onnxruntime": Peer(
        what="ONNX Runtime, prepacking off, weights mapped",
        command=script("onnx_run"),
        prepare=("onnx_run.py", "--export"),
        leaves="onnx",
        only=("bert-large",),
        installed=True,
    ),
    "llama.cpp": Peer(
        what="llama.cpp, mmap, bf16",
        command=script("llamacpp"),
        prepare=("llamacpp.py", "--convert"),
        leaves="gguf",
        only=("llama-3b",),
        installed=True,
    ),
    "airllm": Peer(
        what="AirLLM",
        command=script("airllm_run"),
        prepare=("airllm_run.py", "--split"),
        leaves="airllm",
        only=("llama-3b",),
        installed=True,
    ),
}

YARDSTICK = Peer(
    what="Hermes, all resident, alone and beside reads",
    command=lambda model, cap: ["yardstick.py", str(model), str(cap)],
)
"""Beside each run of Hermes: what its bound is made of, in the same minute."""


def prepare(peer: Peer, model: Path) -> str | None:
    """Write the files of its own that a peer wants; why it cannot be run, or None."""
    if peer.installed and not PEERS_PYTHON.exists():
        return "not installed (make peers)"
    if not peer.prepare or (model.with_name(f"{model.name}.{peer.leaves}")).exists():
        return None
    first, *rest = peer.prepare
    done = subprocess.run(
        [str(python_of(peer)), str(HERE / first), str(model), *rest], capture_output=True, text=True, check=False
    )
    return None if done.returncode == 0 else f"cannot be prepared: {last_line(done.stderr)}"


def python_of(peer: Peer) -> Path:
    """The interpreter that has the peer's packages."""
    return PEERS_PYTHON if peer.installed else Path(sys.executable)
