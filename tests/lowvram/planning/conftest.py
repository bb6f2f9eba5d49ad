"""Sizes of the published model in each precision, read from artifacts without values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram.planning.model_sizes import ModelSizes, model_sizes
from lowvram_quantize.format import Artifact
from lowvram_quantize.shape_artifact import write_shape_artifact


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Callable[[str], Path]:
    """Precision -> folder of the published shapes in it."""
    folder = tmp_path_factory.mktemp("published")

    def path(precision: str) -> Path:
        return (
            folder / precision
            if (folder / precision).exists()
            else write_shape_artifact(folder / precision, precision=precision)
        )

    return path


@pytest.fixture(scope="session")
def sizes(published) -> Callable[[str], ModelSizes]:
    """Precision -> its sizes."""
    known: dict[str, ModelSizes] = {}

    def of(precision: str) -> ModelSizes:
        if precision not in known:
            known[precision] = model_sizes(Artifact.open(published(precision)))
        return known[precision]

    return of
