"""Sizes of the published model in each precision, read from artifacts without values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram.planning.model_sizes import ModelFacts, facts_of
from lowvram_quantize.format import Artifact
from lowvram_quantize.phantom import write_phantom


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Callable[[str], Path]:
    """Precision -> folder of the published shapes in it."""
    folder = tmp_path_factory.mktemp("published")

    def path(precision: str) -> Path:
        return (
            folder / precision
            if (folder / precision).exists()
            else write_phantom(folder / precision, precision=precision)
        )

    return path


@pytest.fixture(scope="session")
def facts(published) -> Callable[[str], ModelFacts]:
    """Precision -> its sizes."""
    known: dict[str, ModelFacts] = {}

    def of(precision: str) -> ModelFacts:
        if precision not in known:
            known[precision] = facts_of(Artifact.open(published(precision)))
        return known[precision]

    return of
