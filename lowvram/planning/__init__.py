"""What fits where and how fast it will be, from shapes alone: no weights are read and no device is needed."""

from lowvram.planning.card_table import CARDS
from lowvram.planning.cards import Card
from lowvram.planning.layout_choice import Machines, Wishes, alternatives, choose_team
from lowvram.planning.planner import TeamPlan, plan, plan_team
from lowvram.planning.rank_plan import DoesNotFit, Plan
from lowvram.planning.workload import Workload

__all__ = [
    "CARDS",
    "Card",
    "DoesNotFit",
    "Machines",
    "Plan",
    "TeamPlan",
    "Wishes",
    "Workload",
    "alternatives",
    "choose_team",
    "plan",
    "plan_team",
]
