"""What is going to be asked of a model, and how much memory that takes besides weights."""

from dataclasses import dataclass, replace

from hermes.errors import InputError
from hermes.model.trace import Trace

__all__ = ["HEAP_SLACK_BYTES", "UNTRACED_HEAP_BYTES", "Workload", "heap_bytes"]

HEAP_SLACK_BYTES = 30 * 2**20
"""For what no trace sees: code pages of kernels that were not run before (up to 20 MiB), the allocator's own rounding,
packing buffers inside kernels, Python objects of a run."""
HEAP_OF_ACTIVATIONS = 1.5
"""Bytes of heap for each byte of live activations: holes between buffers, which stay (`hold_heap`), and what kernels
pack their operands into. BERT-large took 1.4 over 2,000 tokens."""
HEAP_OF_VARYING_ACTIVATIONS = 2.5
"""The same where each pass has another shape: buffers a little larger or smaller than before leave holes that nothing
fits. BERT-large took 2.4 over batches of 1,900 to 2,048 tokens, MiniLM 2.8; given back in between, they cost page
faults (a twelfth of MiniLM's throughput)."""
UNTRACED_HEAP_BYTES = 64 * 2**20
"""Activations of a module that could not be traced, until its first pass has shown otherwise."""
LOGITS_COPIES = 4
"""Sampling holds the last position's scores in fp32 and a few sorted or masked copies of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Shapes that budget, plan and prediction are for.

    Attributes:
        batch_size: sequences or images at a time.
        sequence_length: tokens of each text, or of each prompt.
        max_new_tokens: tokens generated after the prompt; 0 for a model that does not generate.
        num_forwards: such a model's forward passes over inputs of this shape.
        varies: this shape is the largest of several.

    Raises InputError where a number is too small.
    """

    batch_size: int = 1
    sequence_length: int = 128
    max_new_tokens: int = 0
    num_forwards: int = 1
    varies: bool = False

    def __post_init__(self) -> None:
        if min(self.batch_size, self.sequence_length, self.num_forwards) < 1 or self.max_new_tokens < 0:
            raise InputError(
                f"batch size {self.batch_size}, {self.sequence_length} tokens and {self.max_new_tokens} new ones: "
                "the first two must be 1 or more, the last 0 or more"
            )

    @property
    def num_passes(self) -> int:
        """Sweeps over the weights: one for the prompt, one more for each later token."""
        return self.max_new_tokens or self.num_forwards

    def within(self, max_length: int | None) -> "Workload":
        """The same, cut to a context of so many tokens; the prompt has precedence."""
        if max_length is None:
            return self
        sequence_length = min(self.sequence_length, max_length)
        return replace(
            self,
            sequence_length=sequence_length,
            max_new_tokens=min(self.max_new_tokens, max_length - sequence_length),
        )


def heap_bytes(workload: Workload, trace: Trace | None, *, vocabulary_size: int, row_bytes: int) -> int:
    """Activations at their peak, the key-value cache at its longest, rows of embeddings, scores, and slack."""
    if trace is None:
        return UNTRACED_HEAP_BYTES + HEAP_SLACK_BYTES + row_bytes
    length = workload.sequence_length + workload.max_new_tokens
    cache = (
        trace.cache_bytes * length // max(1, workload.sequence_length) if workload.max_new_tokens else trace.cache_bytes
    )
    scores = LOGITS_COPIES * 4 * workload.batch_size * vocabulary_size if workload.max_new_tokens else 0
    share = HEAP_OF_VARYING_ACTIVATIONS if workload.varies else HEAP_OF_ACTIVATIONS
    activations = int(share * (trace.peak_bytes - trace.cache_bytes))
    return activations + cache + scores + row_bytes + HEAP_SLACK_BYTES
