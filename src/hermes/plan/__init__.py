"""The Pipeline Planner: from costs and a budget to a plan, by simulating PIPELOAD's own state machine. No torch."""

from hermes.plan.cost import START_SECONDS, Prediction, part_computed, simulate
from hermes.plan.problem import TOUCH_STEP_BYTES, Bandwidth, Plan, Problem, UnitCost
from hermes.plan.residency import spread, spread_over
from hermes.plan.search import choose_bandwidth, make_plan, smallest_budget

__all__ = [
    "START_SECONDS",
    "TOUCH_STEP_BYTES",
    "Bandwidth",
    "Plan",
    "Prediction",
    "Problem",
    "UnitCost",
    "choose_bandwidth",
    "make_plan",
    "part_computed",
    "simulate",
    "smallest_budget",
    "spread",
    "spread_over",
]
