"""Artifacts of the published widths with few layers and small encoders, without values: soon run on a simulated GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from lowvram_quantize import shape_artifact
from lowvram_quantize.format import Artifact
from lowvram_quantize.presets import PUBLISHED

LAYERS = 4
FEW = dataclasses.replace(
    PUBLISHED,
    dit=PUBLISHED.dit | {"num_layers": LAYERS, "audio_inject_layers": [0, 2], "audio_dim": 24},
    text_encoder=PUBLISHED.text_encoder | {"num_layers": 1, "vocab_size": 8192},
    audio_encoder={"width": 24},
)


def few_layers(
    folder: Path, precision: str, *, name: str = "", apart: Mapping[str, str] = MappingProxyType({})
) -> Artifact:
    """The one in ``folder``, written the first time; ``apart`` as ``write_shape_artifact`` takes it, ``name`` says of
    what mix."""
    path = folder / (name or precision)
    if not path.exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(shape_artifact.PRESETS, "14b", FEW)
            shape_artifact.write_shape_artifact(path, precision=precision, apart=apart)
    return Artifact.open(path)
