"""`hermes run` as a user types it, in a process of its own; where many bad inputs are tried, in this one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hermes import __version__
from hermes.checkpoint.synth import synth
from hermes.cli.jobs import Inputs, make_job
from hermes.tasks.text_generation import GenerateOptions

KEYS = [
    "model", "task", "outputs", "budget_bytes", "floor_bytes", "peak_bytes", "load_seconds", "seconds",
    "first_output_seconds", "seconds_per_pass", "passes", "bytes_read", "stall_seconds", "predicted_seconds",
    "predicted_peak_bytes", "plan", "device",
]  # fmt: skip
ENOUGH = "2GiB"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    return synth("tiny-gpt2", tmp_path_factory.mktemp("run") / "gpt2")


@pytest.fixture
def copy(gpt2, tmp_path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(gpt2, tmp_path / "copy"))


def hermes(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hermes", "run", *map(str, arguments)],
        input=stdin, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def assert_refused(result: subprocess.CompletedProcess[str], message: str) -> None:
    lines = result.stderr.splitlines()
    assert result.returncode == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]


def test_json_streamed_and_resident(gpt2, tmp_path, invoke):
    common = (gpt2, "--prompt", "Hello", "--prompt", "Good day", "--max-new-tokens", "6", "--json")
    streamed = hermes(*common, "--budget", ENOUGH, "--resident-bytes", "0", "--trace", tmp_path / "trace.json")
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stderr == ""
    record = json.loads(streamed.stdout)
    assert list(record) == KEYS
    assert record["task"] == "text-generation"
    assert [output["prompt"] for output in record["outputs"]] == ["Hello", "Good day"]
    assert record["passes"] == 6
    assert record["budget_bytes"] == 2 << 30
    assert record["floor_bytes"] < record["peak_bytes"] < record["budget_bytes"]
    assert 0 < record["first_output_seconds"] < record["seconds"]
    assert record["plan"]["resident_bytes"] == 0
    assert record["plan"]["num_blocks"] > 1
    assert "resident" not in record["plan"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert "inference" in tracks
    assert len(tracks) > 1

    resident = invoke(*common, "--resident")
    assert resident.returncode == 0, resident.stderr
    yardstick = json.loads(resident.stdout)
    assert list(yardstick) == KEYS
    assert yardstick["outputs"] == record["outputs"]
    assert yardstick["passes"] == 6
    assert yardstick["plan"] is None


def test_smallest_budget_in_the_message_works(gpt2):
    common = (gpt2, "--prompt", "Hello", "--max-new-tokens", "3")
    refused = hermes(*common, "--budget", "100MiB")
    assert_refused(refused, r"try --budget \d+MiB")
    minimum = re.search(r"--budget (\d+MiB)", refused.stderr)[1]
    accepted = hermes(*common, "--budget", minimum)
    assert accepted.returncode == 0, accepted.stderr
    assert accepted.stdout.strip()
    assert "exceeded" not in accepted.stderr
    plan, memory, time = accepted.stderr.splitlines()
    assert (plan.split()[0], memory.split()[0], time.split()[0]) == ("plan", "memory", "time")


def test_version():
    for options in (["--version"], ["--verbose", "--version", "run"]):
        done = subprocess.run([sys.executable, "-m", "hermes", *options], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """A run that has said its first text; with Ctrl-C as in a terminal, wherever these tests run."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hermes", "run", *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.read(1)
    return process


@pytest.fixture
def endless(tmp_path):
    """A model that has positions for more tokens than anybody waits for."""
    directory = synth("tiny-llama", tmp_path / "llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20_000}))
    return directory


def test_interrupt(endless):
    process = start(
        endless, "--prompt", "Hi", "--max-new-tokens", "9000", "--budget", ENOUGH, "--repetition-penalty", "2.0"
    )
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "interrupted\n"


def test_interrupt_while_the_command_is_imported():
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from hermes.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_file_that_changes_while_running(copy, invoke, monkeypatch):
    from hermes.tasks.streaming import BatchStreamer

    monkeypatch.setattr(BatchStreamer, "put", lambda *_: os.truncate(copy / "model.safetensors", 1000))
    result = invoke(copy, "--prompt", "Hi", "--max-new-tokens", "9", "--budget", "8GiB", "--resident-bytes", "0")
    assert_refused(result, r"model\.safetensors")


@pytest.mark.slow
def test_a_reader_that_goes_away(endless):
    process = start(
        endless, "--prompt", "Hi", "--max-new-tokens", "9000", "--budget", ENOUGH, "--repetition-penalty", "2.0"
    )
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_images_and_texts(tmp_path, invoke):
    vit, bert = synth("tiny-vit", tmp_path / "vit"), synth("tiny-bert", tmp_path / "bert")
    image = pytest.importorskip("PIL.Image").linear_gradient("L")
    image.save(tmp_path / "a.png")
    for arguments in ((vit, "--image", tmp_path / "a.png"), (bert, "--text", "one", "--text", "two", "--pool", "cls")):
        streamed, resident = (
            invoke(*arguments, "--budget", "8GiB", "--json"),
            invoke(*arguments, "--resident", "--json"),
        )
        assert json.loads(streamed.stdout)["outputs"] == json.loads(resident.stdout)["outputs"]
    people = invoke(vit, "--image", tmp_path / "a.png", "--budget", "8GiB")
    assert re.fullmatch(r".*a\.png: LABEL_\d [\d.]+%.*\n", people.stdout)


BEAMS = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}


def test_a_model_that_searches_with_beams(copy, invoke, tmp_path):
    (copy / "generation_config.json").write_text(json.dumps(BEAMS))
    common = (copy, "--max-new-tokens", "5")
    prompts = ("--prompt", "Hello", "--prompt", "Good day")
    resident = json.loads(invoke(*common, *prompts, "--resident", "--json").stdout)
    streamed = json.loads(invoke(*common, *prompts, "--budget", "8GiB", "--json").stdout)
    assert streamed["outputs"] == resident["outputs"]
    assert len(streamed["outputs"]) == 2
    people = invoke(*common, *prompts, "--budget", "8GiB")
    assert [output["text"] in people.stdout for output in streamed["outputs"]] == [True, True]
    (tmp_path / "in.jsonl").write_text('"Hello"\n"Good day"\n')
    filed = invoke(*common, "--budget", "8GiB", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert filed.returncode == 0, filed.stderr
    found = [json.loads(line)["generated"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found == [output["text"] for output in streamed["outputs"]]
    drafted = invoke(*common, "--prompt", "x", "--budget", "8GiB", "--draft", "prompt-lookup")
    assert_refused(drafted, "--draft is not for .*3 beams")


def test_beams_are_planned_for(copy):
    def workload():
        return make_job(
            copy,
            Inputs(prompts=["Hello", "Good day"]),
            task=None,
            generate=lambda count: GenerateOptions(max_new_tokens=count),
            max_new_tokens=4,
            pool=None,
            trust_remote_code=False,
        ).workload

    (copy / "generation_config.json").unlink(missing_ok=True)
    assert workload().batch_size == 2
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "config.json").write_text(json.dumps(config | {"num_beams": 2}))
    assert workload().batch_size == 4
    (copy / "generation_config.json").write_text(json.dumps(BEAMS))
    assert workload().batch_size == 6


def test_standard_input_is_a_prompt(gpt2, invoke):
    piped = invoke(gpt2, "--budget", "8GiB", "--max-new-tokens", "2", "--json", stdin="Hello\n")
    assert json.loads(piped.stdout)["outputs"][0]["prompt"] == "Hello"


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return synth("tiny-bert", tmp_path_factory.mktemp("run") / "bert")


def test_lines_of_standard_input_end_with_newlines_alone(bert, invoke):
    piped = invoke(bert, "--resident", "--json", stdin="one\u2028still one\n two\x0bstill\x85two\n")
    texts = [output["text"] for output in json.loads(piped.stdout)["outputs"]]
    assert texts == ["one\u2028still one", " two\x0bstill\x85two"]


def test_text_that_is_no_utf8(bert, gpt2):
    for model in (bert, gpt2):
        done = subprocess.run(
            [sys.executable, "-m", "hermes", "run", model, "--budget", ENOUGH],
            input=b"one\ntwo \xff\n", capture_output=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (2, b"error: standard input, line 2: not UTF-8; convert it\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x"], r"run needs --budget .*or --resident"),
        (["--prompt", "x", "--budget", "much"], "cannot read 'much' as a size"),
        (["--prompt", "x", "--budget", "-1"], "cannot read '-1' as a size"),
        (["--budget", ENOUGH, "--prompt", "x", "--text", "y"], "--prompt and --text do not go together"),
        (["--budget", ENOUGH, "--image", "x.png"], "takes --prompt"),
        (["--budget", ENOUGH, "--prompt", "x", "--task", "dreaming"], "unknown task 'dreaming'"),
        (["--budget", ENOUGH, "--prompt", "x", "--granularity", "atom"], "unknown granularity 'atom'"),
        (["--budget", ENOUGH, "--prompt", "x", "--resident-bytes", "none"], "cannot read 'none' as a size"),
        (["--budget", ENOUGH, "--prompt", "x", "--temperature", "0.5"], "--temperature changes nothing without"),
        (["--budget", ENOUGH, "--prompt", "x", "--do-sample", "--temperature", "0"], "must be above 0"),
        (["--budget", ENOUGH, "--prompt", "x", "--trace", "/nowhere/at/all.json"], "no such directory"),
        (
            ["--resident", "--prompt", "x", "--trace", "t.json"],
            "--resident holds all weights in memory; leave out --trace,",
        ),
        (
            ["--resident", "--prompt", "x", "--budget", "1GiB", "--agents", "2"],
            "leave out --budget and --agents, for streaming",
        ),
        (["--resident", "--prompt", "x", "--sequential"], "leave out --sequential, for streaming"),
        (["--budget", "9" * 400, "--prompt", "x"], "9223372036854775807 bytes at most"),
        (["--budget", ENOUGH], "empty"),
        (["--budget", ENOUGH, "--prompt", "x", "--prompt", "x\udcff"], r"text 2 of 2 is no UTF-8: character 2"),
        (["--budget", ENOUGH, "--text", "\udcff"], r"text 1 of 1 is no UTF-8: character 1"),
        (["--budget", ENOUGH, "--prompt", "x" * 129], "129 tokens long.*context of 128"),
        (["--budget", ENOUGH, "--prompt", "x", "--max-new-tokens", "128"], "1 tokens.* 128 new .*--max-new-tokens 127"),
        (["--budget", ENOUGH, "--prompt", "x", "--dtype", "float7"], "unknown dtype 'float7'"),
        (["--budget", ENOUGH, "--text", "x", "--pool", "median"], "unknown pool 'median'"),
        (["--budget", ENOUGH, "--prompt", "x", "--device", "gpu"], "unknown device 'gpu'; choose cpu or cuda"),
        (
            ["--budget", ENOUGH, "--prompt", "x", "--device", "cuda:99"],
            r"device 'cuda:99': torch sees \d+ of this kind",
        ),
        (["--budget", ENOUGH, "--prompt", "x", "--device-budget", "1GiB"], "for a device other than the CPU"),
        (["--budget", ENOUGH, "--prompt", "x", "--device", "cuda", "--draft", "prompt-lookup"], "not for .*--draft"),
        (["--budget", "1MiB", "--prompt", "x"], r"too small.*try --budget \d+MiB"),
    ],
)
def test_bad_options(gpt2, invoke, arguments, message):
    assert_refused(invoke(gpt2, *arguments), message)


@pytest.mark.parametrize(("option", "value"), [("--agents", "100000"), ("--seed", str(10**20)), ("--seed", "-1")])
def test_numbers_out_of_range(gpt2, invoke, option, value):
    refused = invoke(gpt2, "--budget", ENOUGH, "--prompt", "x", option, value)
    assert refused.returncode == 2
    assert f"Invalid value for '{option}'" in refused.stderr


def spoil(directory: Path, how: str) -> None:
    weights, config = directory / "model.safetensors", directory / "config.json"
    match how:
        case "absent":
            shutil.rmtree(directory)
        case "no weights":
            weights.unlink()
        case "truncated":
            os.truncate(weights, weights.stat().st_size // 2)
        case "corrupt header":
            weights.write_bytes(weights.read_bytes()[:8] + b"]" * 100)
        case "huge header":
            weights.write_bytes(b"\xff" * 7 + b"\x7f" + weights.read_bytes()[8:])
        case "no configuration":
            config.unlink()
        case "unknown architecture":
            config.write_text(json.dumps({"architectures": ["DreamForCausalLM"], "model_type": "dream-on"}))
        case "other shapes":
            config.write_text(json.dumps(json.loads(config.read_bytes()) | {"n_embd": 32, "n_inner": 256}))
        case "no tokenizer":
            for path in directory.glob("tokenizer*"):
                path.unlink()
        case "missing shard":
            tensors = load_file(weights)
            names = sorted(tensors)
            save_file({name: tensors[name] for name in names[:5]}, directory / "model-00001-of-00002.safetensors")
            weight_map = {name: f"model-0000{1 if name in names[:5] else 2}-of-00002.safetensors" for name in names}
            index = {"metadata": {}, "weight_map": weight_map}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
            weights.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("absent", "no such file or directory"),
        ("no weights", "no weights"),
        ("truncated", r"model\.safetensors"),
        ("corrupt header", r"model\.safetensors"),
        ("huge header", r"model\.safetensors"),
        ("missing shard", "model-00002-of-00002"),
        ("no configuration", r"config\.json"),
        ("no tokenizer", "no tokenizer"),
        ("unknown architecture", "dream-on"),
        ("other shapes", r"config says \[96\], checkpoint has \[192\]"),
    ],
)
def test_bad_checkpoints(copy, invoke, how, message):
    spoil(copy, how)
    assert_refused(invoke(copy, "--budget", "8GiB", "--prompt", "x", "--max-new-tokens", "2"), message)


@pytest.mark.parametrize("memory", [("--budget", "8GiB"), ("--resident",)], ids=["streamed", "resident"])
def test_layers_without_weights(copy, invoke, tmp_path, memory):
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "config.json").write_text(json.dumps(config | {"n_layer": config["n_layer"] + 2}))
    (tmp_path / "in.jsonl").write_text('"x"\n')
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    for inputs in (("--prompt", "x"), files):
        refused = invoke(copy, *memory, *inputs, "--max-new-tokens", "2")
        assert refused.returncode == 2
        assert refused.stdout == ""
        last = refused.stderr.splitlines()[-1]  # behind what transformers says of it
        assert re.match(r"error: .* lack 24 parameters .*\(transformer\.h\.3\.ln_1\.weight, .*, \.\.\.\); give", last)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_name_that_is_no_utf8(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    directory = synth("tiny-vit", tmp_path / "vit")
    image = pytest.importorskip("PIL.Image").linear_gradient("L")
    image.save(path := os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"), format="png")
    done = hermes(directory, "--resident", "--image", path)
    assert done.returncode == 0, done.stderr
    assert "\\udcff.png: LABEL_" in done.stdout


def test_bad_image(tmp_path, invoke):
    directory = synth("tiny-vit", tmp_path / "vit")
    (tmp_path / "not.png").write_text("no")
    assert_refused(invoke(directory, "--budget", ENOUGH, "--image", tmp_path / "not.png"), r"not\.png: not an image")


def test_help_needs_no_torch():
    code = (
        "import sys; from hermes.cli.app import app; import hermes; hermes.__all__; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
