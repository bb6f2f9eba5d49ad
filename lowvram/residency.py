"""Where the DiT's layers are: all on the device, or copied there one at a time from the artifact."""

from __future__ import annotations

from typing import Protocol


class LayerStore(Protocol):
    """Makes a layer's weights present before it runs."""

    def fetch(self, index: int) -> None: ...


class Resident:
    """Every layer stays where it was loaded."""

    def fetch(self, index: int) -> None:
        return None
