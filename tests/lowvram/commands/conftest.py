"""Plans of the published sizes, as the planner has them."""

from tests.lowvram.planning.conftest import published, sizes

__all__ = ["published", "sizes"]
