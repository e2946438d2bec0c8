"""A model being run: what it takes (`prepare`), what it will cost (`estimate`, `measure`), and the run (`session`)."""

from hermes.session.beside import touch_when_warm
from hermes.session.estimate import estimate_profile, measure_floor
from hermes.session.measure import measure_calls, measure_profile
from hermes.session.prepare import FORWARDS, prepare_model, prepare_module
from hermes.session.prepared import Prepared
from hermes.session.session import MARGIN_BYTES, Session, attach, memory_limit, start_session
from hermes.session.target import Target, aim_at, shared_target
from hermes.session.workload import HEAP_SLACK_BYTES, UNTRACED_HEAP_BYTES, Workload

__all__ = [
    "FORWARDS",
    "HEAP_SLACK_BYTES",
    "MARGIN_BYTES",
    "UNTRACED_HEAP_BYTES",
    "Prepared",
    "Session",
    "Target",
    "Workload",
    "aim_at",
    "attach",
    "estimate_profile",
    "measure_calls",
    "measure_floor",
    "measure_profile",
    "memory_limit",
    "prepare_model",
    "prepare_module",
    "shared_target",
    "start_session",
    "touch_when_warm",
]
