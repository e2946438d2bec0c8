"""What a user types, timed whole: `hermes run` from a cold shell, and text generation with a draft.

    python benchmarks/commands.py shell [--samples N]
    python benchmarks/commands.py draft [--model gpt2-medium|llama-3b] [--budget SIZE] [--new-tokens N]

*shell*: from process start to output, beside processes that only import: `torch` and `transformers`, whose classes come
when they are asked for, and the same with the classes that the model needs. Everything is evicted first, libraries too.
*draft*: one process (peers/hermes_draft.py), in turns. Rows go to docs/commands.json, and from there into
docs/results.md.
"""

import argparse
import json
import sys
from pathlib import Path

import results
from comparators import HERE
from conditions import ENCODERS, MODELS, ROOT, cold_run, disk_rate, last_line, profile, taken
from rows import keep

from hermes.checkpoint.synth import synth
from hermes.units import parse_bytes

SHELL = ("bert-large", "600MiB")
TEXT = " ".join(f"word{number}" for number in range(20))
"""131 tokens."""
IMPORTS = {
    "packages": "import torch, transformers",
    "classes": "import torch; from transformers import AutoModel, AutoTokenizer, BertModel",
}
TIMEOUT_SECONDS = 1200


def timed(command: list[str], model: Path, budget: str) -> tuple[float, str]:
    """Seconds of a cold process, and what it printed."""
    done = cold_run([sys.executable, *command], model, limit_bytes=parse_bytes(budget), timeout_seconds=TIMEOUT_SECONDS)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {last_line(done.stderr)}")
    return done.seconds, done.stdout


def shell(samples: int) -> dict:
    """A row: seconds of each, in turns."""
    name, budget = SHELL
    model = synth(name, ROOT / "models" / name)
    profile(name, model, "free")
    run = ["-m", "hermes", "run", str(model), "--budget", budget, "--text", TEXT, "--json"]
    commands = {"run": run, **{what: ["-c", code] for what, code in IMPORTS.items()}}
    runs: dict[str, list[float]] = {what: [] for what in commands}
    rates = []
    for _ in range(samples):
        rates.append(disk_rate(model, "free"))
        for what, command in commands.items():
            runs[what].append(timed(command, model, budget)[0])
            print(name, what, f"{runs[what][-1]:.2f} s", flush=True)
    return {"kind": "shell", "model": name, "budget": budget, "disk_rates": rates, "runs": runs, "taken": taken()}


def draft(name: str, budget: str, new_tokens: int) -> dict:
    """A row: what the process says of itself."""
    model = synth(name, ROOT / "models" / name)
    profile(name, model, "free")
    _, said = timed([str(HERE / "hermes_draft.py"), str(model), budget, str(new_tokens)], model, budget)
    print(name, said, flush=True)
    return {"kind": "draft", "model": name, "budget": budget, "runs": json.loads(said), "taken": taken()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("shell", "draft"))
    parser.add_argument("--model", choices=[name for name in MODELS if name not in ENCODERS], default="gpt2-medium")
    parser.add_argument("--budget", default="600MiB")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--samples", type=int, default=5)
    options = parser.parse_args()
    row = (
        shell(options.samples) if options.kind == "shell" else draft(options.model, options.budget, options.new_tokens)
    )
    keep("commands", [row], keys=("kind", "model"))
    results.write()


if __name__ == "__main__":
    main()
