"""Work that outgrows its plan is paid with resident weights, before memory grows; only then is it refused."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from capped import requires_cgroup, run_capped
from hermes.checkpoint.synth import synth
from hermes.errors import BudgetError
from hermes.model.trace import Trace
from hermes.session import Workload
from hermes.session.demand import Demand
from hermes.units import parse_bytes

ROOT = Path(__file__).parents[1]
MIB = 2**20

GENERATE = """
import json, sys, torch
from hermes.memory.allocator import keep_heap_tight
keep_heap_tight()
import hermes
from hermes.memory.probe import peak_resident_bytes
model_path, budget, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
ids = torch.arange(100, 100 + 32 * 16).view(32, 16)
with hermes.load(model_path, budget=budget, batch_size=batch, sequence_length=16, max_new_tokens=4) as model:
    tokens = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    evicted, ledger = model.hermes.stats.evicted_bytes, model.hermes.ledger
    assert ledger.reserved_bytes <= ledger.budget_bytes
print(json.dumps({"tokens": tokens.tolist(), "evicted": evicted, "peak": peak_resident_bytes()}))
"""


@pytest.mark.cgroup
@requires_cgroup
def test_a_batch_that_was_not_planned_is_paid_with_resident_weights(tmp_path: Path) -> None:
    model = synth("gpt2-medium", ROOT / "models" / "gpt2-medium")

    def generate(budget: str, batch: int) -> dict[str, object]:
        done = run_capped(
            [sys.executable, "-c", GENERATE, str(model), budget, str(batch)],
            limit_bytes=parse_bytes(budget),
            env={**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        assert done.oom_kills == 0
        result: dict[str, object] = json.loads(done.stdout)
        return result

    planned, outgrown = generate("2GiB", 32), generate("700MiB", 1)
    assert planned["evicted"] == 0
    assert int(str(outgrown["evicted"])) > 50 * MIB
    assert int(str(outgrown["peak"])) <= parse_bytes("700MiB")
    assert outgrown["tokens"] == planned["tokens"]


def test_what_cannot_fit_is_refused_before_the_pass(tmp_path: Path) -> None:
    import hermes

    model = synth("tiny-gpt2", tmp_path / "model")
    with pytest.raises(BudgetError) as refusal:
        hermes.load(model, budget="1MiB", sequence_length=8, max_new_tokens=2)
    smallest = refusal.value.minimum_bytes
    assert smallest is not None
    with hermes.load(model, budget=smallest + 32 * MIB, sequence_length=8, max_new_tokens=2) as loaded:
        many = torch.ones(4096, 100, dtype=torch.long)
        with pytest.raises(BudgetError, match=r"a larger batch than was planned for.*try --budget \d"):
            loaded(input_ids=many)
        few = torch.ones(1, 8, dtype=torch.long)
        assert loaded(input_ids=few).logits.shape[:2] == (1, 8)


DEMAND = Demand(
    planned=Workload(batch_size=2, sequence_length=10, max_new_tokens=5),
    trace=Trace(peak_bytes=3000, cache_bytes=1000),
    heap_bytes=10_000,
    vocabulary_size=100,
    eager_heads=0,
)


class Cache:
    """A key-value cache of so many tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


def ids(batch_size: int, tokens: int) -> torch.Tensor:
    return torch.ones(batch_size, tokens, dtype=torch.long)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, 10_000),
        ({"input_ids": ids(2, 10), "logits_to_keep": 1}, 10_000),
        ({"input_ids": ids(2, 1), "past_key_values": Cache(14), "logits_to_keep": 1}, 10_000),
        # 50 bytes of cache a token, beyond the 30 tokens of the plan
        ({"input_ids": ids(2, 1), "past_key_values": Cache(16), "logits_to_keep": 1}, 10_000 + 50 * 4),
        # twice the tokens: once more the activations, and half as much for holes; 40 - 30 tokens of cache; scores of
        # two more sequences, four times
        ({"input_ids": ids(4, 10), "logits_to_keep": 1}, 10_000 + 3000 + 50 * 10 + 4 * 4 * 2 * 100),
        # scores of every position but the two that are planned
        ({"input_ids": ids(2, 10)}, 10_000 + 4 * 18 * 100),
        # a batch of three takes half as much again
        ({"inputs_embeds": torch.ones(3, 10, 4), "logits_to_keep": 1}, 10_000 + 1500 + 4 * 4 * 100),
    ],
)
def test_demand_scales_with_the_inputs(kwargs: dict[str, object], expected: int) -> None:
    assert DEMAND((), kwargs) == expected
