"""Wrong calls across each border between the packages; ``borders.py`` holds that mypy finds every one. Never run."""

from pathlib import Path

import torch

from lowvram.pipeline import AvatarPipeline
from lowvram_kernels.linear import linear_q8
from lowvram_kernels.modules import QuantizedLinear
from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT
from lowvram_quantize.convert import convert
from lowvram_quantize.format import Artifact

Artifact.open(1, 2, 3)  # wrong
Artifact.open(Path("x")).no_such_method()  # wrong
convert(Path("x"), Path("y"), precision=8)  # wrong
DiTConfig(dim="5120")  # wrong
CausalDiT(5120)  # wrong
CausalDiT.no_such_function()  # wrong
linear_q8(torch.zeros(1), "weight")  # wrong
QuantizedLinear(1)  # wrong
AvatarPipeline.from_artifact(3)  # wrong
