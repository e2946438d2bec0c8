"""What a pass will take besides weights, from the shapes of its inputs: foreseen before it grows, not after."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hermes.model.inputs import PassShape, pass_shape, vocabulary_size
from hermes.model.mapping import is_transformers_model
from hermes.model.trace import Trace
from hermes.session.prepared import Prepared
from hermes.session.workload import HEAP_OF_ACTIVATIONS, LOGITS_COPIES, Workload

__all__ = ["Demand", "demand_of"]

SCORE_COPIES = 3
"""Attention that is written out holds its scores, their mask and their softmax."""


def demand_of(prepared: Prepared, heap_bytes: int) -> Callable[[Sequence[Any], Mapping[str, Any]], int]:
    """For a transformers model that was traced; of another nobody knows, and what the plan has set aside must do."""
    module = prepared.module
    if prepared.trace is None or not is_transformers_model(module):
        return lambda args, kwargs: heap_bytes
    config = getattr(module, "config", None)
    eager = getattr(config, "_attn_implementation", None) == "eager"
    heads = getattr(config, "num_attention_heads", 0) or 0  # of each stage, where there are some
    return Demand(
        planned=prepared.workload,
        trace=prepared.trace,
        heap_bytes=heap_bytes,
        vocabulary_size=vocabulary_size(module) if prepared.workload.max_new_tokens else 0,
        eager_heads=(max(heads, default=0) if isinstance(heads, list | tuple) else int(heads)) if eager else 0,
        gathered_bytes=prepared.gathered_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Scales what was traced for the planned shape to the shape at hand.

    Attributes:
        planned: the shape that was traced.
        trace: of it.
        heap_bytes: what the plan has set aside.
        vocabulary_size: scores for each position that a head computes; 0 without a head.
        eager_heads: of attention that writes its scores out; 0 if it does not.
        gathered_bytes: by the number of tokens, of a matrix that comes in ranges and is needed whole.
    """

    planned: Workload
    trace: Trace
    heap_bytes: int
    vocabulary_size: int
    eager_heads: int
    gathered_bytes: Callable[[int], int] = lambda tokens: 0

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """Bytes of heap for a pass with these inputs; what the plan has set aside at least. Microseconds."""
        shape = pass_shape(args, kwargs)
        if shape is None:
            return self.heap_bytes
        gathered = self.gathered_bytes(shape.batch_size * (shape.tokens or 0))
        return max(self.heap_bytes, self._bytes(shape)) + gathered

    def _bytes(self, shape: PassShape) -> int:
        planned, trace = self.planned, self.trace
        planned_tokens = planned.batch_size * (planned.sequence_length if shape.tokens is not None else 1)
        tokens = shape.batch_size * (shape.tokens or 1)
        more = max(0.0, tokens / planned_tokens - 1)
        activations = HEAP_OF_ACTIVATIONS * (trace.peak_bytes - trace.cache_bytes) * more
        length = shape.past_tokens + (shape.tokens or 0)
        cache = (
            trace.cache_bytes
            / planned_tokens
            * (shape.batch_size * length - planned.batch_size * (planned.sequence_length + planned.max_new_tokens))
        )
        positions = max(0, tokens - planned.batch_size) if shape.all_logits else 0
        scores = 4 * self.vocabulary_size * max(positions, LOGITS_COPIES * (shape.batch_size - planned.batch_size))
        eager = (
            SCORE_COPIES * 4 * self.eager_heads * (tokens * length - planned.batch_size * planned.sequence_length**2)
        )
        return self.heap_bytes + int(activations + max(0, scores) + max(0, eager) + max(0.0, cache))
