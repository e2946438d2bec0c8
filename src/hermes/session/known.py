"""What an earlier `hermes profile` left: the profile to plan with, and the trace, which need not be made again."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from hermes.checkpoint import Checkpoint
from hermes.errors import ProfileError
from hermes.model.trace import Trace
from hermes.profile import Profile, load_profile, machine_record, profile_path
from hermes.session.workload import Workload

__all__ = ["stored_profile", "trace_at"]

logger = logging.getLogger("hermes")

LONGER = 1.25
"""So much longer sequences than the profiled one need no trace of their own."""


def stored_profile(
    source: Path, checkpoint: Checkpoint, *, model_class: str, dtype: str, path: str | Path | None
) -> Profile | None:
    """The profile to plan with; None where there is none.

    The one named by `path` must be right, or ProfileError says why not; a stored one that is not is left out, with a
    warning.
    """
    stored = profile_path(source, model_class, dtype)
    if path is None and not stored.exists():
        return None
    try:
        return load_profile(
            Path(path or stored),
            checkpoint=checkpoint.fingerprint(),
            machine=machine_record(checkpoint.files[0].path, torch.get_num_threads()),
            model_class=model_class,
            dtype=dtype,
        )
    except ProfileError as error:
        if path is not None:
            raise
        logger.warning("%s (going on with an estimate)", error)
        return None


def trace_at(profile: Profile | None, workload: Workload) -> Trace | None:
    """The profiled pass as one over `workload`'s shape; None where that is much larger, or of another kind.

    Operations and cache are proportional to tokens. The peak of activations stays an upper bound: nothing grows by more
    than the square of the sequence's length.
    """
    if profile is None or profile.trace is None:
        return None
    trace = profile.trace
    longer = max(1.0, workload.sequence_length / profile.sequence_length)
    if workload.batch_size > profile.batch_size or longer > LONGER:
        return None
    if (workload.max_new_tokens > 0) != (trace.cache_bytes > 0):
        return None
    tokens = workload.batch_size * workload.sequence_length
    share = tokens / (profile.batch_size * profile.sequence_length)
    cache_bytes = int(trace.cache_bytes * share)
    return replace(
        trace,
        flops={module: int(flops * share) for module, flops in trace.flops.items()},
        peak_bytes=int((trace.peak_bytes - trace.cache_bytes) * longer**2) + cache_bytes,
        cache_bytes=cache_bytes,
    )
