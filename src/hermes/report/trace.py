"""What an engine recorded, as Chrome trace-event JSON: for chrome://tracing, Perfetto or Speedscope.

One track for each agent and one for inference, the resident set as a counter. The engine must have been recording.
"""

import json
import os
from pathlib import Path
from typing import Any

from hermes.engine import EngineStats

__all__ = ["chrome_trace", "write_trace"]

_PID = 1
_MICROSECONDS = 1e6


def chrome_trace(stats: EngineStats) -> dict[str, Any]:
    """The trace as an object for JSON; time starts with the first thing recorded."""
    spans, memory = list(stats.spans), list(stats.memory)
    start = min([span.start_seconds for span in spans] + [seconds for seconds, _ in memory], default=0.0)
    agents = sorted({span.agent for span in spans}, key=lambda agent: (agent != "inference", agent))
    tracks = {agent: number for number, agent in enumerate(agents, start=1)}
    events: list[dict[str, Any]] = [{"ph": "M", "pid": _PID, "name": "process_name", "args": {"name": "hermes"}}]
    for agent, track in tracks.items():
        events.append({"ph": "M", "pid": _PID, "tid": track, "name": "thread_name", "args": {"name": agent}})
        events.append(
            {"ph": "M", "pid": _PID, "tid": track, "name": "thread_sort_index", "args": {"sort_index": track}}
        )
    for span in spans:
        event = {
            "ph": "X",
            "pid": _PID,
            "tid": tracks[span.agent],
            "name": span.name,
            "ts": (span.start_seconds - start) * _MICROSECONDS,
            "dur": max(0.0, span.end_seconds - span.start_seconds) * _MICROSECONDS,
        }
        events.append({**event, "args": {"bytes": span.nbytes}} if span.nbytes else event)
    events += [
        {
            "ph": "C",
            "pid": _PID,
            "name": "resident set",
            "ts": (seconds - start) * _MICROSECONDS,
            "args": {"bytes": nbytes},
        }
        for seconds, nbytes in memory
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(stats: EngineStats, path: Path) -> None:
    """Write the trace; the file appears whole or not at all. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(chrome_trace(stats)), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
