"""What packing saves and what unpacking costs: sizes of real checkpoints, and rates of one core beside memcpy and disk.

    python benchmarks/pack.py MODEL ... [--out DIR] [--keep] [--report FILE]

Each model is packed to DIR (beside it by default, removed afterwards), verified byte by byte, and unpacked from memory
by one core with every decoder that this processor has. memcpy moves as many bytes as come out; the disk gives its bytes
directly, past the page cache, to as many agents as it likes. All in one process, in turns, the best of several rounds.
"""

import argparse
import json
import platform
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from hermes.checkpoint import Checkpoint, open_checkpoint, open_reader
from hermes.checkpoint.decoder import decode_chunks, instruction_sets
from hermes.checkpoint.layout import Encoding
from hermes.checkpoint.pack import pack
from hermes.checkpoint.unpack import verify
from hermes.memory.arena import Arena
from hermes.profile import measure_bandwidth

SAMPLE_BYTES = 256 << 20
"""Unpacked, of the largest tensors: far more than any cache."""
ROUNDS = 5


def main() -> None:
    """Measure each model; a table on standard output, records with --report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="where packed copies go; beside each model otherwise")
    parser.add_argument("--keep", action="store_true", help="leave the packed copies")
    parser.add_argument("--report", type=Path, help="JSON of all figures")
    options = parser.parse_args()
    records = []
    for model in options.models:
        out = (options.out or model.resolve().parent) / f"{model.name}-packed"
        if out.exists():
            sys.exit(f"{out} is there already; remove it, or give another --out")
        start = time.perf_counter()
        pack(model, out)
        packing_seconds = time.perf_counter() - start
        try:
            records.append(measure(model, out, packing_seconds))
        finally:
            if not options.keep:
                shutil.rmtree(out, ignore_errors=True)
        print(render(records[-1]), flush=True)
    if options.report:
        machine = {"processor": platform.processor() or platform.machine(), "python": sys.version.split()[0]}
        options.report.write_text(json.dumps({"machine": machine, "models": records}, indent=1) + "\n")


def measure(model: Path, out: Path, packing_seconds: float) -> dict:
    """The record of one model."""
    plain, packed = open_checkpoint(model), open_checkpoint(out)
    verify(out, model)
    with open_reader(packed) as reader:
        disk = measure_bandwidth(packed, reader, sample_bytes=SAMPLE_BYTES)
        pieces = sample(packed, reader)
    plain_bytes = sum(stamp.nbytes for stamp in plain.files)
    unpacked_bytes = sum(run.unpacked_bytes for run, _ in pieces)
    target = Arena(unpacked_bytes)
    copied = np.frombuffer(bytearray(RNG.bytes(unpacked_bytes)), np.uint8)
    into = np.frombuffer(target.view, np.uint8)[:unpacked_bytes]
    rates: dict[str, list[float]] = {name: [] for name in ("memcpy", *instruction_sets())}
    for _ in range(ROUNDS + 1):  # the first touches memory
        for name, samples in rates.items():
            start = time.perf_counter()
            if name == "memcpy":
                np.copyto(into, copied)
            else:
                unpack_all(pieces, target, name)
            samples.append(unpacked_bytes / (time.perf_counter() - start))
    return {
        "model": model.name,
        "bytes": plain_bytes,
        "packed_bytes": sum(stamp.nbytes for stamp in packed.files),
        "share": sum(stamp.nbytes for stamp in packed.files) / plain_bytes,
        "chunks": encodings(packed),
        "packing_bytes_per_second": plain_bytes / packing_seconds,
        "disk_bytes_per_second": max(record.bytes_per_second for record in disk),
        "unpacked_bytes_per_second": {name: samples[1:] for name, samples in rates.items()},
    }


RNG = np.random.default_rng(0)


def sample(packed: Checkpoint, reader) -> list:
    """Runs of chunks of the largest tensors with their bytes, as agents would read them."""
    pieces, left = [], SAMPLE_BYTES
    tensors = [(file, tensor) for file, held in packed.packed.items() for tensor in held.tensors]
    for file, tensor in sorted(tensors, key=lambda pair: -pair[1].nbytes):
        for run in packed.packed[file].runs(tensor.begin, tensor.nbytes, run_bytes=4 << 20):
            if left <= 0:
                return pieces
            skip = run.offset % reader.alignment
            length = -(-(skip + run.nbytes) // reader.alignment) * reader.alignment
            arena = Arena(length)
            reader.read_into(file, run.offset - skip, arena.view[:length], skip + run.nbytes)
            pieces.append((run, arena.view[skip : skip + run.nbytes]))
            left -= run.unpacked_bytes
    return pieces


def unpack_all(pieces: list, target: Arena, instruction_set: str) -> None:
    """On this thread."""
    position = 0
    for run, content in pieces:
        decode_chunks(
            content,
            target.view[position : position + run.unpacked_bytes],
            where=run.tensor.name,
            item_bytes=run.tensor.item_bytes,
            number=run.number,
            skip=run.skip,
            instruction_set=instruction_set,
        )
        position += run.unpacked_bytes


def encodings(packed: Checkpoint) -> dict[str, int]:
    """How many chunks of the largest tensor of each file are in each encoding."""
    found: dict[str, int] = {}
    for held in packed.packed.values():
        for tensor in sorted(held.tensors, key=lambda tensor: -tensor.nbytes)[:4]:
            with open(tensor.path, "rb") as stream:
                for place in tensor.places[:-1]:
                    stream.seek(int(place) + 8)
                    name = Encoding(stream.read(1)[0]).name
                    found[name] = found.get(name, 0) + 1
    return found


def render(record: dict) -> str:
    """A few lines for one model."""
    rates = {name: max(samples) for name, samples in record["unpacked_bytes_per_second"].items()}
    memcpy, disk = rates.pop("memcpy"), record["disk_bytes_per_second"]
    lines = [
        f"{record['model']}: {record['share']:.1%} of {record['bytes'] / 1e9:.2f} GB, {record['chunks']}; packed at "
        f"{record['packing_bytes_per_second'] / 1e9:.2f} GB/s; memcpy {memcpy / 1e9:.1f} GB/s, "
        f"disk {disk / 1e9:.2f} GB/s"
    ]
    lines += [
        f"  {name}: {rate / 1e9:.2f} GB/s unpacked on one core, {rate / memcpy:.2f} memcpy, {rate / disk:.1f} disk"
        for name, rate in rates.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
