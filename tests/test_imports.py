"""Libraries that take seconds to import are imported by those who need them."""

from __future__ import annotations

import subprocess
import sys

import pytest

ENCODERS = ("transformers", "diffusers.models.autoencoders", "bitsandbytes", "optimum.quanto")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lowvram", ("torch",)),
        ("lowvram.cli", ("torch", "numpy", "diffusers", *ENCODERS)),
        ("lowvram.planning", ("diffusers", *ENCODERS)),
        ("lowvram_quantize.format", ("diffusers", *ENCODERS)),
        ("lowvram_quantize.convert", ("diffusers", *ENCODERS)),
        # Input is refused before, and a rank that denoises encodes nothing and decodes nothing.
        ("lowvram.pipeline", ("diffusers", *ENCODERS)),
        ("lowvram.parallel.rank_team", ("diffusers", *ENCODERS)),
    ],
)
def test_what_is_not_needed_is_not_imported(module, absent):
    told = subprocess.run(
        [sys.executable, "-c", f"import {module}, sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert not set(absent) & set(told.stdout.split())
