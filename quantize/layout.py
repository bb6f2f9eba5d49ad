"""Layout of a component's file: where it has each slab and tensor, and how long it becomes."""

from __future__ import annotations

from collections.abc import Sequence

from lowvram_quantize.components import ComponentPlan, Item
from lowvram_quantize.format import FORMAT
from lowvram_quantize.slabs import Slab, TensorSpec, header_bytes, plan_slabs
from lowvram_quantize.store import stored_specs


def lay_out(plan: ComponentPlan) -> tuple[dict[str, list[Item]], list[Slab]]:
    """A component's items by slab, and where its file has each slab and tensor."""
    by_slab: dict[str, list[Item]] = {}
    for item in plan.items:
        by_slab.setdefault(item.slab, []).append(item)
    specs: dict[str, Sequence[TensorSpec]] = {
        slab: [spec for item in items for spec in stored_specs(item)] for slab, items in by_slab.items()
    }
    return by_slab, plan_slabs(specs)


def metadata_of(component: str) -> dict[str, str]:
    """What the header of a component's file says beside its tensors."""
    return {"format": FORMAT, "component": component}


def file_bytes(plan: ComponentPlan) -> int:
    """Of the component's file, to the byte."""
    slabs = lay_out(plan)[1]
    return len(header_bytes(slabs, metadata_of(plan.name))) + sum(slab.nbytes for slab in slabs)
