"""Plans: what fits where and how fast it will be, from shapes alone; no weights are read and no device is needed."""

from lowvram.offload.placement import PlanOptions
from lowvram.planning.card_table import CARDS
from lowvram.planning.cards import Card
from lowvram.planning.layout_choice import alternatives, choose_team
from lowvram.planning.members import Machines
from lowvram.planning.planner import TeamPlan, plan, plan_team
from lowvram.planning.rank_layout import LayoutOptions
from lowvram.planning.rank_plan import DoesNotFit, Plan
from lowvram.planning.workload import Workload

__all__ = [
    "CARDS",
    "Card",
    "DoesNotFit",
    "LayoutOptions",
    "Machines",
    "Plan",
    "PlanOptions",
    "TeamPlan",
    "Workload",
    "alternatives",
    "choose_team",
    "plan",
    "plan_team",
]
