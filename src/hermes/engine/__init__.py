"""The Execution Engine: Loading Agents, Inference Agent and Daemon Agent acting on `hermes.pipeload`'s decisions.

It moves bytes; what they mean is the caller's business (`hermes.model` binds them to tensors).
"""

from hermes.engine.agents import LoadingAgents, forget_frames
from hermes.engine.config import EngineConfig
from hermes.engine.engine import Engine
from hermes.engine.stats import EngineStats, Span

__all__ = ["Engine", "EngineConfig", "EngineStats", "LoadingAgents", "Span", "forget_frames"]
