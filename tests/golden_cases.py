"""The reference cases: where they are, how to read one, how far a tensor may be off."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(os.environ.get("LOWVRAM_GOLDEN") or Path(__file__).parent / "golden")


@dataclasses.dataclass(frozen=True)
class Case:
    folder: Path
    settings: dict

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")


def cases(kind: str) -> list[Case]:
    """All cases of a kind: "dit" (the DiT alone) or "pipeline" (a whole checkpoint)."""
    folders = sorted(path.parent for path in ROOT.glob("*/case.json"))
    wanted = [f for f in folders if (f / "ckpt").is_dir() == (kind == "pipeline")]
    return [Case(folder, json.loads((folder / "case.json").read_text())) for folder in wanted]


def relative_error(value: Tensor, golden: Tensor) -> float:
    """||value - golden|| / ||golden||; the shapes may differ in leading ones only."""
    if value.numel() != golden.numel():
        raise AssertionError(f"shape {tuple(value.shape)} does not hold what {tuple(golden.shape)} holds")
    golden64 = golden.double()
    return ((value.double().reshape(golden.shape) - golden64).norm() / golden64.norm()).item()
