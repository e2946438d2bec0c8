"""Several models under one budget (SwapNet, Wang et al. 2024): one ledger, a quota and an engine for each.

Decisions are pure (`schedule`, `quota`, `plan`, `predict`); `lanes`, `turns`, `worker` and `shares` carry them out.
"""

from hermes.fleet.blocks import Blocks
from hermes.fleet.fleet import Fleet
from hermes.fleet.members import Candidate
from hermes.fleet.plan import FleetPlan, plan_fleet
from hermes.fleet.predict import FleetPrediction, Member, predict
from hermes.fleet.quota import Need, divide, lend
from hermes.fleet.report import FleetReport, ModelReport
from hermes.fleet.schedule import POLICIES, Policy, Schedule

__all__ = [
    "POLICIES",
    "Blocks",
    "Candidate",
    "Fleet",
    "FleetPlan",
    "FleetPrediction",
    "FleetReport",
    "Member",
    "ModelReport",
    "Need",
    "Policy",
    "Schedule",
    "divide",
    "lend",
    "plan_fleet",
    "predict",
]
