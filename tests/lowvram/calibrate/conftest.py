from __future__ import annotations

import pytest

from lowvram_quantize.checkpoint import Checkpoint, Named
from lowvram_quantize.components import plan_dit
from lowvram_quantize.lora import LoraSource
from lowvram_quantize.original import Original


@pytest.fixture(scope="session")
def original(tiny) -> Original:
    """What the artifacts of ``tiny`` were made from."""
    checkpoint = Checkpoint(tiny.checkpoint, Named())
    dit = checkpoint.file("dit")
    return Original(plan_dit(dit, checkpoint.config(dit), "int8", [LoraSource(path=tiny.lora, alpha=2.0)]))
