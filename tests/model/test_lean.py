"""A process that runs a model does without what only compilers and clusters need."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from hermes.checkpoint.synth import synth
from hermes.model.inputs import example_inputs
from hermes.model.lean import lean_imports
from hermes.model.skeleton import build_skeleton
from hermes.model.trace import trace, trace_apart
from hermes.session import Workload, prepare_model

NOTHING_HEAVY = """
heavy = {"sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"} & set(sys.modules)
assert not heavy, heavy
"""

PREPARE = """
import sys
from hermes.session import Workload, prepare_model
prepared = prepare_model(sys.argv[1], workload=Workload(max_new_tokens=4))
assert prepared.trace is not None
"""

INPUTS = """
import sys
from pathlib import Path
directory = Path(sys.argv[1])
if (directory / "preprocessor_config.json").exists():
    from PIL import Image
    from hermes.tasks.classification import prepare_images
    prepare_images(directory, [Image.new("RGB", (32, 32))])
else:
    from hermes.tasks.text import load_tokenizer
    load_tokenizer(directory)
"""

LATE = """
import sys
import torch
from hermes.model.lean import lean_imports
with lean_imports():
    from torch._dynamo import allow_in_graph
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask
    assert allow_in_graph(len) is len
    assert not isinstance(1, BlockMask)
assert "torch._dynamo" not in sys.modules and "torch.nn.attention.flex_attention" not in sys.modules
mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 128, 128, device="cpu")
from torch.nn.attention import flex_attention
assert isinstance(mask, flex_attention.BlockMask) and isinstance(mask, BlockMask)
import torch._dynamo
assert torch._dynamo.allow_in_graph is not allow_in_graph
"""

COUNT = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
"""

FEW_SOURCES = """
sources = [name for name in opened if "/transformers/models/" in name and name.endswith(".py")]
assert len(sources) < 50, len(sources)
"""

NAMES = """
import json, sys
if sys.argv[1] == "late":
    from hermes.model.late_table import make_table_late
    make_table_late()
import transformers
from transformers import AutoModel, initialization, models
assert ("_rest" in vars(transformers)) == (sys.argv[1] == "late")
assert not hasattr(transformers, "NoSuchModel")
assert "_rest" not in vars(transformers) or vars(transformers)["_rest"] is None
from transformers import BertTokenizerFast, LlamaModel
from transformers.models import BertModel
names = [sorted({*module.__all__, *module._class_to_module.items()}, key=str) for module in (transformers, models)]
print(json.dumps([*names, str(LlamaModel), str(BertTokenizerFast), str(BertModel)]))
"""

PLAIN_AFTERWARDS = """
import sys
from hermes.session import Workload, prepare_model
prepare_model(sys.argv[1], workload=Workload())
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, pad_token_id=0)
assert torch.distributed.is_available()
"""


def run(script: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arch", ["tiny-bert", "tiny-vit", "tiny-gpt2", "tiny-gpt-j", "tiny-llama"])
def test_preparing_a_model_leaves_out_the_compiler_and_other_models(arch: str, tmp_path: Path) -> None:
    run(COUNT + PREPARE + NOTHING_HEAVY + FEW_SOURCES, str(synth(arch, tmp_path / arch)))


@pytest.mark.parametrize("arch", ["tiny-bert", "tiny-vit", "tiny-gpt2", "tiny-gpt-j", "tiny-llama"])
def test_preparing_inputs_leaves_out_the_compiler_and_other_models(arch: str, tmp_path: Path) -> None:
    run(COUNT + INPUTS + NOTHING_HEAVY + FEW_SOURCES, str(synth(arch, tmp_path / arch)))


def test_a_table_made_late_is_the_table() -> None:
    assert run(NAMES, "late") == run(NAMES, "plain")


def test_what_was_put_off_is_the_real_thing_when_used() -> None:
    run(LATE)


def test_plain_transformers_works_in_the_same_process(tmp_path: Path) -> None:
    run(PLAIN_AFTERWARDS, str(synth("tiny-llama", tmp_path / "model")))


def test_a_trace_in_a_child_is_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare_model(synth("tiny-gpt2", tmp_path / "model"), workload=Workload(max_new_tokens=4))
    inputs = example_inputs(prepared.module, batch_size=2, sequence_length=8)
    assert inputs is not None
    here = trace(prepared.module, (), inputs)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr("hermes.model.trace._run", None)  # the child has none either, so a fallback would be seen
    assert here is not None
    assert trace_apart(prepared.module, (), inputs)[0] is None
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    found, nbytes = trace_apart(prepared.module, (), inputs)
    assert found == here
    assert nbytes > 0


def test_a_skeleton_draws_no_numbers(tmp_path: Path) -> None:
    """So that what is not in the checkpoint gets the values of `from_pretrained`, behind the same seed."""
    hf.ViTModel(hf.ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4)).save_pretrained(tmp_path)
    torch.manual_seed(5)
    with lean_imports():
        build_skeleton(tmp_path, auto_class="AutoModelForImageClassification", dtype=None)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
