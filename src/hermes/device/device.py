"""An accelerator as a second memory: room in it, copies on a stream of their own, host memory that it knows.

Everything that torch does for all accelerators alike goes through torch; the rest is a `Driver`. A device with memory
of its own gets its weights by copies. An integrated one shares the host's memory: there nothing is copied, its tensors
lie over the arenas that the Loading Agents read into (SwapNet's zero-copy swap-in, section 4.2).
"""

import contextlib
import ctypes
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory

from hermes.errors import EngineError, InputError
from hermes.memory.arena import Arena
from hermes.model.binding import HOST
from hermes.units import format_bytes

__all__ = ["DRIVERS", "Device", "Driver", "find_device", "find_devices"]


class Driver(Protocol):
    """What differs between accelerators. Addresses are the host's, in bytes."""

    def register(self, address: int, nbytes: int) -> None:
        """Fix this range in memory, so that the device reads it by itself. Raises RuntimeError."""

    def unregister(self, address: int) -> None:
        """Undo it; nothing reads it any more."""

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        """Registered memory as a tensor of bytes on the device, without a copy."""

    def name(self, device: torch.device) -> str:
        """What its maker calls it."""

    def is_integrated(self, device: torch.device) -> bool:
        """Whether it shares the host's memory."""

    def free_bytes(self, device: torch.device) -> int:
        """Of its memory, that nobody uses."""

    def peak_bytes(self, device: torch.device) -> int:
        """Most that tensors of this process have taken of it at once."""


class _Cuda:
    """`Driver` of NVIDIA's devices, and AMD's, which torch calls the same."""

    def register(self, address: int, nbytes: int) -> None:
        pin_memory(address, nbytes)

    def unregister(self, address: int) -> None:
        unpin_memory(address)

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        return torch.as_tensor(_CudaBytes(address, nbytes), device="cuda")

    def name(self, device: torch.device) -> str:
        return torch.cuda.get_device_name(device)

    def is_integrated(self, device: torch.device) -> bool:
        return bool(torch.cuda.get_device_properties(device).is_integrated)

    def free_bytes(self, device: torch.device) -> int:
        return int(torch.cuda.mem_get_info(device)[0])

    def peak_bytes(self, device: torch.device) -> int:
        return int(torch.cuda.max_memory_allocated(device))


class _CudaBytes:
    """Under one address space for both, registered memory lies where the host has it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3
        }  # fmt: skip


DRIVERS: dict[str, Driver] = {"cuda": _Cuda()}
"""By torch's name for the kind of device."""


class Device:
    """One accelerator. `copy_in` is for one thread, everything else for any.

    Args:
        name: as torch spells it, "cuda" or "cuda:1".

    Attributes:
        device: with its number.
        is_unified: it shares the host's memory.

    Raises InputError where there is none of this name.
    """

    def __init__(self, name: str) -> None:
        self.device = find_device(name)
        self._driver = DRIVERS[self.device.type]
        self.is_unified = self._driver.is_integrated(self.device)
        self._stream: Any = torch.Stream(self.device)
        self._reading = threading.Lock()
        """Held while the device reads registered memory by copies."""

    @property
    def free_bytes(self) -> int:
        """Of its memory, that nobody uses."""
        return self._driver.free_bytes(self.device)

    @property
    def peak_bytes(self) -> int:
        """Most that tensors of this process have taken of it at once."""
        return self._driver.peak_bytes(self.device)

    def __str__(self) -> str:
        whose = "shared with the host" if self.is_unified else "its own"
        name = self._driver.name(self.device)
        return f"{self.device} ({name}): {format_bytes(self.free_bytes)} free, {whose}"

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory of the device's, as bytes."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def host_memory(self, nbytes: int) -> Arena:
        """Memory of the host's that the device reads by itself; all of it is there from now on."""
        return _RegisteredArena(nbytes, self) if nbytes else Arena(0)

    def view(self, arena: Arena) -> torch.Tensor:
        """Such memory as bytes of a device that shares it."""
        return self._driver.view(_address(arena), arena.nbytes) if arena.nbytes else self.empty(0)

    def mark(self) -> torch.Event:
        """What this thread has asked the device to compute up to now."""
        event = torch.Event(self.device)
        event.record(torch.accelerator.current_stream(self.device))
        return event

    def copy_in(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: torch.Event | None) -> None:
        """Copy to each first tensor its second one, once `after` is past; blocks until all are there."""
        with self._reading, torch.no_grad():
            if after is not None:
                self._stream.wait_event(after)
            with self._stream:
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
            self._stream.synchronize()

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        torch.accelerator.synchronize(self.device)

    def register(self, arena: Arena) -> None:
        """Fix it in memory for the device. Raises EngineError where the system does not allow it."""
        try:
            self._driver.register(_address(arena), arena.nbytes)
        except RuntimeError as error:
            raise EngineError(
                f"{self.device} cannot have {format_bytes(arena.nbytes)} of the host's memory registered: "
                f"{' '.join(str(error).split())[:200]}; try a smaller budget"
            ) from error

    def unregister(self, arena: Arena) -> None:
        """Undo it, once nothing is read from it."""
        with self._reading:
            self.synchronize()
            self._driver.unregister(_address(arena))


class _RegisteredArena(Arena):
    """Known to a device until pages of it are given back: those would stay where they are for the device's sake.

    From then on copies from it pass through the driver's own buffer, which is slower, and right.
    """

    _device: Device | None = None

    def __init__(self, nbytes: int, device: Device) -> None:
        super().__init__(nbytes)
        device.register(self)
        self._device = device

    def discard(self, offset: int, nbytes: int) -> None:
        self._forget()
        super().discard(offset, nbytes)

    def close(self) -> None:
        self._forget()
        super().close()

    def __del__(self) -> None:
        self._forget()  # of an engine that could not be made: the addresses are given out again

    def _forget(self) -> None:
        device, self._device = self._device, None
        if device is not None:
            device.unregister(self)


def find_device(name: str) -> torch.device:
    """The device of this name, with its number; nothing is started on it. Raises InputError where there is none."""
    if name == HOST.type:
        return HOST
    device: torch.device | None = None
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    kinds = " or ".join([HOST.type, *DRIVERS])
    if device is None or device.type not in DRIVERS:
        raise InputError(f"unknown device {name!r}; choose {kinds}")
    count = _count(device.type)
    if (device.index or 0) >= count:
        raise InputError(f"device {name!r}: torch sees {count} of this kind; leave --device away to run on the CPU")
    return torch.device(device.type, device.index or 0)


def find_devices() -> list[Device]:
    """All that torch sees; starts each of them."""
    return [Device(f"{kind}:{index}") for kind in DRIVERS for index in range(_count(kind))]


def _count(kind: str) -> int:
    module = torch.get_device_module(kind)
    return module.device_count() if module.is_available() else 0


def _address(arena: Arena) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(arena.view))
