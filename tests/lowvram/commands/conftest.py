"""Plans of the published sizes, as the planner has them."""

from tests.lowvram.planning.conftest import sizes, published

__all__ = ["sizes", "published"]
