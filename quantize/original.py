"""Original: the DiT's weights as they were before an artifact stored them in fewer bits, read tensor by tensor."""

from __future__ import annotations

import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.components import ComponentPlan
from lowvram_quantize.schemes import all_finite, not_finite
from lowvram_quantize.store import merged_chunks

Tensor = torch.Tensor


class Original:
    """Tensors of the DiT that ``plan`` converts, in full precision and with its LoRAs merged. Nothing is kept."""

    def __init__(self, plan: ComponentPlan):
        self.plan = plan
        self._items = {item.name: item for item in plan.items}

    def merged(self, name: str) -> Tensor:
        """The tensor called ``name`` in the artifact: float32, in its own shape.

        Raises:
            CheckpointError: there is none, it cannot be read, or holds NaN or infinity.
        """
        if name not in self._items:
            raise CheckpointError(f"the checkpoint has no {name}; expected the one that the artifact was made from")
        item = self._items[name]
        out, row = torch.empty(item.ref.shape), 0
        rows = out.view(item.ref.rows, -1)
        for chunk in merged_chunks(item, self.plan.deltas.get(name), float32=True):
            rows[row : row + len(chunk)] = chunk
            row += len(chunk)
        if not all_finite(out):
            raise not_finite(name)
        return out
