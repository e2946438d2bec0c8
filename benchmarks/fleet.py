"""SwapNet's scenarios under one cap: several CNNs at once, closed loop, each run in a memory cgroup of its own.

    python benchmarks/fleet.py WEIGHTS [SCENARIO ...] [--requests N] [--caps paper 25 40 60 80] [--policies ...]

Root; one to two minutes a run. The cap is what weights and activations may take above the floor (the process with every
skeleton and kernel, before any weight), which is measured first; the cgroup's limit is cap + floor. Each model has one
client that sends its next request when the last is answered; the requests are shared out evenly. Each client's first
three requests, one a picture, come before the clock starts, here as with the resident modules: memory is touched and
kernels are built. Every output is compared, by digest, with that of the plain resident module. A run during which
other processes took more than a few per cent of the cores is made again. Rows are added to docs/fleet.json, and
docs/fleet.md is made from them. WEIGHTS holds what examples/vision/weights.py writes. `--peer PYTHON` also runs
accelerate's disk offload with an interpreter that has it (`make peers`).
"""

import argparse
import hashlib
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "examples" / "vision")]

MIB = 2**20
SCENARIOS = {
    "self-driving": (843, ("yolov3", "fcn-resnet101", "vgg19", "resnet101")),
    "road-side unit": (900, ("yolov3", "yolov3", "resnet101", "resnet101", "vgg19")),
    "UAV": (1000, ("yolov3", "resnet101")),
}
"""SwapNet's budgets in MiB, and its models. Its FCN has 207 MB, which is FCN on ResNet-101; on ResNet-50 it is 135."""
SCENES = ("road", "junction", "field")
RESULTS = ROOT / "docs" / "fleet.json"
WARM_ROUNDS = len(SCENES)
QUIET = 0.03
"""Of the cores' time, that other processes may take during a run."""
ATTEMPTS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--caps", nargs="*", default=["paper", "25", "40", "60", "80"])
    parser.add_argument("--policies", nargs="+", default=["round-robin", "deadline"])
    parser.add_argument("--baselines", action="store_true", help="measure what is compared with again")
    parser.add_argument("--beside", action="store_true", help="what reading alone takes of the cores")
    parser.add_argument("--peer", help="a Python that has accelerate")
    parser.add_argument("--delays", action="store_true", help="fit the delay model of each CNN first")
    parser.add_argument("--table", action="store_true", help="make the page only")
    parser.add_argument("--child", help="(internal) one run, as JSON")
    options = parser.parse_args()
    if options.child:
        what = json.loads(options.child)
        print(json.dumps(CHILDREN[what.pop("what")](options.weights, **what)))
        return
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"references": {}, "runs": []}
    if options.delays:
        kinds = sorted({kind for _, names in SCENARIOS.values() for kind in names})
        document["delays"] = {kind: child(options.weights, what="delays", kind=kind) for kind in kinds}
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    for scenario in [] if options.table else options.scenarios:
        measure(scenario, options, document)
    from fleet_table import markdown

    (ROOT / "docs" / "fleet.md").write_text(markdown(document))


def measure(scenario: str, options: argparse.Namespace, document: dict) -> None:
    paper, names = SCENARIOS[scenario]
    rounds = max(1, options.requests // len(names))
    known = document["references"].setdefault(scenario, {})

    def save() -> None:
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")

    if options.baselines or "floor_bytes" not in known:
        known |= child(options.weights, what="probe", scenario=scenario)
        save()
    if options.baselines or "resident" not in known:
        known["resident"] = quiet(options.weights, what="resident", scenario=scenario, rounds=rounds)
        save()
    limit_bytes = known["floor_bytes"] + paper * MIB
    if options.baselines or "reload" not in known:
        known["reload"] = quiet(options.weights, limit_bytes, what="reload", scenario=scenario, rounds=4)
        save()
    if options.beside:
        weight_bytes = sum(known["weight_bytes"].values())
        read_bytes = weight_bytes - paper * MIB + max(known["activation_bytes"].values())
        if read_bytes > 0:
            known["beside"] = quiet(options.weights, what="beside", scenario=scenario, rounds=10, read_bytes=read_bytes)
            save()
    if options.peer and (options.baselines or "seconds" not in known.get("accelerate", {})):
        with tempfile.TemporaryDirectory(dir=options.weights) as folder:
            child(options.weights, python=options.peer, what="split", scenario=scenario, folder=folder)
            known["accelerate"] = quiet(
                options.weights, limit_bytes, python=options.peer, what="accelerate", scenario=scenario, rounds=4,
                folder=folder,
            )  # fmt: skip
        save()
    for cap in options.caps:
        cap_bytes = paper * MIB if cap == "paper" else known["demand_bytes"] * int(cap) // 100
        for policy in options.policies:
            limit_bytes = cap_bytes + known["floor_bytes"]
            row = quiet(
                options.weights, limit_bytes, what="fleet", scenario=scenario, policy=policy,
                rounds=rounds, budget_bytes=limit_bytes,
            )  # fmt: skip
            row |= {"scenario": scenario, "cap": cap, "cap_bytes": cap_bytes, "limit_bytes": limit_bytes}
            row |= {"policy": policy, "at": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
            if "digests" in row:
                row["identical"] = row.pop("digests") == known["resident"]["digests"]
            document["runs"] = [
                r for r in document["runs"] if (r["scenario"], r["cap"], r["policy"]) != (scenario, cap, policy)
            ] + [row]
            save()
            print(scenario, cap, policy, {k: v for k, v in row.items() if k not in ("models", "quotas")}, flush=True)


def quiet(weights: Path, limit_bytes: int | None = None, *, python: str = sys.executable, **what: object) -> dict:
    """The first of a few runs that other processes left alone, or the one that they disturbed least."""
    best: dict = {}
    for _ in range(ATTEMPTS):
        row = child(weights, limit_bytes, python=python, **what)
        if not best or row.get("disturbed", 0.0) < best["disturbed"]:
            best = {"disturbed": 0.0} | row
        if best["disturbed"] <= QUIET:
            break
    return best


def child(weights: Path, limit_bytes: int | None = None, *, python: str = sys.executable, **what: object) -> dict:
    """One run in a process of its own, in a cgroup where there is a limit; the weights are evicted first."""
    for path in sorted(weights.glob("*.safetensors")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [python, __file__, str(weights), "--child", json.dumps(what)]
    if limit_bytes is None:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    from capped import run_capped

    run = run_capped(command, limit_bytes=limit_bytes, timeout_seconds=280)
    charged = {"charged_bytes": run.peak_bytes, "oom_kills": run.oom_kills, "major_faults": run.major_faults}
    if run.returncode:
        return charged | {"error": (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]}
    return json.loads(run.stdout.splitlines()[-1]) | charged


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


def probe(weights: Path, *, scenario: str) -> dict:
    """The floor, and the bytes that all models would take at once: weights, and activations of a request of each."""
    fleet, _, names = make_fleet(weights, scenario, limit_bytes=64 * 2**30, policy="deadline")
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


def fleet_run(weights: Path, *, scenario: str, policy: str, rounds: int, budget_bytes: int) -> dict:
    begun = time.perf_counter()
    fleet, inputs, names = make_fleet(weights, scenario, limit_bytes=budget_bytes, policy=policy)
    digests: dict[str, list[str]] = {name: [""] * len(SCENES) for name in names}
    latencies: dict[str, list[float]] = {name: [] for name in names}

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
        before = {name: one.bytes_read for name, one in fleet.report().models.items()}
        latencies = {name: [] for name in names}
        with Watch() as watch:
            loop(rounds)
        report = fleet.report()
        answered = {name: fleet._workers[name].answered[-rounds:] for name in names}
        served = {name: [one.ended_seconds - one.began_seconds for one in done] for name, done in answered.items()}
    cold, warm = (plan.predict(dict.fromkeys(names, n)) for n in (WARM_ROUNDS, WARM_ROUNDS + rounds))
    return {
        "requests": rounds * len(names),
        "seconds": watch.seconds,
        "disturbed": watch.disturbed,
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
                "bytes_read": one.bytes_read - before[name],
            }
            for name, one in report.models.items()
        },
        "digests": [digests[name] for name in names],
    }


def delays(weights: Path, *, kind: str, rounds: int = 7) -> dict:
    """SwapNet's delay model of one CNN, from its blocks loaded, run and unloaded one at a time; medians of rounds."""
    import statistics
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


def make_fleet(weights: Path, scenario: str, *, limit_bytes: int, policy: str) -> tuple:
    import torch
    from cnns import MODELS
    from pictures import paint, tensor_of

    import hermes

    fleet = hermes.Fleet(budget=limit_bytes, policy=policy)
    names, inputs = [], {}
    for number, kind in enumerate(SCENARIOS[scenario][1]):
        name = f"{kind} {number}"
        with torch.device("meta"):
            module = MODELS[kind].build()
        inputs[name] = [tensor_of(paint(scene), MODELS[kind].side) for scene in SCENES]
        fleet.add(name, module, weights / f"{kind}.safetensors", example_args=(inputs[name][0],))
        names.append(name)
    return fleet, inputs, names


def resident(weights: Path, *, scenario: str, rounds: int) -> dict:
    """Plain modules, all in memory, one request after the other in one thread: the swap-free yardstick."""
    import torch
    from cnns import MODELS
    from pictures import paint, tensor_of
    from safetensors.torch import load_file

    modules, inputs, digests = [], [], []
    for kind in SCENARIOS[scenario][1]:
        module = MODELS[kind].build()
        module.load_state_dict(load_file(weights / f"{kind}.safetensors"))
        modules.append(module)
        inputs.append([tensor_of(paint(scene), MODELS[kind].side) for scene in SCENES])
    with torch.no_grad():
        for module, pixels in zip(modules, inputs, strict=True):
            digests.append([digest(module(x)) for x in pixels])  # and the kernels are warm
        seconds: list[list[float]] = [[] for _ in modules]
        with Watch() as watch:
            for number in range(rounds):
                for index, module in enumerate(modules):
                    start = time.perf_counter()
                    module(inputs[index][number % 3])
                    seconds[index].append(time.perf_counter() - start)
    return {"digests": digests, "model_seconds": seconds, "seconds": watch.seconds, "requests": rounds * len(modules),
            "disturbed": watch.disturbed}  # fmt: skip


def beside(weights: Path, *, scenario: str, rounds: int, read_bytes: int) -> dict:
    """The resident modules once more, alone and beside a thread that does nothing but read so much in each round.

    What reading takes of the cores, whoever reads; in two sizes of pieces.
    """
    import torch
    from cnns import MODELS
    from pictures import paint, tensor_of
    from safetensors.torch import load_file

    from hermes.memory.arena import Arena

    names = SCENARIOS[scenario][1]
    modules = {}
    for kind in names:
        modules[kind] = MODELS[kind].build()
        modules[kind].load_state_dict(load_file(weights / f"{kind}.safetensors"))
    inputs = {kind: tensor_of(paint(SCENES[0]), MODELS[kind].side) for kind in names}
    largest = max((weights / f"{kind}.safetensors" for kind in names), key=lambda path: path.stat().st_size)
    file = os.open(largest, os.O_RDONLY | os.O_DIRECT)
    memory = Arena(64 * MIB)
    memory.touch()
    asked: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()

    def read() -> None:
        position = 0
        while (piece := asked.get()) is not None:
            nbytes, count = piece
            for _ in range(count):
                position = (position + nbytes) % (largest.stat().st_size // nbytes * nbytes)
                target = position % (64 * MIB)
                os.preadv(file, [memory.view[target : target + nbytes]], position)

    def loop(piece_bytes: int) -> list[float]:
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            for kind in names:
                if piece_bytes:
                    asked.put((piece_bytes, read_bytes // len(names) // piece_bytes))
                modules[kind](inputs[kind])
            seconds.append(time.perf_counter() - start)
        return seconds

    reader = threading.Thread(target=read)
    reader.start()
    with torch.no_grad(), Watch() as watch:
        loop(0)
        found: dict[str, list[float]] = {}
        for piece_bytes in (0, 8 * MIB, 2 * MIB, MIB, 0):
            found.setdefault(str(piece_bytes), []).extend(loop(piece_bytes))
    asked.put(None)
    reader.join()
    return {"round_seconds": found, "read_bytes": read_bytes, "disturbed": watch.disturbed}


def reload(weights: Path, *, scenario: str, rounds: int) -> dict:
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

    return _rounds(scenario, rounds, answer, gc.collect)


def split(weights: Path, *, scenario: str, folder: str) -> dict:
    """Accelerate's own files, a tensor each, which take more memory to write than the cap allows."""
    from accelerate.utils import offload_state_dict
    from safetensors.torch import load_file

    for kind in set(SCENARIOS[scenario][1]):
        offload_state_dict(str(Path(folder, kind)), load_file(weights / f"{kind}.safetensors"))
    os.sync()  # not beside what is measured next
    return {}


def accelerate(weights: Path, *, scenario: str, rounds: int, folder: str) -> dict:
    """Each model in accelerate's disk offload: every layer's weights are read when it runs, and dropped after."""
    import torch
    from accelerate import disk_offload
    from cnns import MODELS
    from pictures import paint, tensor_of
    from safetensors import safe_open

    modules = {}
    for kind in SCENARIOS[scenario][1]:
        with torch.device("meta"):
            module = MODELS[kind].build()
        with safe_open(weights / f"{kind}.safetensors", "pt") as file:
            buffers = {name: file.get_tensor(name) for name, _ in module.named_buffers()}
        module.load_state_dict(buffers, strict=False, assign=True)
        modules[kind] = disk_offload(module, str(Path(folder, kind)), execution_device=torch.device("cpu"))

    def answer(kind: str, scene: str) -> None:
        with torch.no_grad():
            modules[kind](tensor_of(paint(scene), MODELS[kind].side))

    return _rounds(scenario, rounds, answer, lambda: None)


def _rounds(scenario: str, rounds: int, answer: Callable[[str, str], None], after: Callable[[], object]) -> dict:
    for kind in SCENARIOS[scenario][1]:
        answer(kind, SCENES[0])  # kernels are warm
        after()
    with Watch() as watch:
        for number in range(rounds):
            for kind in SCENARIOS[scenario][1]:
                answer(kind, SCENES[number % 3])
                after()
    return {"seconds": watch.seconds, "requests": rounds * len(SCENARIOS[scenario][1]), "disturbed": watch.disturbed}


def digest(output: object) -> str:
    """Of every bit of a tensor, or of a dictionary of tensors."""
    found = hashlib.sha256()
    for tensor in output.values() if isinstance(output, dict) else (output,):
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


CHILDREN = {"probe": probe, "fleet": fleet_run, "resident": resident, "reload": reload, "split": split,
            "accelerate": accelerate, "delays": delays, "beside": beside}  # fmt: skip

if __name__ == "__main__":
    main()
