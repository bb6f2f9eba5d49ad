"""Plans of the published sizes, as the planner has them."""

from tests.lowvram.planning.conftest import facts, published

__all__ = ["facts", "published"]
