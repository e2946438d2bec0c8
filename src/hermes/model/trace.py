"""Which parameters a forward pass uses, in what order, with how many operations and how much activation memory.

The pass runs over fake tensors: shapes and dtypes, no weights, no arithmetic. Modules whose control flow depends on
values cannot be followed so; `trace` then returns None, and the caller falls back to the order of registration, which
the engine corrects in its first real pass.
"""

import gc
import os
import pickle
import select
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hermes.memory.probe import own_bytes
from hermes.model.lean import leave_compiler_out

__all__ = ["REACHING", "Trace", "Use", "tensors_in", "trace", "trace_apart"]

REACHING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""torch's modules whose fast paths take the weights of modules inside them without calling those."""

CHILD_SECONDS = 20.0
"""Without a word from the child that traces; it takes one or two."""


@dataclass(frozen=True, slots=True)
class Use:
    """A parameter is touched while `module` is the innermost one running, in that module's call number `call`."""

    module: str
    call: int
    parameter: str


@dataclass(kw_only=True)
class Trace:
    """What one pass does.

    Attributes:
        uses: in order of execution, repeated uses within one call left out.
        call_starts: for each call of a module, how many uses had happened when it began.
        flops: multiply-adds x 2, by innermost module.
        live_bytes: highest sum of live activations while the module was innermost, by module.
        peak_bytes: highest sum of live activations over the whole pass, inputs and outputs included.
        cache_bytes: key-value cache in the output, for the sequence traced; 0 if there is none.
        output_bytes: all other tensors in the output.
    """

    uses: list[Use] = field(default_factory=list)
    call_starts: dict[int, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    live_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    cache_bytes: int = 0
    output_bytes: int = 0

    def tokens(self, module: str, numel: int) -> int:
        """That a linear layer with a matrix of so many numbers multiplied; 0 if it did not run."""
        return self.flops.get(module, 0) // (2 * max(1, numel))


def trace(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace | None:
    """Run `module(*args, **kwargs)` over fake tensors; None where its control flow depends on values.

    The inputs are real tensors, of which only shape and dtype count. The module is left as it was.
    """
    record = Trace()
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), fake_mode, _fake_weights(module) as names, _module_stack(module, record) as stack:
        recorder = _Recorder(record, names, stack)
        try:
            with recorder:
                fake_args, fake_kwargs = _fake((args, dict(kwargs)))
                output = module(*fake_args, **fake_kwargs)
        except Exception:
            return None
        cache = output.get("past_key_values") if isinstance(output, Mapping) else None
        record.cache_bytes = sum(_nbytes(tensor) for tensor in tensors_in(cache))
        record.output_bytes = sum(_nbytes(tensor) for tensor in tensors_in(output)) - record.cache_bytes
    return record


def trace_apart(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Trace | None, int]:
    """`trace` in a forked child, with which the modules that fake tensors bring in (60 MB) end; and the child's bytes.

    In this process where they are here already, where the system cannot fork, or where the child fails or takes longer
    than it ever should (a fork inherits the locks of threads that it does not).
    """
    if sys.platform != "linux" or "torch._dynamo" in sys.modules:
        return trace(module, args, kwargs), 0
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: see above
        child = os.fork()
    if child == 0:
        try:
            gc.disable()  # it would write to every object, and so copy the memory that both processes share
            leave_compiler_out()
            with open(sender, "wb") as pipe:
                found = trace(module, args, kwargs)
                pickle.dump((found, own_bytes()), pipe)
        finally:
            os._exit(0)
    os.close(sender)
    message = b""
    try:
        with open(receiver, "rb", buffering=0) as pipe:
            while select.select([pipe], [], [], CHILD_SECONDS)[0] and (part := pipe.read(1 << 16)):
                message += part
    finally:
        with suppress(ProcessLookupError, ChildProcessError):  # gone already, where nobody waits for children
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    try:
        result: tuple[Trace | None, int] = pickle.loads(message)
    except (EOFError, pickle.UnpicklingError):
        return trace(module, args, kwargs), 0
    return result


def tensors_in(value: object, _seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every tensor inside nested containers and plain objects (caches, model outputs), once each."""
    seen = set() if _seen is None else _seen
    if value is None or isinstance(value, str | int | float | bool | type | nn.Module) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item, seen)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from tensors_in(vars(value), seen)


class _Recorder(TorchDispatchMode):
    """Sees every operation below autograd: what it touches, what it costs, what it leaves alive."""

    def __init__(self, record: Trace, names: Mapping[int, str], stack: list[tuple[str, int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._record = record
        self._names = names
        self._stack = stack
        self._seen: set[tuple[int, str]] = set()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._live_bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        module, call = self._stack[-1]
        for tensor in tensors_in((args, kwargs)):
            name = self._names.get(tensor.untyped_storage()._cdata)
            if name is not None and (call, name) not in self._seen:
                self._seen.add((call, name))
                self._record.uses.append(Use(module, call, name))
        output = _run(func, args, kwargs)
        if (count := flop_registry.get(getattr(func, "overloadpacket", func))) is not None:
            flops = count(*args, **kwargs, out_val=output)
            self._record.flops[module] = self._record.flops.get(module, 0) + int(flops)
        self._keep(output)
        self._record.live_bytes[module] = max(self._record.live_bytes.get(module, 0), self._live_bytes)
        self._record.peak_bytes = max(self._record.peak_bytes, self._live_bytes)
        return output

    def _keep(self, output: object) -> None:
        for key in [key for key, (reference, _) in self._live.items() if reference.expired()]:
            self._live_bytes -= self._live.pop(key)[1]
        for tensor in tensors_in(output):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._live and key not in self._names:
                self._live[key] = (StorageWeakRef(storage), storage.nbytes())
                self._live_bytes += storage.nbytes()


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.aten._grouped_mm.default:  # its fake kernel knows bf16 alone; the real one takes fp32 too
        rows, weight = args[0], args[1]
        return rows.new_empty(rows.shape[0], weight.shape[-1])
    return func(*args, **kwargs)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _fake(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype)
    if isinstance(value, Mapping):
        return {key: _fake(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_fake(item) for item in value)
    return value


@contextmanager
def _fake_weights(module: nn.Module) -> Iterator[dict[int, str]]:
    """Swap parameters and buffers for fake ones; yields parameter names by storage. Call inside a FakeTensorMode.

    Whatever the pass leaves in a module (tables that are made at the first use, caches) is taken away again.
    """
    before = [(table, dict(table)) for one in module.modules() for table in (vars(one), one._parameters, one._buffers)]
    fakes: dict[int, torch.Tensor] = {}  # tied tensors stay tied
    names: dict[int, str] = {}
    try:
        for prefix, child in module.named_modules():
            for table in (child._parameters, child._buffers):
                for name, tensor in list(table.items()):
                    if tensor is None:
                        continue
                    if id(tensor) not in fakes:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        if table is child._parameters:
                            fake = nn.Parameter(fake, requires_grad=False)
                            names[fake.untyped_storage()._cdata] = f"{prefix}.{name}" if prefix else name
                        fakes[id(tensor)] = fake
                    table[name] = fakes[id(tensor)]
        yield names
    finally:
        for table, entries in before:
            table.clear()
            table.update(entries)


@contextmanager
def _module_stack(module: nn.Module, record: Trace) -> Iterator[list[tuple[str, int]]]:
    """The modules that are running, innermost last, as (name, call number); what is inside of a reaching one is it."""
    stack: list[tuple[str, int]] = [("", 0)]
    calls = 0
    handles = []

    def enter(name: str) -> Any:
        def hook(*_: object) -> None:
            nonlocal calls
            calls += 1
            record.call_starts[calls] = len(record.uses)
            stack.append((name, calls))

        return hook

    def leave(*_: object) -> None:
        stack.pop()

    try:
        reaching = [f"{name}." if name else "" for name, child in module.named_modules() if isinstance(child, REACHING)]
        for name, child in module.named_modules():
            if any(name.startswith(outer) and name for outer in reaching):
                continue
            handles.append(child.register_forward_pre_hook(enter(name), prepend=True))
            handles.append(child.register_forward_hook(leave, always_call=True))
        yield stack
    finally:
        for handle in handles:
            handle.remove()
