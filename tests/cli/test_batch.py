"""`hermes run --input --output`: every record once, in order, whatever kills it on the way."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hermes.checkpoint.synth import synth
from hermes.errors import InputError
from hermes.tasks.records import Journal, Record, make_batches, read_records

WORDS = "the memory of a machine is a river that runs through many small rooms and keeps nothing".split()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return synth("tiny-gpt2", tmp_path_factory.mktemp("batch") / "gpt2")


def sentences(count):
    return [" ".join(WORDS[: 1 + number % len(WORDS)]) + f" {number}" for number in range(count)]


def hermes(*args):
    return subprocess.run(
        [sys.executable, "-m", "hermes", "run", *map(str, args)], capture_output=True, text=True, check=False
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": f"r{n}", "text": text}) + "\n" for n, text in enumerate(sentences(23))))
    return path


def test_embeddings_of_a_file_are_those_of_plain_transformers(gpt2, texts, tmp_path):
    common = (gpt2, "--input", texts, "--pool", "mean", "--batch", 4)
    streamed = hermes(*common, "--budget", "400MiB", "--output", tmp_path / "streamed.jsonl", "--json")
    assert streamed.returncode == 0, streamed.stderr
    resident = hermes(*common, "--resident", "--output", tmp_path / "resident.jsonl")
    assert resident.returncode == 0, resident.stderr
    found = lines(tmp_path / "streamed.jsonl")
    assert found == lines(tmp_path / "resident.jsonl")
    assert [record["index"] for record in found] == list(range(23))
    assert [record["id"] for record in found] == [f"r{n}" for n in range(23)]
    report = json.loads(streamed.stdout)
    assert (report["records"], report["resumed"], report["sweeps"]) == (23, 0, 6)
    assert not list(tmp_path.glob("*.partial"))
    again = hermes(*common, "--budget", "400MiB", "--output", tmp_path / "streamed.jsonl")
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_a_killed_run_goes_on_without_redoing_or_losing_a_record(gpt2, texts, tmp_path):
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "hermes", "run", str(gpt2), "--budget", "400MiB", "--input", str(texts),
               "--output", str(output), "--batch", "1", "--max-new-tokens", "12", "--json"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    partial = tmp_path / "out.jsonl.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not output.exists()
    finished = partial.read_bytes().count(b"\n") - 1
    with partial.open("ab") as file:
        file.write(b'[5, {"gener')  # as a kill in the middle of a write leaves it
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert 3 <= finished <= report["resumed"] < 23
    assert report["sweeps"] == 23 - report["resumed"]
    whole = tmp_path / "whole.jsonl"
    command[command.index(str(output))] = str(whole)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert lines(output) == lines(whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no records"),
        ('"one"\nnot json\n', "line 2: not JSON"),
        ('"one"\n"\udcff"\n', "line 2: not UTF-8"),
        ('"one"\n"\\ud800"\n', r"line 2: '\ud800' is half a character"),
        ('{"text": "one", "id": ["\\udfff"]}\n', r"line 1: '\udfff' is half a character"),
        ("[" * 200_000 + "\n", "line 1: nested too deeply"),
        ('{"title": "x"}\n', "line 1: needs a string"),
        ('""\n', "line 1: needs a string"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(gpt2, tmp_path, content, message):
    path = tmp_path / "in.jsonl"
    path.write_text(content, errors="surrogateescape")
    refused = hermes(gpt2, "--budget", "400MiB", "--input", path, "--output", tmp_path / "out.jsonl")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_options_that_do_not_go_together(gpt2, texts, tmp_path):
    for extra in (["--prompt", "x", "--output", tmp_path / "o"], [], ["--output", tmp_path / "no" / "o"]):
        refused = hermes(gpt2, "--budget", "400MiB", "--input", texts, *extra)
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1


def test_a_journal_of_another_job_is_refused(tmp_path):
    output = tmp_path / "out.jsonl"
    with Journal(output, {"pool": "mean"}) as journal:
        journal.add([(3, {"x": 1})])
    with pytest.raises(InputError, match="other inputs, model or options"):
        Journal(output, {"pool": "cls"})
    with Journal(output, {"pool": "mean"}) as journal:
        assert journal.done == {3}
        journal.add([(0, {"x": "ä"})])
        journal.finish([Record(index=0, text="a", fields={}), Record(index=3, text="d", fields={})])
    assert lines(output) == [{"index": 0, "x": "ä"}, {"index": 3, "x": 1}]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json", "generation_config.json"])
def test_another_model_at_the_same_path_is_another_job(gpt2, texts, tmp_path, monkeypatch, invoke, changed):
    model = shutil.copytree(gpt2, tmp_path / "model")
    command = (model, "--resident", "--input", texts, "--output", tmp_path / "out.jsonl", "--max-new-tokens", "1")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", stop)
        assert invoke(*command).returncode == 130
    if changed == "model.safetensors":
        weights = load_file(model / changed)
        save_file({name: -tensor for name, tensor in weights.items()}, model / changed, {"format": "pt"})
    else:
        settings = json.loads((model / "config.json").read_bytes()) if changed == "config.json" else {}
        (model / changed).write_text(json.dumps(settings | {"repetition_penalty": 1.5}))
    refused = invoke(*command)
    assert refused.returncode == 2
    assert "from a run with other inputs, model or options" in refused.stderr


def test_a_pipe_is_read_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        writing = pool.submit(pipe.write_bytes, b'"one"\n"two"\n')
        records, digest = read_records(pipe)
        writing.result()
    assert [record.text for record in records] == ["one", "two"]
    assert digest == hashlib.sha256(b'"one"\n"two"\n').hexdigest()


@pytest.mark.parametrize("content", [b"notes without an end", b"notes\n", b'{"job": "0'])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(content)
    with pytest.raises(InputError, match=r"out\.jsonl\.partial is from a run with other inputs"):
        Journal(tmp_path / "out.jsonl", {})
    assert partial.read_bytes() == content


def test_a_header_cut_off_by_a_kill_is_written_again(tmp_path):
    output = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    with Journal(output, {}) as journal:
        journal.add([(0, {})])
        content = partial.read_bytes()
    partial.write_bytes(content[:20])
    with Journal(output, {}) as journal:
        assert not journal.done
        journal.add([(0, {})])
    assert partial.read_bytes() == content


def test_a_refused_run_leaves_nothing(gpt2, texts, tmp_path, invoke):
    refused = invoke(gpt2, "--budget", "1MiB", "--input", texts, "--output", tmp_path / "out.jsonl")
    assert refused.returncode == 2
    assert list(tmp_path.iterdir()) == [texts]


def test_one_run_at_a_time_is_at_an_output(tmp_path):
    output = tmp_path / "out.jsonl"
    records = [Record(index=0, text="a", fields={})]
    with Journal(output, {}) as journal:
        with pytest.raises(InputError, match=r"out\.jsonl\.partial is being written by another process"):
            Journal(output, {})
        journal.add([(0, {"x": 1})])
        journal.finish(records)
    assert lines(output) == [{"index": 0, "x": 1}]


def test_a_field_called_index_is_handed_through(tmp_path):
    records = [Record(index=n, text="x", fields={"index": n + 1, "text": "x"}) for n in range(4)]
    output = tmp_path / "out.jsonl"
    with Journal(output, {}) as journal:
        journal.add((record.index, {"generated": f"g{record.index}"}) for record in records[:2])
    with Journal(output, {}) as journal:
        assert journal.done == {0, 1}
        journal.add((record.index, {"generated": f"g{record.index}"}) for record in records[2:])
        journal.finish(records)
    assert lines(output) == [{"index": n + 1, "text": "x", "generated": f"g{n}"} for n in range(4)]


def test_records_keep_their_fields(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('"plain"\n\n{"prompt": "go on", "id": 7}\n')
    (plain, rich), _ = read_records(path)
    assert (plain.index, plain.text, rich.index, rich.text, rich.fields["id"]) == (0, "plain", 1, "go on", 7)


@given(st.lists(st.integers(1, 600), max_size=60), st.none() | st.integers(1, 9), st.none() | st.integers(1, 2000))
def test_every_record_is_in_one_batch(lengths, batch_size, batch_tokens):
    batches = make_batches(lengths, batch_size=batch_size, batch_tokens=batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert batch_size is None or len(batch) <= batch_size
        assert batch_tokens is None or len(batch) == 1 or len(batch) * longest <= batch_tokens
    padded = [len(batch) * lengths[batch[0]] for batch in batches]
    assert padded == sorted(padded, reverse=True)
