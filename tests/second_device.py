"""The second device (`second_device.cpp`) as torch and Hermes know it: built once, then loaded into this process."""

import hashlib
import subprocess
from pathlib import Path
from types import ModuleType

import torch

from hermes.device import DRIVERS

NAME = "second"
SOURCE = Path(__file__).with_suffix(".cpp")


class SecondDriver:
    """Registered ranges are only noted."""

    def __init__(self):
        self.registered = {}

    def register(self, address, nbytes):
        assert address not in self.registered
        self.registered[address] = nbytes

    def unregister(self, address):
        del self.registered[address]

    def view(self, address, nbytes):
        assert self.registered[address] == nbytes
        return torch.ops.second_device.view(address, nbytes)

    def name(self, device):
        return "simulated"

    def is_integrated(self, device):
        return False

    def free_bytes(self, device):
        return 2**30

    def peak_bytes(self, device):
        return torch.ops.second_device.peak_bytes()


def build(directory):
    """The library, compiled where it is not there yet; a quarter of a minute of computing."""
    torch_home = Path(torch.__file__).parent
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = directory / f"second_device-{key}.so"
    if not library.exists():
        flags = ["-O0", "-std=c++20", "-fPIC", "-shared", "-w"]
        includes = [f"-I{torch_home / 'include'}", f"-I{torch_home / 'include/torch/csrc/api/include'}"]
        libraries = [f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_home / 'lib'}"]
        made = library.with_suffix(".tmp")
        subprocess.run(["g++", *flags, *includes, str(SOURCE), "-o", str(made), *libraries], check=True)
        made.rename(library)
    return library


def load(directory):
    """Build and load it; for good, in this process."""
    torch.ops.load_library(str(build(directory)))
    torch.utils.rename_privateuse1_backend(NAME)
    module = ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    torch._register_device_module(NAME, module)
    driver = SecondDriver()
    DRIVERS[NAME] = driver
    return driver
