"""What benchmarks/fleet.py runs in processes of their own: `python fleet_runs.py WEIGHTS JSON` prints a JSON line."""

import hashlib
import itertools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "examples" / "vision")]

from reading import Reading  # noqa: E402
from turns import in_turns  # noqa: E402

MIB = 2**20
SCENES = ("road", "junction", "field")
WARM_ROUNDS = len(SCENES)


class Watch:
    """Wall seconds of a block, and the share of the cores' time that other processes took meanwhile."""

    def __enter__(self) -> "Watch":
        self._own, self._all = own_seconds(), busy_seconds()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        others = busy_seconds() - self._all - (own_seconds() - self._own)
        self.disturbed = max(0.0, others / (self.seconds * (os.cpu_count() or 1)))


def own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def busy_seconds() -> float:
    """Of all cores, in user and kernel mode and stolen by the host. Interrupts count for nobody."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, _, _, steal = map(int, fields[:8])
    return (user + nice + system + steal) / os.sysconf("SC_CLK_TCK")


def probe(weights: Path, *, kinds: list[str]) -> dict:
    """The floor, and the bytes that all models would take at once: weights, and activations of a request of each."""
    fleet, _, names = make_fleet(weights, kinds, limit_bytes=64 * 2**30, policy="deadline")
    with fleet:
        plan = fleet.start()
        bytes_of = {name: fleet.report().models[name].weight_bytes for name in names}
        activations = {
            name: fleet.candidates[name].activation_bytes + fleet.candidates[name].scratch_bytes for name in names
        }
    return {
        "floor_bytes": plan.floor_bytes,
        "demand_bytes": sum(bytes_of.values()) + sum(activations.values()),
        "weight_bytes": bytes_of,
        "activation_bytes": activations,
    }


def fleet_run(weights: Path, *, kinds: list[str], policy: str, rounds: int, budget_bytes: int, path: str) -> dict:
    begun = time.perf_counter()
    fleet, inputs, names = make_fleet(weights, kinds, limit_bytes=budget_bytes, policy=policy)
    digests: dict[str, list[str]] = {name: [""] * len(SCENES) for name in names}
    latencies: dict[str, list[float]] = {name: [] for name in names}
    served: dict[str, list[float]] = {name: [] for name in names}
    bytes_read = dict.fromkeys(names, 0)

    def client(name: str, count: int) -> None:
        for number in range(count):
            start = time.perf_counter()
            output = fleet.submit(name, inputs[name][number % 3]).result()
            latencies[name].append(time.perf_counter() - start)
            found = digest(output)
            before = digests[name][number % 3]
            digests[name][number % 3] = found if before in ("", found) else "differs"

    def loop(count: int) -> None:
        clients = [threading.Thread(target=client, args=(name, count)) for name in names]
        for one in clients:
            one.start()
        for one in clients:
            one.join()

    with fleet:
        added = time.perf_counter()
        plan = fleet.start()
        started = time.perf_counter()
        loop(WARM_ROUNDS)
        warmed = time.perf_counter()
        latencies = {name: [] for name in names}
        turns = []
        for count in in_turns(path, rounds):
            loop(1)  # and nothing of it counts: it comes after idling
            latencies = {name: seconds[: len(served[name])] for name, seconds in latencies.items()}
            before = {name: one.bytes_read for name, one in fleet.report().models.items()}
            with Watch() as watch:
                loop(count)
            turns.append(watch)
            report = fleet.report()
            for name in names:
                done = list(fleet._members[name].worker.answered)[-count:]
                served[name] += [one.ended_seconds - one.began_seconds for one in done]
                bytes_read[name] += report.models[name].bytes_read - before[name]
    cold, warm = (plan.predict(dict.fromkeys(names, n)) for n in (WARM_ROUNDS, WARM_ROUNDS + rounds))
    return {
        "requests": rounds * len(names),
        "seconds": sum(watch.seconds for watch in turns),
        "turn_seconds": [watch.seconds for watch in turns],
        "disturbed": statistics.mean(watch.disturbed for watch in turns),
        "predicted_seconds": warm.makespan_seconds - cold.makespan_seconds,
        "adding_seconds": added - begun,
        "planning_seconds": started - added,
        "cold_seconds": warmed - started,
        "bytes_per_second": plan.bytes_per_second,
        "peak_bytes": report.peak_bytes,
        "floor_bytes": plan.floor_bytes,
        "heap_bytes": plan.heap_bytes,
        "max_active": plan.max_active,
        "windows": {name: one.ring_bytes for name, one in plan.plans.items()},
        "quotas": dict(plan.quotas),
        "models": {
            name: {
                "latency_seconds": latencies[name],
                "served_seconds": served[name],
                "measured_alone_seconds": fleet.candidates[name].compute_seconds,
                "bytes_read": bytes_read[name],
            }
            for name in names
        },
        "digests": [digests[name] for name in names],
    }


def delays(weights: Path, *, kind: str, rounds: int = 7) -> dict:
    """SwapNet's delay model of one CNN, from its blocks loaded, run and unloaded one at a time; medians of rounds."""
    from dataclasses import asdict, replace

    import torch
    from cnns import MODELS
    from pictures import paint, tensor_of

    import hermes
    from hermes.profile import fit_delays

    with torch.device("meta"):
        module = MODELS[kind].build()
    pixels = tensor_of(paint(SCENES[0]), MODELS[kind].side)
    times: dict[int, list[tuple[float, float, float]]] = {}
    with hermes.Blocks(
        module,
        weights / f"{kind}.safetensors",
        "2GiB",
        example_args=(pixels,),
        granularity="leaf",
        matrix_bytes=16 * MIB,
    ) as blocks:
        engine, prepared = blocks._session.engine, blocks._session.prepared
        for _ in range(rounds):
            blocks.begin(pixels)
            while (block := blocks.next_block) is not None:
                marks = [time.perf_counter()]
                blocks.load_block(block)
                while not engine.is_there(block):
                    time.sleep(2e-5)
                marks.append(time.perf_counter())
                blocks.run_block(block)
                marks.append(time.perf_counter())
                blocks.unload_block(block)
                marks.append(time.perf_counter())
                times.setdefault(block, []).append(tuple(b - a for a, b in itertools.pairwise(marks)))
            blocks.result()
        samples = []
        for block, rows in times.items():
            t_in, t_ex, t_out = (statistics.median(column) for column in zip(*rows[1:], strict=True))
            sample = prepared.sample(prepared.partition.units[block])
            samples.append(replace(sample, in_seconds=t_in, ex_seconds=t_ex, out_seconds=t_out))
    out_seconds = statistics.median(sample.out_seconds for sample in samples)
    return {"samples": len(samples), "out_median_seconds": out_seconds} | asdict(fit_delays(samples))


def make_fleet(weights: Path, kinds: list[str], *, limit_bytes: int, policy: str) -> tuple:
    import torch
    from cnns import MODELS
    from pictures import paint, tensor_of

    import hermes

    published = policy == "as published"
    fleet = hermes.Fleet(budget=limit_bytes, policy="round-robin" if published else policy)
    names, inputs = [], {}
    for number, kind in enumerate(kinds):
        name = f"{kind} {number}"
        with torch.device("meta"):
            module = MODELS[kind].build()
        inputs[name] = [tensor_of(paint(scene), MODELS[kind].side) for scene in SCENES]
        fleet.add(
            name,
            module,
            weights / f"{kind}.safetensors",
            example_args=(inputs[name][0],),
            resident_bytes=0 if published else None,
        )
        names.append(name)
    return fleet, inputs, names


def resident(
    weights: Path, *, kinds: list[str], rounds: int, path: str | None = None, read_bytes: int = 0, window_bytes: int = 0
) -> dict:
    """Plain modules, all in memory, one request after the other in one thread: the swap-free yardstick.

    With `read_bytes` as many are read beside each round, into a window of that size, and nobody needs them.
    """
    import torch
    from cnns import MODELS
    from pictures import paint, tensor_of
    from safetensors.torch import load_file

    modules, inputs, digests = [], [], []
    for kind in kinds:
        module = MODELS[kind].build()
        module.load_state_dict(load_file(weights / f"{kind}.safetensors"))
        modules.append(module)
        inputs.append([tensor_of(paint(scene), MODELS[kind].side) for scene in SCENES])
    reading = Reading([weights / f"{kind}.safetensors" for kind in kinds], read_bytes, window_bytes)
    with torch.no_grad():
        for module, pixels in zip(modules, inputs, strict=True):
            digests.append([digest(module(x)) for x in pixels])  # and the kernels are warm
        seconds: list[list[float]] = [[] for _ in modules]
        turns = []
        for count in in_turns(path, rounds):
            for module, pixels in zip(modules, inputs, strict=True):
                module(pixels[0])  # after idling, as the fleet's first round
            with Watch() as watch:
                for number in range(count):
                    reading.start()
                    for index, module in enumerate(modules):
                        start = time.perf_counter()
                        output = module(inputs[index][number % 3])
                        seconds[index].append(time.perf_counter() - start)
                        digest(output)  # as the fleet's clients do
                    reading.wait()
            turns.append(watch)
    return {
        "digests": digests,
        "model_seconds": seconds,
        "seconds": sum(watch.seconds for watch in turns),
        "turn_seconds": [watch.seconds for watch in turns],
        "requests": rounds * len(modules),
        "disturbed": statistics.mean(watch.disturbed for watch in turns),
    }


def plain(weights: Path, *, kind: str) -> dict:
    """One model as it is usually loaded and run, alone: the memory that takes at its peak, above the imports."""
    import torch
    from cnns import MODELS
    from pictures import paint, tensor_of
    from safetensors.torch import load_file

    from hermes.memory.probe import peak_resident_bytes, resident_bytes

    torch.nn.functional.conv2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3))  # a kernel's own code and threads
    before = resident_bytes()
    module = MODELS[kind].build()
    module.load_state_dict(load_file(weights / f"{kind}.safetensors"))
    with torch.no_grad():
        for scene in SCENES:
            module(tensor_of(paint(scene), MODELS[kind].side))
    return {"bytes": peak_resident_bytes() - before}


def reload(weights: Path, *, kinds: list[str], rounds: int) -> dict:
    """Each model alone, loaded anew for each request: what fits any cap that the largest model fits."""
    import gc

    import torch
    from cnns import MODELS
    from pictures import paint, tensor_of
    from safetensors import safe_open

    def answer(kind: str, scene: str) -> None:
        with torch.device("meta"):
            module = MODELS[kind].build()
        with safe_open(weights / f"{kind}.safetensors", "pt") as file:
            module.load_state_dict({key: file.get_tensor(key) for key in file.keys()}, assign=True)
        with torch.no_grad():
            module(tensor_of(paint(scene), MODELS[kind].side))

    return _rounds(kinds, rounds, answer, gc.collect)


def split(weights: Path, *, kinds: list[str], folder: str) -> dict:
    """Accelerate's own files, a tensor each, which take more memory to write than the cap allows."""
    from accelerate.utils import offload_state_dict
    from safetensors.torch import load_file

    for kind in set(kinds):
        offload_state_dict(str(Path(folder, kind)), load_file(weights / f"{kind}.safetensors"))
    os.sync()  # not beside what is measured next
    return {}


def accelerate(weights: Path, *, kinds: list[str], rounds: int, folder: str) -> dict:
    """Each model in accelerate's disk offload: every layer's weights are read when it runs, and dropped after."""
    import torch
    from accelerate import disk_offload
    from cnns import MODELS
    from pictures import paint, tensor_of
    from safetensors import safe_open

    modules = {}
    for kind in kinds:
        with torch.device("meta"):
            module = MODELS[kind].build()
        with safe_open(weights / f"{kind}.safetensors", "pt") as file:
            buffers = {name: file.get_tensor(name) for name, _ in module.named_buffers()}
        module.load_state_dict(buffers, strict=False, assign=True)
        modules[kind] = disk_offload(module, str(Path(folder, kind)), execution_device=torch.device("cpu"))

    def answer(kind: str, scene: str) -> None:
        with torch.no_grad():
            modules[kind](tensor_of(paint(scene), MODELS[kind].side))

    return _rounds(kinds, rounds, answer, lambda: None)


def _rounds(kinds: list[str], rounds: int, answer: Callable[[str, str], None], after: Callable[[], object]) -> dict:
    for kind in kinds:
        answer(kind, SCENES[0])  # kernels are warm
        after()
    with Watch() as watch:
        for number in range(rounds):
            for kind in kinds:
                answer(kind, SCENES[number % 3])
                after()
    return {"seconds": watch.seconds, "requests": rounds * len(kinds), "disturbed": watch.disturbed}


def digest(output: object) -> str:
    """Of every bit of a tensor, or of a dictionary of tensors."""
    found = hashlib.sha256()
    for tensor in output.values() if isinstance(output, dict) else (output,):
        found.update(memoryview(tensor.contiguous().numpy()))  # no copy: clients share the cores with who computes
    return found.hexdigest()[:16]


RUNS = {"probe": probe, "fleet": fleet_run, "resident": resident, "plain": plain, "reload": reload, "split": split,
        "accelerate": accelerate, "delays": delays}  # fmt: skip

if __name__ == "__main__":
    asked = json.loads(sys.argv[2])
    print(json.dumps(RUNS[asked.pop("what")](Path(sys.argv[1]), **asked)))
